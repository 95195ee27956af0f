"""Moves all cells to one condition, as to one batch, and scores the mixing with scib-metrics before and after.

    pip install scib-metrics
    python benchmarks/batches.py --dataset ../shared/data/kang_ifnb_pbmc.h5ad --work_dir WORK --run kang \\
        --output lab/results/batches_cpu.json
    python benchmarks/batches.py --table lab/results/batches_cpu.json

`--run` is a training with the label keys `cell_type` and `condition`; it is trained if it does not exist. Scores are
those of cells that the training held out, in 30 principal components of log1p(CP10k): iLISI and graph connectivity for
mixing, cLISI and the silhouette of the type for what must stay. "Other half" is the ideal: the control cells, divided
in two at random.
"""

import anndata as ad
import numpy as np
import torch
from common import add_rows, load_run, make_parser, markdown, mean_sd, parse, read_results
from sklearn.decomposition import PCA

from wbdit_diffusers import ScRNAToScRNAPipeline
from wbdit_diffusers.processing.normalize import log_normalize
from wbdit_diffusers.training import TrainingConfig, train


SCORES = ("iLISI", "graph connectivity", "cLISI", "silhouette of types")


def score(cells: ad.AnnData, batch: np.ndarray) -> dict[str, float]:
    """How well batches mix, and whether types stay apart. 1 is best."""
    from scib_metrics import clisi_knn, graph_connectivity, ilisi_knn, silhouette_label
    from scib_metrics.nearest_neighbors import pynndescent

    expression = log_normalize(cells.X, np.asarray(cells.X.sum(axis=1)).ravel()).toarray()
    points, types = PCA(30, random_state=0).fit_transform(expression), cells.obs["cell_type"].astype(str).to_numpy()
    neighbors = pynndescent(points, n_neighbors=min(90, len(points) - 1), random_state=0)
    values = ilisi_knn(neighbors, batch), graph_connectivity(neighbors, types), clisi_knn(neighbors, types)
    return dict(zip(SCORES, map(float, (*values, silhouette_label(points, types)))))


def table(results: list[dict]) -> str:
    names = list(dict.fromkeys(row["cells"] for row in results))
    rows = [
        [name, *(mean_sd([row[key] for row in results if row["cells"] == name]) for key in SCORES)] for name in names
    ]
    return markdown(["held-out cells", *SCORES], rows)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--run", default="kang", help="Name of the training in the work folder.")
    parser.add_argument("--control", default="CTRL", help="Condition to which all cells are moved.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Seeds of the drawn counts.")
    args = parse(parser, table)
    folder = args.work_dir / args.run
    if not (folder / "model_index.json").exists():
        settings = {"label_keys": ["cell_type", "condition"], "num_genes": 2000}
        train(args.dataset[0], TrainingConfig(output_dir=folder, **settings))
    pipe, _, cells = load_run(folder, args.dataset[0])
    translate = ScRNAToScRNAPipeline(**pipe.components)
    translate.set_progress_bar_config(disable=True)
    cells = cells[:, pipe.processor.var_names].copy()
    is_control = (cells.obs["condition"] == args.control).to_numpy()
    control, other = cells[is_control].copy(), cells[~is_control].copy()
    rows = []
    for seed in args.seeds:
        generator = torch.Generator().manual_seed(seed)
        moved = translate(other, conditions={"condition": args.control}, generator=generator).cells
        halves = np.random.default_rng(seed).integers(2, size=control.n_obs)
        kinds = {
            "before": (ad.concat([control, other]), np.repeat([0, 1], [control.n_obs, other.n_obs])),
            "after": (ad.concat([control, moved]), np.repeat([0, 1], [control.n_obs, moved.n_obs])),
            "other half": (control, halves),
        }
        rows += [{"cells": name, "seed": seed} | score(*both) for name, both in kinds.items()]
    add_rows(args.output, rows)
    print(table(read_results(args.output, [])))


if __name__ == "__main__":
    main()
