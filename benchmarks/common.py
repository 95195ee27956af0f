"""What benchmarks share: flags, results in JSON, tables in Markdown, and trained pipelines with their cells."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.data import AnnDataSource, CellSplit, read_cells
from wbdit_diffusers.files import write_whole
from wbdit_diffusers.training import TrainingConfig, train


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser of the flags that most benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", type=Path, default=[], help=".h5ad files.")
    parser.add_argument("--work_dir", type=Path, help="Folder of the pipelines that quality.py trained.")
    parser.add_argument("--output", type=Path, help="JSON file. Results are added to it.")
    parser.add_argument("--table", type=Path, help="JSON file to print as a table. Nothing is measured.")
    return parser


def parse(
    parser: argparse.ArgumentParser, table: Callable[[Any], str], needs_work_dir: bool = True
) -> argparse.Namespace:
    """Parses the flags. With `--table`, prints the table and exits."""
    args = parser.parse_args()
    if args.table is not None:
        print(table(json.loads(args.table.read_text())))
        raise SystemExit
    if args.output is None or (needs_work_dir and args.work_dir is None):
        parser.error("--output and --work_dir are required." if needs_work_dir else "--output is required.")
    return args


def read_results(path: Path, default: Any) -> Any:
    """The content of a JSON file, or a default if there is none."""
    return json.loads(path.read_text()) if path.exists() else default


def write_results(path: Path, results: Any):
    """Writes a JSON file and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: partial.write_text(json.dumps(results, indent=1)))


def add_rows(path: Path, rows: Iterable[dict]) -> list[dict]:
    """Appends rows to a JSON list as they come, prints them, and returns the whole list."""
    results = read_results(path, [])
    for row in rows:
        results.append(row)
        write_results(path, results)
        print(json.dumps(row), flush=True)
    return results


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("| --- ", "|---").replace("|--- |", "|---|")


def mean_sd(values: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation over runs, as text."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    return f"{np.nanmean(values):.{digits}f}" + (f" ± {np.nanstd(values):.{digits}f}" if len(values) > 1 else "")


def excess_text(excess: dict[str, dict], name: str) -> str:
    """The excess of a column, its standard deviation and the classifier, as text."""
    if name not in excess:
        return "–"
    return f"{excess[name]['mean']:.3f} ± {excess[name]['sd']:.3f} ({excess[name]['judge']})"


def drop_empty_cells(adata: ad.AnnData) -> ad.AnnData:
    """Leaves out cells in which nothing was measured, as a training does."""
    return adata[~AnnDataSource(adata).empty_cells()].copy()


def load_run(folder: Path, dataset: Path) -> tuple[ScRNAGenerationPipeline, ad.AnnData, ad.AnnData]:
    """A trained pipeline, its training cells, and the held-out cells whose labels it knows."""
    pipe = ScRNAGenerationPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    train_cells, test_cells = CellSplit.load(folder).apply(drop_empty_cells(read_cells(dataset)))
    return pipe, train_cells, test_cells[pipe.processor.knows_labels(test_cells)]


def environment(packages: list[str], folder: Path, without_dependencies: Sequence[str] = ()) -> Path:
    """Python of an environment with these packages, which is made if it is not there."""
    python = folder.absolute() / "bin" / "python"
    if not (folder / "made").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, *packages], check=True)
        if without_dependencies:
            subprocess.run([*install, "--no-deps", *without_dependencies], check=True)
        (folder / "made").touch()
    return python


def train_from_json(settings: str):
    """Trains with the fields of a config, in a process whose memory is measured."""
    train(None, TrainingConfig(**json.loads(settings)))
