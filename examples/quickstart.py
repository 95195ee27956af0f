"""From real cells to generated ones, in under 8 minutes on two cores.

    python examples/quickstart.py --output_dir demo

700 PBMCs (Scanpy's `pbmc68k_reduced`) are split; a small White-Box DiT is trained on four fifths of them by
training/train.py; the pipeline is loaded back and generates 5,000 cells. The output folder then holds

    cells.h5ad      the generated cells: integer counts, gene names, cell types
    figure.png      generated cells beside real ones
    metrics.md      how real they are, beside what real cells themselves reach
    wbdit-pbmc/     the pipeline, for `ScRNAGenerationPipeline.from_pretrained`
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import torch

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.data import load_pbmc
from wbdit_diffusers.evaluation.report import draw_samples, evaluate_cells, to_markdown
from wbdit_diffusers.plotting import report_figure


matplotlib.use("Agg")  # no window
TRAIN_SCRIPT = Path(__file__).parents[1] / "training" / "train.py"
CONFIG = TRAIN_SCRIPT.parent / "configs" / "quickstart.yaml"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo"))
    parser.add_argument("--max_train_minutes", type=float, default=4.0)
    parser.add_argument("--num_cells", type=int, default=5000)
    parser.add_argument("--num_seeds", type=int, default=3, help="Samples to judge.")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    print("1. Real cells: Scanpy's pbmc68k_reduced", flush=True)
    real = load_pbmc()
    real_path, pipeline_path = args.output_dir / "real.h5ad", args.output_dir / "wbdit-pbmc"
    real.write_h5ad(real_path)

    print(f"2. Training for {args.max_train_minutes:g} minutes", flush=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", TRAIN_SCRIPT, "--config", CONFIG]
    command += ["--dataset", real_path, "--output_dir", pipeline_path]
    command += ["--max_train_minutes", args.max_train_minutes]
    subprocess.run([str(part) for part in command], check=True)

    print(f"3. Generating {args.num_cells} cells", flush=True)
    pipe = ScRNAGenerationPipeline.from_pretrained(pipeline_path)
    cells = pipe(num_cells=args.num_cells, generator=torch.Generator().manual_seed(0)).cells
    cells.write_h5ad(args.output_dir / "cells.h5ad")
    print(cells)

    print("4. Judging them on the held-out cells", flush=True)
    split = json.loads((pipeline_path / "split.json").read_text())
    train, test = real[split["train"]], real[split["test"]]
    pipe.set_progress_bar_config(disable=True)
    samples, test = draw_samples(pipe, test, args.num_seeds)
    report = evaluate_cells(samples, train, test, label_key="cell_type")
    (args.output_dir / "metrics.json").write_text(json.dumps(report, indent=1))
    table = to_markdown(report)
    (args.output_dir / "metrics.md").write_text(table)
    print(table)
    card = pipeline_path / "README.md"  # the model card says what was measured
    card.write_text(card.read_text().replace("## Limits", f"## Evaluation\n\n{table}\n## Limits"))

    report_figure(test, samples[0], "cell_type").savefig(args.output_dir / "figure.png", dpi=110)
    print(f"Look at {args.output_dir / 'figure.png'}; the cells are in {args.output_dir / 'cells.h5ad'}.")


if __name__ == "__main__":
    main()
