"""From real cells to generated ones, in about four minutes on two cores, without the installation.

    python examples/quickstart.py --output_dir demo

700 PBMCs (Scanpy's `pbmc68k_reduced`) are split; a small White-Box DiT is trained on four fifths of them; the pipeline
generates 5,000 cells. The output folder then holds

    cells.h5ad      the generated cells: integer counts, gene names, cell types
    figure.png      generated cells and held-out cells
    metrics.md      how real they are, compared with real training cells
    inside/         explain.html, a look inside: programs, layers and interventions, with controls
    wbdit-pbmc/     the pipeline, for `ScRNAGenerationPipeline.from_pretrained`
"""

import argparse
import logging
from pathlib import Path

import matplotlib
import torch

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.data import CellSplit, load_pbmc
from wbdit_diffusers.evaluation import evaluate, to_json, to_markdown
from wbdit_diffusers.evaluation.figure import report_figure
from wbdit_diffusers.evaluation.table import summary
from wbdit_diffusers.hub import write_model_card
from wbdit_diffusers.interpretation import explain
from wbdit_diffusers.interpretation.page import write_report
from wbdit_diffusers.training import TrainingConfig, train


matplotlib.use("Agg")  # no window


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo"))
    parser.add_argument("--max_train_steps", type=int, default=2000)
    parser.add_argument("--max_train_minutes", type=float, help="End the training earlier.")
    parser.add_argument("--num_cells", type=int, default=5000)
    parser.add_argument("--num_samples", type=int, default=3, help="Samples to judge.")
    parser.add_argument(
        "--inside", action=argparse.BooleanOptionalAction, default=True, help="Write the look inside, for a minute."
    )
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)

    print("1. Real cells: Scanpy's pbmc68k_reduced", flush=True)
    real = load_pbmc()
    real.write_h5ad(args.output_dir / "real.h5ad")

    print("2. Training, for about three minutes on two cores", flush=True)
    folder = args.output_dir / "wbdit-pbmc"
    config = TrainingConfig(
        label_keys=["cell_type"],
        output_dir=folder,
        overwrite_output_dir=True,
        max_train_steps=args.max_train_steps,
        max_train_minutes=args.max_train_minutes,
        validation_steps=500,
        checkpointing_steps=1_000_000,
    )
    train(real, config)

    print(f"3. Generating {args.num_cells} cells", flush=True)
    pipe = ScRNAGenerationPipeline.from_pretrained(folder)
    cells = pipe(num_cells=args.num_cells, generator=torch.Generator().manual_seed(0)).cells
    cells.write_h5ad(args.output_dir / "cells.h5ad")
    print(cells)

    print("4. Judging them on the held-out cells", flush=True)
    train_cells, test_cells = CellSplit.load(folder).apply(real)
    pipe.set_progress_bar_config(disable=True)
    report = evaluate(pipe, train_cells, test_cells, num_samples=args.num_samples)
    (folder / "report.json").write_text(to_json(report))
    write_model_card(pipe, folder)  # it says what was measured
    (args.output_dir / "metrics.md").write_text(to_markdown(report))
    print(summary(report))

    if args.inside:
        print("5. Looking inside", flush=True)
        inside, held_out = explain(pipe, train_cells, test_cells)
        write_report(args.output_dir / "inside", inside, held_out, folder.name)
        print(f"Look at {args.output_dir / 'inside' / 'explain.html'}.")

    figure = report_figure(test_cells, cells[: test_cells.n_obs], "cell_type")
    figure.savefig(args.output_dir / "figure.png", dpi=110)
    print(f"Look at {args.output_dir / 'figure.png'}; the cells are in {args.output_dir / 'cells.h5ad'}.")


if __name__ == "__main__":
    main()
