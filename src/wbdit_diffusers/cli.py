"""The `wbdit` command. What a command needs is imported when it runs, so that `--help` is quick."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wbdit", description="Single cells by white-box diffusion.")
    commands = parser.add_subparsers(dest="command", required=True)
    # Its flags are those of the training's configuration: `main` hands them on.
    commands.add_parser("train", help="Train on an .h5ad file and write a pipeline.", add_help=False)
    _add_generate(commands.add_parser("generate", help="Write generated cells to an .h5ad file."))
    _add_evaluate(
        commands.add_parser(
            "evaluate",
            help="Judge generated cells on held-out cells: report.json, report.md and report.png.",
            description="Either a model (its folder says which cells of --dataset it was trained on), or --generated"
            " cells of any generator with --train and --test.",
        )
    )
    programs = commands.add_parser("programs", help="Write what each gene program of a model does, as a table.")
    programs.add_argument("model", help="A folder that a training wrote, or a Hub id.")
    programs.add_argument("--output", type=Path, help="The .csv file for all loadings, genes × programs.")
    programs.add_argument("--num_genes", type=int, default=10, help="Genes to list of each program. Default: 10.")
    explain = commands.add_parser(
        "explain",
        help="Look inside a model: a page with figures (explain.html), explain.json and explain.h5ad.",
        description="Programs, layers, decisions and interventions, measured on the held-out cells, beside controls.",
    )
    explain.add_argument("model", help="A folder that a training wrote.")
    explain.add_argument("--dataset", required=True, help="The file or prepared folder that the model was trained on.")
    explain.add_argument("--output_dir", type=Path, default=Path("explain"), help="Folder to write. Default: explain.")
    explain.add_argument("--max_cells", type=int, default=3000, help="Held-out cells to use at most. Default: 3000.")
    explain.add_argument("--seed", type=seed, default=0, help="Seed of noise and cells. Default: 0.")
    _add_push(
        commands.add_parser(
            "push",
            help="Publish a model on the Hugging Face Hub, with its card.",
            description="Uploads the pipeline of a folder, and a card that says on what it was trained, how, and how"
            " good it is: wbdit push wbdit-pbmc --repo_id me/wbdit-pbmc --report report",
        )
    )
    _add_prepare(
        commands.add_parser(
            "prepare",
            help="Make one shuffled dataset, a folder of parquet files, of AnnData files of any size.",
            description="`wbdit train --dataset FOLDER` trains on it, and `datasets.load_dataset` reads it. No file is"
            " ever whole in memory.",
        )
    )
    fetch = commands.add_parser("fetch", help="Fetch a public dataset of the paper's reproduction.")
    fetch.add_argument("dataset", help="Its name; `wbdit fetch list` prints them.")
    fetch.add_argument("--output", type=Path, help="The .h5ad file to write; DATASET.h5ad by default.")
    fetch.add_argument("--folder", type=Path, default=Path("published"), help="Where the published files are kept.")
    app = commands.add_parser("app", help="Serve a page in the browser: generate, compare, train on small files.")
    app.add_argument("--model", help="The pipeline to begin with: a folder that a training wrote, or a Hub id.")
    app.add_argument("--host", default="127.0.0.1", help="Address to listen on. Default: 127.0.0.1, this machine.")
    app.add_argument("--port", type=int, help="The first free one from 7860 on by default.")
    return parser


def _add_prepare(parser: argparse.ArgumentParser):
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


def _add_generate(parser: argparse.ArgumentParser):
    parser.add_argument("model", help="A folder that a training wrote, or a Hub id.")
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


def _add_evaluate(parser: argparse.ArgumentParser):
    parser.add_argument("model", nargs="?", help="A folder that a training wrote.")
    parser.add_argument("--dataset", help="The file or prepared folder that the model was trained on.")
    parser.add_argument("--generated", nargs="+", help=".h5ad files, each with as many cells as --test.")
    parser.add_argument("--train", help=".h5ad file of the training cells.")
    parser.add_argument("--test", help=".h5ad file of the held-out cells.")
    parser.add_argument("--label_key", help="obs key of the cell type, with --generated.")
    parser.add_argument("--values", choices=["counts", "log"], help="What --generated files hold. Default: counts.")
    parser.add_argument("--donor_key", help="obs key of the donor: whether training donors can be told from others.")
    parser.add_argument("--output_dir", type=Path, default=Path("report"), help="Folder to write. Default: report.")
    parser.add_argument("--num_samples", type=int, default=3, help="Samples to draw from the model. Default: 3.")
    parser.add_argument(
        "--baselines",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Also judge cells that the model's codec makes without its denoiser. Default: True.",
    )
    parser.add_argument("--parity", action="store_true", help="Add the paper's metrics, which reward collapse.")
    _add_sampling(parser)


def _add_push(parser: argparse.ArgumentParser):
    parser.add_argument("model", help="A folder that a training wrote.")
    parser.add_argument("--repo_id", required=True, help="The repository, such as me/wbdit-pbmc.")
    parser.add_argument("--private", action="store_true", default=None, help="Make a private repository.")
    parser.add_argument("--variant", choices=["bf16"], help="Add the denoiser in bfloat16.")
    parser.add_argument(
        "--with_code",
        action="store_true",
        help="Add what Diffusers needs to load the model by trust_remote_code, as a pipeline and as blocks.",
    )
    parser.add_argument("--dry_run", type=Path, metavar="FOLDER", help="Write this new folder, and upload nothing.")
    parser.add_argument("--data_name", help="What the training data are called.")
    parser.add_argument("--data_license", help="Their licence.")
    parser.add_argument("--data_source", help="Their accession, or where they are.")
    parser.add_argument("--report", type=Path, help="What `wbdit evaluate` wrote, if it is not in the model's folder.")


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
        raise ValueError
    return number


def check_folder(path: Path):
    """Raises an `OSError` if a folder can't be written to, before the work whose results it is for; makes none."""
    existing = next(one for one in [path, *path.absolute().parents] if one.exists())
    if not existing.is_dir():
        raise OSError(f"{existing} is no folder: give another path.")
    if not os.access(existing, os.W_OK):
        raise OSError(f"{existing} cannot be written to: give another path.")


