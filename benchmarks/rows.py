"""What benchmarks share whose result is a JSON list of rows: `--dataset`, `--work_dir`, `--output`, `--table`."""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path


def parser_of_rows(description: str) -> argparse.ArgumentParser:
    """The flags that all of them have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", type=Path, default=[], help=".h5ad files.")
    parser.add_argument("--work_dir", type=Path, help="That of quality.py.")
    parser.add_argument("--output", type=Path, help="JSON list; results are appended to it.")
    parser.add_argument("--table", type=Path, help="Print the table of a JSON file, and nothing else.")
    return parser


def add_rows(
    args: argparse.Namespace, measure: Callable[[Path], Iterable[list[dict]]], table: Callable[[list[dict]], str]
) -> None:
    """
    Prints the table that was asked for; or measures every dataset, and writes its rows as soon as they are there.

    Args:
        args (`Namespace`): Of a parser of [`parser_of_rows`].
        measure (`Callable`): Yields rows of a dataset, which are written before it goes on.
        table (`Callable`): Rows as a Markdown table.
    """
    if args.table is not None:
        print(table(json.loads(args.table.read_text())))
        return
    if args.output is None or args.work_dir is None:
        raise SystemExit("--output and --work_dir are required.")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for path in args.dataset:
        for new in measure(path):
            rows = [*(json.loads(args.output.read_text()) if args.output.exists() else []), *new]
            args.output.write_text(json.dumps(rows, indent=1))
    print(table(rows))
