"""The `wbdit` command: its flags. What a command needs is imported when it runs, so that `--help` is quick."""

import argparse
import sys
from pathlib import Path
from typing import Any


TRAIN_HELP = "Train on cells and write a pipeline."
FOLDER_HELP = "A folder that a training wrote, or the pipeline that comes with the package: pbmc68k_reduced."
MODEL_HELP = "A folder that a training wrote, a Hub id, or the pipeline that comes with the package: pbmc68k_reduced."
DATASET_HELP = "The file or prepared folder that the model was trained on."


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wbdit", description="Single cells by white-box diffusion.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Its flags are those of the training's configuration: `main` hands them on.
    commands.add_parser("train", help=TRAIN_HELP, add_help=False)
    for add in (_add_generate, _add_evaluate, _add_compare, _add_programs, _add_explain, _add_push, _add_prepare):
        add(commands)
    _add_fetch(commands)
    _add_app(commands)
    return parser


def _add(commands: Any, name: str, text: str, more: str, examples: list[str], json: bool = True):
    """A command with examples in its help; all but the page's can say its result as JSON."""
    parser = commands.add_parser(
        name,
        help=text,
        description=f"{text} {more}".strip(),
        epilog="\n".join(["examples:", *(f"  wbdit {name} {example}" for example in examples)]),
        formatter_class=_Help,
    )
    if json:
        parser.add_argument("--json", action="store_true", help="Print the result as JSON, and nothing else.")
    return parser