def load_pipeline(model: str, device: str | None = "cpu"):
    """The pipeline that a command names, on a device."""
    from .pipelines import ScRNAGenerationPipeline
    from .pipelines.generate import choose_device, quiet

    quiet()
    return ScRNAGenerationPipeline.from_pretrained(model).to(choose_device(device))


def generate(args: argparse.Namespace):
    from .pipelines.generate import GenerationRequest, generate_cells

    conditions = {}
    for condition in args.conditions:
        key, equals, name = condition.partition("=")
        if not equals or not key:
            raise ValueError(f"--conditions {condition!r} is not of the form KEY=NAME.")
        if key in conditions:
            raise ValueError(f"--conditions names {key!r} twice.")
        conditions[key] = name
    request = GenerationRequest(
        model=args.model,
        num_cells=args.num_cells,
        cell_types=args.cell_types,
        conditions=conditions,
        guidance_scale=args.guidance_scale,
        num_inference_steps=args.num_inference_steps,
        batch_size=args.batch_size,
        seed=args.seed,
        scheduler=args.scheduler,
        device=args.device,
    )
    num_cells, num_genes = generate_cells(request, args.output, args.num_processes)
    print(f"{num_cells} cells × {num_genes} genes in {args.output}.")


def evaluate(args: argparse.Namespace):
    import matplotlib

    matplotlib.use("Agg")
    check_folder(args.output_dir)
    if args.num_samples < 1:
        raise ValueError(f"--num_samples is at least 1, not {args.num_samples}.")
    from .evaluation import evaluate_cells, to_markdown
    from .evaluation.figure import report_figure

    samples, train, test, settings = _cells_of_model(args) if args.model is not None else _cells_of_files(args)
    report = evaluate_cells(
        *(samples, train, test), donor_key=args.donor_key, parity=args.parity, seed=args.seed, **settings
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=1))
    table = to_markdown(report)
    (args.output_dir / "report.md").write_text(table)
    figure = report_figure(test, samples[0], report["label_key"], settings["values"], settings.get("layer"))
    figure.savefig(args.output_dir / "report.png", dpi=110)
    print(table)
    print(f"Written to {args.output_dir}: report.json, report.md, report.png.")


def _cells_of_model(args: argparse.Namespace) -> tuple[list, Any, Any, dict[str, Any]]:
    """Samples of a trained model, its training and held-out cells, and how they are to be judged."""
    from .data import CellSplit
    from .evaluation import draw_baselines, draw_samples

    if args.dataset is None:
        raise ValueError("A model is judged on the file that it was trained on: give --dataset.")
    for name in ("generated", "train", "test", "label_key", "values"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} has no effect on a model, which knows its own cells and labels: leave it out.")
    train, test = CellSplit.load(args.model).read(args.dataset)
    pipe = load_pipeline(args.model, args.device)
    pipe.set_progress_bar_config(disable=True)
    call = {"guidance_scale": args.guidance_scale, "num_inference_steps": args.num_inference_steps}
    samples, test = draw_samples(pipe, test, args.num_samples, args.seed, **call)
    config = pipe.processor.config
    baselines = draw_baselines(pipe, train, test, args.num_samples, args.seed) if args.baselines else None
    settings = {"label_key": list(config.label_keys), "values": config.values, "layer": config.layer}
    return samples, train, test, settings | {"baselines": baselines}


def _cells_of_files(args: argparse.Namespace) -> tuple[list, Any, Any, dict[str, Any]]:
    """The same for cells of any generator."""
    from .data import read_cells

    if None in (args.generated, args.train, args.test):
        raise ValueError("Give a model and --dataset, or all of --generated, --train and --test.")
    samples = [read_cells(path) for path in args.generated]
    settings = {"label_key": args.label_key, "values": args.values or "counts"}
    return samples, read_cells(args.train), read_cells(args.test), settings


