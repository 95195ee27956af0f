"""The `wbdit` command."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from . import recipes
from .data import read_cells, write_cells
from .pipelines.pipeline_scrna_generation import ScRNAGenerationPipeline


SCHEDULERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wbdit", description="Single cells by white-box diffusion.")
    commands = parser.add_subparsers(dest="command", required=True)

    generate = commands.add_parser("generate", help="Write generated cells to an .h5ad file.")
    generate.add_argument("model", help="A folder of training/train.py, or a Hub id.")
    generate.add_argument("--output", type=Path, required=True, help="The .h5ad file to write.")
    generate.add_argument("--num_cells", type=int, default=1000)
    generate.add_argument("--cell_types", help="One type for all cells; the training frequencies by default.")
    generate.add_argument(
        "--conditions", nargs="*", default=[], metavar="KEY=NAME", help="Further obs keys, e.g. condition=stim."
    )

    generate.add_argument(
        "--scheduler", choices=sorted(SCHEDULERS), help="Another solver than the pipeline's, e.g. with fewer steps."
    )
    generate.add_argument("--batch_size", type=int, help="Cells denoised at once: bounds the memory.")

    evaluate = commands.add_parser(
        "evaluate",
        help="Judge generated cells on held-out cells: report.json, report.md and report.png.",
        description="Either a model (its folder says which cells of --dataset it was trained on), or --generated cells"
        " of any generator with --train and --test.",
    )
    evaluate.add_argument("model", nargs="?", help="A folder of training/train.py.")
    evaluate.add_argument("--dataset", help="The .h5ad file that the model was trained on.")
    evaluate.add_argument("--generated", nargs="+", help=".h5ad files, each with as many cells as --test.")
    evaluate.add_argument("--train", help=".h5ad file of the training cells.")
    evaluate.add_argument("--test", help=".h5ad file of the held-out cells.")
    evaluate.add_argument("--label_key", help="obs key of the cell type, with --generated.")
    evaluate.add_argument("--output_dir", type=Path, default=Path("report"))
    evaluate.add_argument("--num_seeds", type=int, default=3, help="Samples to draw from the model.")
    evaluate.add_argument("--parity", action="store_true", help="Add the paper's metrics, which reward collapse.")

    prepare = commands.add_parser("prepare", help="Fetch a public dataset of the paper's reproduction.")
    prepare.add_argument("dataset", choices=sorted(recipes.RECIPES), help="Its name; see docs/reproduction.md.")
    prepare.add_argument("--output", type=Path, help="The .h5ad file to write; DATASET.h5ad by default.")
    prepare.add_argument("--folder", type=Path, default=Path("published"), help="Where the published files are kept.")

    for command in (generate, evaluate):
        command.add_argument("--guidance_scale", type=float, default=1.0)
        command.add_argument("--num_inference_steps", type=int, help="The pipeline's own number by default.")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def generate(args: argparse.Namespace):
    pipe = ScRNAGenerationPipeline.from_pretrained(args.model).to(args.device)
    for condition in args.conditions:
        if "=" not in condition:
            raise ValueError(f"--conditions {condition!r} is not of the form KEY=NAME.")
    if args.scheduler is not None:
        pipe.scheduler = SCHEDULERS[args.scheduler].from_config(pipe.scheduler.config)
    batches = pipe.stream(
        num_cells=args.num_cells,
        cell_types=args.cell_types,
        conditions=dict(condition.split("=", 1) for condition in args.conditions),
        guidance_scale=args.guidance_scale,
        num_inference_steps=args.num_inference_steps,
        batch_size=args.batch_size,
        generator=torch.Generator().manual_seed(args.seed),
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    num_cells, num_genes = write_cells(args.output, batches)
    print(f"{num_cells} cells × {num_genes} genes in {args.output}.")


def evaluate(args: argparse.Namespace):
    import matplotlib

    matplotlib.use("Agg")
    from .evaluation import report
    from .plotting import report_figure

    if args.model is not None:
        if args.dataset is None:
            raise ValueError("A model is judged on the file that it was trained on: give --dataset.")
        split_path = Path(args.model, "split.json")
        if not split_path.is_file():
            raise FileNotFoundError(
                f"{split_path} is missing: it says which cells were held out. Give the --output_dir of train.py, or"
                " generated cells with --generated, --train and --test."
            )
        split = json.loads(split_path.read_text())
        adata = read_cells(args.dataset)
        unknown = np.setdiff1d(split["train"] + split["test"], adata.obs_names)
        if len(unknown):
            raise ValueError(
                f"{args.dataset} has no cell {unknown[0]!r}, nor {len(unknown) - 1} others of {split_path}: give the"
                " file that the model was trained on."
            )
        pipe = ScRNAGenerationPipeline.from_pretrained(args.model).to(args.device)
        pipe.set_progress_bar_config(disable=True)
        values, layer = pipe.processor.config.values, pipe.processor.config.layer
        label_key = next(iter(pipe.processor.config.label_keys), None)
        if layer is not None:
            adata.X = adata.layers[layer]
        train, test = adata[split["train"]], adata[split["test"]]
        call_kwargs = {"guidance_scale": args.guidance_scale, "num_inference_steps": args.num_inference_steps}
        samples, test = report.draw_samples(pipe, test, args.num_seeds, seed=args.seed, **call_kwargs)
    else:
        if None in (args.generated, args.train, args.test):
            raise ValueError("Give a model and --dataset, or all of --generated, --train and --test.")
        train, test = read_cells(args.train), read_cells(args.test)
        samples, label_key = [read_cells(path) for path in args.generated], args.label_key
        values = "counts"
    results = report.evaluate_cells(samples, train, test, label_key=label_key, values=values, parity=args.parity)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "report.json").write_text(json.dumps(results, indent=1))
    table = report.to_markdown(results)
    (args.output_dir / "report.md").write_text(table)
    report_figure(test, samples[0], label_key, values).savefig(args.output_dir / "report.png", dpi=110)
    print(table)
    print(f"Written to {args.output_dir}: report.json, report.md, report.png.")


def prepare(args: argparse.Namespace):
    cells = recipes.prepare(args.dataset, args.folder / args.dataset)
    output = args.output or Path(f"{args.dataset}.h5ad")
    output.parent.mkdir(parents=True, exist_ok=True)
    cells.write_h5ad(output)
    print(f"{cells.n_obs} cells × {cells.n_vars} genes in {output}: {recipes.RECIPES[args.dataset].source}.")


def main(argv: list[str] | None = None):
    args = build_parser().parse_args(argv)
    try:
        {"generate": generate, "evaluate": evaluate, "prepare": prepare}[args.command](args)
    except (ValueError, OSError) as error:
        sys.exit(f"wbdit {args.command}: {error}")


if __name__ == "__main__":
    main()