class _Help(argparse.RawDescriptionHelpFormatter):
    """Wraps descriptions, and leaves the lines of examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def _add_generate(commands: Any):
    parser = _add(
        *(commands, "generate", "Make cells and write them to a file.", ""),
        [
            "pbmc68k_reduced --num_cells 5000 --output cells.h5ad",
            'wbdit-cells --cell_types "B cell" --conditions condition=STIM --output b.h5ad',
            "wbdit-cells --num_cells 1e6 --num_processes 4 --output cells.zarr",
        ],
    )
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument(
        "--output",
        required=True,
        help="The .h5ad file or .zarr folder to write, or a folder for parquet files. If the command is interrupted,"
        " the same one goes on where it stopped.",
    )
    parser.add_argument("--num_cells", type=whole_number, default=1000, help="How many cells to make. Default: 1000.")
    parser.add_argument("--num_processes", type=int, default=1, help="Processes to share the work. Default: 1.")
    parser.add_argument("--cell_types", help="One type for all cells; the training frequencies by default.")
    parser.add_argument(
        "--conditions", nargs="*", default=[], metavar="KEY=NAME", help="Labels of other obs keys: condition=stim."
    )
    parser.add_argument("--scheduler", help="Another solver than the pipeline's: ddpm, ddim, dpmsolver++ or unipc.")
    parser.add_argument("--batch_size", type=int, help="Cells denoised at once: bounds the memory.")
    _add_sampling(parser)


def _add_evaluate(commands: Any):
    parser = _add(
        *(commands, "evaluate", "Judge generated cells on held-out cells: report.json, report.md and report.png."),
        "Either a model, whose folder says which cells of --dataset were held out, or --generated cells of any"
        " generator with --train and --test.",
        [
            "wbdit-cells --dataset cells.h5ad --output_dir report",
            "--generated a.h5ad b.h5ad --train train.h5ad --test test.h5ad --label_key cell_type",
        ],
    )
    parser.add_argument("model", nargs="?", help=FOLDER_HELP)
    parser.add_argument("--dataset", help=DATASET_HELP)
    parser.add_argument("--generated", nargs="+", help=".h5ad files, each with as many cells as --test.")
    parser.add_argument("--train", help=".h5ad file of the training cells.")
    parser.add_argument("--test", help=".h5ad file of the held-out cells.")
    parser.add_argument("--label_key", help="obs key of the cell type, with --generated.")
    parser.add_argument("--values", choices=["counts", "log"], help="What --generated files hold. Default: counts.")
    parser.add_argument("--donor_key", help="obs key of the donor: whether training donors can be told from others.")
    parser.add_argument("--output_dir", type=Path, default=Path("report"), help="Folder to write. Default: report.")
    parser.add_argument("--num_samples", type=int, help="Samples to draw from the model. Default: 3.")
    parser.add_argument(
        "--baselines",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="Also judge cells that the model's codec makes without its denoiser. Default: True.",
    )
    parser.add_argument("--parity", action="store_true", help="Add the paper's metrics, which reward collapse.")
    _add_sampling(parser)


def _add_compare(commands: Any):
    parser = _add(
        *(commands, "compare", "Judge several generators beside each other: comparison.json, .md and .png."),
        "Models draw their samples; of another generator, give files with as many cells as are held out, and with"
        " their labels. A name that is given several times has several samples.",
        [
            "ours=wbdit-cells scvi=scvi-1.h5ad scvi=scvi-2.h5ad --dataset cells.h5ad",
            "a.h5ad b.h5ad --train train.h5ad --test test.h5ad --label_key cell_type",
        ],
    )
    parser.add_argument("generators", nargs="+", metavar="[NAME=]PATH", help="Folders of models, or .h5ad files.")
    parser.add_argument("--dataset", help="The file or prepared folder that the models were trained on.")
    parser.add_argument("--train", help="Instead of --dataset, the file of the training cells.")
    parser.add_argument("--test", help="Instead of --dataset, the file of the held-out cells.")
    parser.add_argument("--label_key", help="obs key of the cell type, if no model says it.")
    parser.add_argument("--values", choices=["counts", "log"], help="What files hold, if no model says it.")
    parser.add_argument("--output_dir", type=Path, default=Path("comparison"), help="Folder. Default: comparison.")
    parser.add_argument("--num_samples", type=int, help="Samples of each model, where there are no files. Default: 3.")
    _add_sampling(parser)


def _add_programs(commands: Any):
    parser = _add(
        *(commands, "programs", "Write what each gene program of a model does, as a table.", ""),
        ["pbmc68k_reduced", "wbdit-cells --num_genes 20 --output loadings.csv"],
    )
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--output", type=Path, help="The .csv file for all loadings, genes × programs.")
    parser.add_argument("--num_genes", type=int, default=10, help="Genes to list of each program. Default: 10.")


def _add_explain(commands: Any):
    parser = _add(
        *(commands, "explain", "Look inside a model: a page with figures (explain.html), explain.json, explain.h5ad."),
        "Programs, layers, decisions and interventions, measured on the held-out cells, beside controls.",
        ["wbdit-cells --dataset cells.h5ad --output_dir inside"],
    )
    parser.add_argument("model", help=FOLDER_HELP)
    parser.add_argument("--dataset", required=True, help=DATASET_HELP)
    parser.add_argument("--output_dir", type=Path, default=Path("explain"), help="Folder to write. Default: explain.")
    parser.add_argument("--max_cells", type=int, default=3000, help="Held-out cells to use at most. Default: 3000.")
    parser.add_argument("--seed", type=seed, default=0, help="Seed of noise and cells. Default: 0.")


def _add_push(commands: Any):
    parser = _add(
        *(commands, "push", "Publish a model on the Hugging Face Hub, with its card."),
        "The card says on what the pipeline of a folder was trained, how, and how good it is.",
        [
            'wbdit-pbmc --repo_id me/wbdit-pbmc --report report --data_name "PBMC 3k" --data_license "CC BY 4.0"',
            "wbdit-pbmc --repo_id me/wbdit-pbmc --dry_run repository",
        ],
    )
    parser.add_argument("model", help=FOLDER_HELP)
    parser.add_argument("--repo_id", required=True, help="The repository, such as me/wbdit-pbmc.")
    parser.add_argument("--private", action="store_true", default=None, help="Make a private repository.")
    parser.add_argument("--variant", choices=["bf16"], help="Add the denoiser in bfloat16.")
    parser.add_argument(
        "--with_code",
        action="store_true",
        help="Add the modules that `DiffusionPipeline.from_pretrained` needs with trust_remote_code=True.",
    )
    parser.add_argument("--dry_run", type=Path, metavar="FOLDER", help="Write this new folder, and upload nothing.")
    parser.add_argument("--data_name", help="What the training data are called.")
    parser.add_argument("--data_license", help="Their licence.")
    parser.add_argument("--data_source", help="Their accession, or where they are.")
    parser.add_argument("--report", type=Path, help="What `wbdit evaluate` wrote, if it is not in the model's folder.")


def _add_prepare(commands: Any):
    parser = _add(
        *(commands, "prepare", "Make one shuffled dataset, a folder of parquet files, of AnnData files of any size."),
        "`wbdit train --dataset FOLDER` trains on it, and `datasets.load_dataset` reads it. No file is ever whole in"
        " memory.",
        ["atlas/*.h5ad --label_keys cell_type --file_key sample --output atlas-prepared"],
    )
    parser.add_argument("files", nargs="+", type=Path, help=".h5ad or .zarr files.")
    parser.add_argument("--output", type=Path, required=True, help="The folder to write.")
    parser.add_argument("--layer", help="The layer that holds the matrix. X when not given.")
    parser.add_argument("--values", default="counts", help="What it holds: counts (kept bit by bit) or log.")
    parser.add_argument(
        "--label_keys",
        nargs="+",
        default=[],
        help="Columns of obs that are labels whatever they hold; the split is stratified by the first one.",
    )
    parser.add_argument("--genes", default="intersection", help="Of several files: intersection (default) or union.")
    parser.add_argument("--file_key", help="Column of obs to make, with the name of each cell's file.")
    parser.add_argument("--min_counts", type=int, help="Leave cells with fewer counts out. Default: 1.")
    parser.add_argument("--min_genes", type=int, default=1, help="Leave cells with fewer genes out. Default: 1.")
    parser.add_argument("--test_fraction", type=float, default=0.2, help="Share of held-out cells. Default: 0.2.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of split and order. Default: 0.")
    parser.add_argument("--push_to_hub", action="store_true", help="Upload it to the Hugging Face Hub, as a dataset.")
    parser.add_argument("--hub_dataset_id", help="The dataset to upload to. The name of --output when not given.")


def _add_fetch(commands: Any):
    parser = _add(
        *(commands, "fetch", "Fetch a public dataset of the paper's reproduction.", ""),
        ["list", "pbmc3k --output pbmc3k.h5ad"],
    )
    parser.add_argument("dataset", help="Its name; `wbdit fetch list` prints them.")
    parser.add_argument("--output", type=Path, help="The .h5ad file to write; DATASET.h5ad by default.")
    parser.add_argument("--folder", type=Path, default=Path("published"), help="Where the published files are kept.")


def _add_app(commands: Any):
    parser = _add(
        *(commands, "app", "Serve a page in the browser: generate, compare, train on small files.", ""),
        ["", "--model wbdit-cells --port 7860"],
        json=False,
    )
    parser.add_argument("--model", help=f"The pipeline to begin with. {MODEL_HELP}")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on. Default: 127.0.0.1, this machine.")
    parser.add_argument("--port", type=int, help="The first free one from 7860 on by default.")


def _add_sampling(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--guidance_scale", type=float, default=1.0, help="Classifier-free guidance. Default: 1, none."
    )
    parser.add_argument("--num_inference_steps", type=int, help="The pipeline's own number by default.")
    parser.add_argument("--seed", type=seed, default=0, help="Seed of the cells. Default: 0.")
    parser.add_argument("--device", help="Where to compute, such as cuda or cpu. A GPU by default, if there is one.")


def whole_number(text: str) -> int:
    """`1000000`, `1_000_000` or `1e6`."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


def seed(text: str) -> int:
    """Of a generator: `2**32` and beyond are not known to all of those that are used."""
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"a whole number from 0 to 2**32 - 1, not {text}")
    return number


def main(argv: list[str] | None = None):
    """Runs a command. A user's mistake ends in one line and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        from .training.__main__ import main as train

        return train(argv[1:], prog="wbdit train")
    args = build_parser().parse_args(argv)
    try:
        from . import commands

        result, text = getattr(commands, args.command)(args)
        if getattr(args, "json", False):
            from .evaluation import to_json

            text = to_json(result, indent=None)
        print(text)
    except (ValueError, OSError) as error:
        reason = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            reason = f"{error.filename}: {error.strerror}"
        print(f"wbdit {args.command}: {' '.join(reason.split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"wbdit {args.command}: interrupted. {interrupt}".strip(), file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