def programs(args: argparse.Namespace):
    import pandas as pd

    from .models import ProgramCodec
    from .pipelines.programs import program_table

    if args.output is not None:
        check_folder(args.output.parent)
        if args.output.exists() and not args.output.is_file():
            raise OSError(f"{args.output} is no file, and is not replaced: give another path.")
    pipe = load_pipeline(args.model)
    if not isinstance(pipe.codec, ProgramCodec):
        raise ValueError(f"{args.model} has no gene programs: it was trained with {type(pipe.codec).__name__}.")
    if args.num_genes < 1:
        raise ValueError(f"--num_genes is at least 1, not {args.num_genes}.")
    var_names = pipe.processor.var_names
    table = program_table(pipe.codec, var_names, args.num_genes)
    for name, row in table.iterrows():
        print(f"{name} ({row.explained:.1%})\n  up:   {row.up}\n  down: {row.down}")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(pipe.codec.loadings.numpy(), var_names.rename("gene"), table.index).to_csv(args.output)
        print(f"The loadings of {len(var_names)} genes are in {args.output}.")


def explain(args: argparse.Namespace):
    import matplotlib

    matplotlib.use("Agg")
    from .data import CellSplit
    from .interpretation import explain as measure
    from .interpretation.page import write_report

    check_folder(args.output_dir)
    if args.max_cells < 20:
        raise ValueError(f"--max_cells is at least 20, not {args.max_cells}.")
    train, test = CellSplit.load(args.model).read(args.dataset)
    pipe = load_pipeline(args.model)
    report, cells = measure(pipe, train, test, args.max_cells, args.seed)
    write_report(args.output_dir, report, cells, Path(args.model).resolve().name)
    print(f"Look at {args.output_dir / 'explain.html'}; the numbers are in explain.json, the cells in explain.h5ad.")


def push(args: argparse.Namespace):
    from .hub import publish

    if not Path(args.model).is_dir():
        raise ValueError(f"There is no folder {args.model}: give the --output_dir of a training.")
    settings = {name: value for name, value in vars(args).items() if name not in ("command", "model", "repo_id")}
    where = publish(load_pipeline(args.model), args.model, args.repo_id, **settings)
    print(f"Written to {where}; nothing was uploaded." if args.dry_run else f"Published: {where}")


def prepare(args: argparse.Namespace):
    from .data import PrepareConfig
    from .data import prepare as prepare_cells

    if args.hub_dataset_id is not None and not args.push_to_hub:
        raise ValueError("--hub_dataset_id has no effect without --push_to_hub.")
    names = ("layer", "values", "label_keys", "genes", "file_key", "min_counts", "min_genes", "test_fraction", "seed")
    config = PrepareConfig(**{name: getattr(args, name) for name in names})
    metadata = prepare_cells(args.files, args.output, config)
    sizes = {split: sum(files.values()) for split, files in metadata["splits"].items()}
    described = ", ".join(f"{number} {split}" for split, number in sizes.items())
    print(f"{sum(sizes.values())} cells ({described}) × {metadata['num_genes']} genes in {args.output}.")
    if args.push_to_hub:
        from huggingface_hub import create_repo, upload_folder

        repo_id = create_repo(args.hub_dataset_id or args.output.name, repo_type="dataset", exist_ok=True).repo_id
        upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=args.output, commit_message="wbdit prepare")
        print(f"Uploaded: hf://datasets/{repo_id}")


def fetch(args: argparse.Namespace):
    from .data.public import RECIPES
    from .data.public import fetch as fetch_cells
    from .data.writer import check_output

    if args.dataset == "list":
        print("\n".join(f"{name}: {recipe.source}" for name, recipe in RECIPES.items()))
        return
    output = args.output or Path(f"{args.dataset}.h5ad")
    if args.dataset in RECIPES:
        check_output(output)
    cells = fetch_cells(args.dataset, args.folder / args.dataset)
    cells.write_h5ad(output)
    print(f"{cells.n_obs} cells × {cells.n_vars} genes in {output}: {RECIPES[args.dataset].source}.")


def app(args: argparse.Namespace):
    import importlib.util

    if importlib.util.find_spec("gradio") is None:
        raise ValueError('The page needs Gradio: pip install "wbdit_diffusers[app]".')
    from .app import launch

    launch(args.model, args.host, args.port)


def main(argv: list[str] | None = None):
    """Runs a command. A user's mistake ends in one line and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:
        from .training.__main__ import main as train

        return train(argv[1:], prog="wbdit train")
    args = build_parser().parse_args(argv)
    try:
        {
            "generate": generate,
            "evaluate": evaluate,
            "programs": programs,
            "explain": explain,
            "push": push,
            "prepare": prepare,
            "fetch": fetch,
            "app": app,
        }[args.command](args)
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
