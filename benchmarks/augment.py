"""Measures whether generated cells help when a cell type has few cells: does a classifier find the type afterwards?

    python benchmarks/augment.py --dataset ../shared/data/{pbmc3k,zheng_facs_pbmc,kang_ifnb_pbmc}.h5ad \\
        ../shared/data/{pancreas_endocrinogenesis,paul15,pollen_smartseq}.h5ad --work_dir WORK \\
        --output lab/results/augment_cpu.json --scvi WORK/scvi
    python benchmarks/augment.py --table lab/results/augment_cpu.json

30 % of the cells are held out, within each type. One type, the `--rank` in size among those with 60 training and 20
held-out cells, keeps `--numbers` training cells. (Without such a type, it is the largest or the second largest.) Each
row adds cells of the type until it is as large as the median type, and at least twice as large as before. `--seeds`
choose the kept cells, and are those of trainings. Pipelines in the work folder are reused. `--scvi` is a folder for an
environment with scvi-tools, which the first call makes. Without it there are no rows of scVI.

Two classifiers learn all types from log1p(CP10k) of the 2,000 most variable genes of the kept cells: a logistic
regression on 50 principal components, and a random forest. The table has the F1 of the type in the held-out cells, the
mean F1 of all types, and the fraction of the 50 marker genes of all training cells that are found.
"""

import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scanpy as sc
import torch
from common import add_rows, drop_empty_cells, environment, make_parser, markdown, parse, read_results
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.data import CellSplit
from wbdit_diffusers.interpretation.interventions import with_denoiser
from wbdit_diffusers.processing.genes import most_variable
from wbdit_diffusers.processing.normalize import log_normalize
from wbdit_diffusers.training import TrainingConfig, train


KEY, NUM_GENES, NUM_MARKERS, NEIGHBORS = "cell_type", 2000, 50, 5
MIN_TRAIN, MIN_TEST = 60, 20
BASELINES = ["nothing", "class weights", "duplicates", "SMOTE"]
SCVI_ROWS = ["scVI, posterior", "scVI, gaussian"]
OURS = ["generated cells", "generated cells, closed form", "closed form and class weights"]
# A shorter training than by default, for a busy core
SHORT = {"num_programs": 16, "codec_max_steps": 300, "decoder_steps": 200}
METRICS = {"F1": ["f1_logistic", "f1_forest"], "mean F1": ["macro_logistic", "macro_forest"], "markers": ["markers"]}
PACKAGES = ["torch==2.13.0", "scvi-tools==1.4.2"]
# Draws cells from the posteriors of the type's cells, and from a Gaussian of their latents
SCVI = """
import sys, anndata as ad, numpy as np, scvi, torch
path, cell_type, number, seed, output = sys.argv[1:]
number, scvi.settings.seed, rng = int(number), int(seed), np.random.default_rng(int(seed))
torch.set_num_threads(1)
cells = ad.read_h5ad(path)
cells.X = cells.X.toarray()  # Its loader is slow with sparse rows.
scvi.model.SCVI.setup_anndata(cells, labels_key="cell_type")
model = scvi.model.SCVI(cells, gene_likelihood="nb")
model.train(100, batch_size=min(256, len(cells) // 4), accelerator="cpu", enable_progress_bar=False)
own = np.flatnonzero(cells.obs["cell_type"] == cell_type)
mean, variance = model.get_latent_representation(indices=own, return_dist=True)
origin = rng.integers(len(own), size=number)
normal = rng.normal(size=(number, mean.shape[1]))
gaussian = rng.multivariate_normal(mean.mean(0), np.cov(mean.T) + np.diag(variance.mean(0)), size=number)
latents = {"posterior": mean[origin] + np.sqrt(variance[origin]) * normal, "gaussian": gaussian}
library, drawn = torch.tensor(np.asarray(cells.X.sum(1)).ravel()[own[origin]]).float().log()[:, None], {}
model.module.eval()
for name, values in latents.items():
    with torch.no_grad():
        made = model.module.generative(torch.tensor(values).float(), library, torch.zeros(number, 1))
    drawn[name] = made["px"].sample().numpy()
np.savez(output, origin=origin, **drawn)
"""


