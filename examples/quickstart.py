"""From real cells to generated ones, in under 8 minutes on two cores.

    python examples/quickstart.py --output_dir demo

700 PBMCs (Scanpy's `pbmc68k_reduced`) are split; a small White-Box DiT is trained on four fifths of them by
training/train.py; the pipeline is loaded back and generates 5,000 cells. The output folder then holds

    cells.h5ad      the generated cells: integer counts, gene names, cell types
    figure.png      a t-SNE of generated cells beside real ones
    metrics.md      how real they are, beside what real cells themselves reach
    wbdit-pbmc/     the pipeline, for `ScRNAGenerationPipeline.from_pretrained`
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import anndata as ad
import matplotlib
import numpy as np
import scanpy as sc
import torch
from scipy import sparse
from sklearn.manifold import TSNE

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.evaluation.report import evaluate, log_normalise, to_markdown


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


TRAIN_SCRIPT = Path(__file__).parents[1] / "training" / "train.py"
CONFIG = TRAIN_SCRIPT.parent / "configs" / "quickstart.yaml"


def load_pbmc() -> ad.AnnData:
    """700 PBMCs × 765 genes with counts: `raw.X` is log1p(count / n_counts × 10,000)."""
    reduced = sc.datasets.pbmc68k_reduced()
    counts = np.rint(np.expm1(reduced.raw.X.toarray()) * reduced.obs["n_counts"].to_numpy()[:, None] / 1e4)
    return ad.AnnData(
        sparse.csr_matrix(counts.astype(np.float32)),
        obs=reduced.obs[["bulk_labels"]].rename(columns={"bulk_labels": "cell_type"}),
        var=reduced.raw.var[[]],
    )


def plot(real: ad.AnnData, generated: ad.AnnData, path: Path):
    """A joint t-SNE: real and generated cells over each other, then each coloured by cell type."""
    x = np.vstack([log_normalise(real), log_normalise(generated)])
    joint = ad.AnnData(x)
    sc.pp.pca(joint, n_comps=30)
    points = TSNE(random_state=0).fit_transform(joint.obsm["X_pca"])
    is_real = np.arange(len(points)) < real.n_obs

    figure, axes = plt.subplots(1, 3, figsize=(16, 5.2), layout="constrained")
    for name, cells, colour in (("generated", ~is_real, "tab:orange"), ("real", is_real, "tab:blue")):
        axes[0].scatter(*points[cells].T, s=6, color=colour, label=f"{name} ({cells.sum()})", linewidths=0)
    axes[0].set_title("real and generated cells")
    axes[0].legend(loc="lower left", markerscale=2, frameon=False)
    cell_types = real.obs["cell_type"].value_counts().index
    for axis, cells, adata, name in ((axes[1], is_real, real, "real"), (axes[2], ~is_real, generated, "generated")):
        for i, cell_type in enumerate(cell_types):
            of_type = (adata.obs["cell_type"] == cell_type).to_numpy()
            axis.scatter(*points[cells][of_type].T, s=6, color=f"C{i}", label=cell_type, linewidths=0)
        axis.set_title(f"{name} cells by type")
    axes[2].legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2, frameon=False)
    for axis in axes:
        axis.set(xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
    results = evaluate(pipe, train, test, args.num_seeds)
    (args.output_dir / "metrics.json").write_text(json.dumps(results, indent=1))
    table = to_markdown(results, test.n_obs)
    (args.output_dir / "metrics.md").write_text(table)
    print(table)
    card = pipeline_path / "README.md"  # the model card says what was measured
    card.write_text(card.read_text().replace("## Limits", f"## Evaluation\n\n{table}\n## Limits"))

    plot(real, cells[: 2 * real.n_obs], args.output_dir / "figure.png")
    print(f"Look at {args.output_dir / 'figure.png'}; the cells are in {args.output_dir / 'cells.h5ad'}.")


if __name__ == "__main__":
    main()