def choose_type(labels: np.ndarray, is_test: np.ndarray, rank: str) -> str:
    """The type of median size or the smallest one, of those with enough cells."""
    sizes = {name: ((labels == name) & ~is_test).sum() for name in sorted(set(labels))}
    names = sorted(sizes, key=sizes.get)
    enough = [n for n in names if sizes[n] >= MIN_TRAIN and ((labels == n) & is_test).sum() >= MIN_TEST]
    if enough:
        return enough[(len(enough) - 1) // 2 if rank == "median" else 0]
    return names[-1 if rank == "median" else -2]


def expression_of(cells: ad.AnnData, genes: Any) -> np.ndarray:
    """log1p(CP10k) of genes, `(cells, genes)`."""
    has_size = "library_size" in cells.obs  # of generated cells, over the genes that were not generated too
    sizes = cells.obs["library_size"].to_numpy() if has_size else np.asarray(cells.X.sum(axis=1)).ravel()
    return log_normalize(cells[:, genes].X.toarray(), sizes)


def smote(own: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """Points between cells and their nearest neighbours of the same type."""
    nearest = np.argsort(cdist(own, own), axis=1)[:, 1 : NEIGHBORS + 1]
    first = rng.integers(len(own), size=number)
    second = nearest[first, rng.integers(nearest.shape[1], size=number)]
    return own[first] + rng.random((number, 1), dtype=np.float32) * (own[second] - own[first])


def scvi_cells(args: Any, cut: ad.AnnData, genes: Any, cell_type: str, number: int, seed: int, folder: Path) -> dict:
    """Cells that scVI draws, on the log scale, by row."""
    output, cells, python = folder.with_suffix(".npz"), folder.with_suffix(".h5ad"), environment(PACKAGES, args.scvi)
    if not output.exists():
        cut[:, genes].copy().write_h5ad(cells)
        subprocess.run([python, "-c", SCVI, cells, cell_type, str(number), str(seed), output], check=True)
    drawn = np.load(output)
    sizes = np.asarray(cut[cut.obs[KEY] == cell_type].X.sum(axis=1)).ravel()[drawn["origin"]]
    return {row: log_normalize(drawn[row.split()[1]], sizes) for row in SCVI_ROWS}


def trained_pipeline(args: Any, cut: ad.AnnData, cell_type: str, seed: int, folder: Path) -> ScRNAGenerationPipeline:
    """The pipeline of the kept cells. Ten cells of other types are held out for its log, and none of the type."""
    if not (folder / "model_index.json").exists():
        others = cut.obs_names[cut.obs[KEY] != cell_type]
        test = np.random.default_rng(seed).choice(others, 10, replace=False).tolist()
        split = folder.with_suffix(".split")
        split.mkdir(parents=True, exist_ok=True)
        CellSplit([name for name in cut.obs_names if name not in set(test)], test).save(split)
        settings = {"label_keys": [KEY], "num_genes": NUM_GENES, "seed": seed, "split": split / CellSplit.FILE_NAME}
        steps = 1 if args.closed_form else 300
        settings |= {"max_train_steps": steps, "overwrite_output_dir": folder.exists()}
        train(cut, TrainingConfig(output_dir=folder, **SHORT, **settings))
    pipe = ScRNAGenerationPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def markers(expression: np.ndarray, labels: np.ndarray, cell_type: str) -> set:
    """The genes that distinguish a type from all others, by Wilcoxon's test."""
    cells = ad.AnnData(expression, obs={"of_type": np.where(labels == cell_type, "yes", "no")})
    sc.tl.rank_genes_groups(cells, "of_type", groups=["yes"], method="wilcoxon", n_genes=NUM_MARKERS)
    return set(cells.uns["rank_genes_groups"]["names"]["yes"])


def judge(train_cells: tuple, test_cells: tuple, cell_type: str, weight: str | None, seed: int) -> dict[str, float]:
    """F1 of the type and mean F1 of all types, of two classifiers. Cells are expression and labels."""
    reduce = StandardScaler(), PCA(50, svd_solver="randomized", random_state=seed)
    classifiers = {
        "logistic": make_pipeline(*reduce, LogisticRegression(max_iter=1000, class_weight=weight)),
        "forest": RandomForestClassifier(100, class_weight=weight, random_state=seed),
    }
    names, codes = np.unique(train_cells[1], return_inverse=True)
    results, truth, code = {}, np.searchsorted(names, test_cells[1]), np.searchsorted(names, cell_type)
    for name, classifier in classifiers.items():
        guess = classifier.fit(train_cells[0], codes).predict(test_cells[0])
        results[f"f1_{name}"] = float(f1_score(truth == code, guess == code))
        results[f"macro_{name}"] = float(f1_score(truth, guess, average="macro"))
    return results


def measure(args: Any, path: Path, number: int, seed: int, names: list[str]) -> list[dict]:
    """Cuts a type to a number of cells, adds cells in the ways that are named, and judges them."""
    cells = drop_empty_cells(ad.read_h5ad(path))
    cells = cells[cells.obs[KEY] != "unlabelled"].copy()
    cells.obs = cells.obs[[KEY]].astype(str)
    labels, rng = cells.obs[KEY].to_numpy(), np.random.default_rng(seed)
    is_test = cells.obs_names.isin(CellSplit.draw(cells, 0.3, KEY, seed=0).test)
    cell_type = choose_type(labels, is_test, args.rank)
    own, kept = np.flatnonzero((labels == cell_type) & ~is_test), ~is_test
    if number >= len(own):
        return []
    kept[np.setdiff1d(own, rng.choice(own, number, replace=False))] = False
    cut = cells[kept].copy()
    added = int(max(cut.obs[KEY].value_counts().median(), 2 * number)) - number
    folder = args.work_dir / f"{path.stem}_{cell_type}_{number}_{seed}".replace(" ", "_").replace("/", "_")
    pipe = trained_pipeline(args, cut, cell_type, seed, folder.with_name(folder.name + "_short" * args.closed_form))
    genes = cut.var_names[most_variable(log_normalize(cut.X, np.asarray(cut.X.sum(axis=1)).ravel()), NUM_GENES)]
    genes = genes[genes.isin(pipe.processor.var_names)]
    expression, codes = expression_of(cut, genes), cut.obs[KEY].to_numpy()
    few, none = expression[codes == cell_type], expression[:0]
    rows = {"nothing": none, "class weights": none, "duplicates": few[rng.integers(number, size=added)]}
    rows["SMOTE"] = smote(few, added, rng)
    if set(names) & set(SCVI_ROWS):
        rows |= scvi_cells(args, cut, genes, cell_type, added, seed, folder)
    for row, one in zip(OURS, (pipe, with_denoiser(pipe, pipe.gaussian_mixture))):
        made = one(added, cell_types=cell_type, generator=torch.Generator().manual_seed(seed)).cells
        rows[row] = expression_of(made, genes)
    rows[OURS[2]] = rows[OURS[1]]
    wanted = markers(expression_of(cells[~is_test], genes), labels[~is_test], cell_type)
    facts = {"dataset": path.stem, "cell_type": cell_type, "rank": args.rank, "number": number, "seed": seed}
    test_cells, results = (expression_of(cells[is_test], genes), labels[is_test]), []
    for row in names:
        extra = rows[row]
        train_cells = np.concatenate([expression, extra]), np.append(codes, np.full(len(extra), cell_type, object))
        found = len(wanted & markers(*train_cells, cell_type)) / NUM_MARKERS
        scores = judge(train_cells, test_cells, cell_type, "balanced" if "weights" in row else None, seed)
        results.append(facts | {"row": row, "added": len(extra), "markers": found} | scores)
    return results


def table(results: list[dict]) -> str:
    """Means over classifiers and seeds."""
    names, lines = list(dict.fromkeys(row["row"] for row in results)), []
    for group in dict.fromkeys((row["dataset"], row["cell_type"], row["number"]) for row in results):
        own = [row for row in results if (row["dataset"], row["cell_type"], row["number"]) == group]
        for title, keys in METRICS.items():
            values = {name: [row[key] for row in own if row["row"] == name for key in keys] for name in names}
            seeds = str(len({row["seed"] for row in own}))
            texts = [f"{np.mean(some):.3f}" if some else "–" for some in values.values()]
            lines.append([*map(str, group), seeds, title, *texts])
    return markdown(["dataset", "type", "cells", "seeds", "metric", *names], lines)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--rank", default="median", choices=["median", "smallest"], help="Which type is cut.")
    parser.add_argument("--numbers", nargs="+", type=int, default=[10, 20, 50], help="Training cells that are kept.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--scvi", type=Path, help="Folder of an environment with scvi-tools.")
    parser.add_argument("--closed_form", action="store_true", help="Train no network: only its closed form generates.")
    args = parse(parser, table)
    rows = [*BASELINES, *(SCVI_ROWS if args.scvi else []), *(OURS[1:] if args.closed_form else OURS)]
    keys = "dataset", "rank", "number", "seed"
    for seed, number, path in product(args.seeds, args.numbers, args.dataset):
        setting = (path.stem, args.rank, number, seed)
        results = read_results(args.output, [])
        done = {row["row"] for row in results if tuple(row[key] for key in keys) == setting}
        if names := [row for row in rows if row not in done]:
            add_rows(args.output, measure(args, path, number, seed, names))
    print(table(read_results(args.output, [])))


if __name__ == "__main__":
    main()
