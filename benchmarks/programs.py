"""Compares gene programs with those of NMF, LinearSCVI and DRVI: are they stable, and do they mean something?

    python benchmarks/programs.py --dataset ../shared/data/kang_ifnb_pbmc.h5ad --condition_key condition \
        --output lab/results/programs_cpu.json --num_programs 16

Each method is fitted four times: to two disjoint halves of the training cells, and to all of them with two seeds. The
programs of two fits are paired for the highest correlation. Reported are the mean absolute correlations between halves
and between seeds, of loadings (weighted as in `ProgramCodec.weighted_loadings`) and of the activities of held-out
cells. The first fit to all training cells is also judged on held-out cells:

- `types_named`: cell types (with at least ten held-out cells) that one program separates from all others (AUC ≥ 0.9);
- `marker_overlap`: number of a type's 50 markers (Wilcoxon, training cells) among the 50 genes that this program
  raises most, mean over types;
- `condition_aucs`: the two highest AUCs with which single programs separate the conditions.

`linear_scvi` and `drvi` need `pip install "wbdit_diffusers[benchmark]"`.
"""

import argparse
import time
from collections.abc import Callable

import anndata as ad
import numpy as np
import scanpy as sc
import torch
from accelerate import PartialState
from common import add_rows, drop_empty_cells, make_parser, markdown, parse
from scipy.optimize import linear_sum_assignment
from sklearn.decomposition import NMF
from sklearn.metrics import roc_auc_score

from wbdit_diffusers import ScRNAProcessor
from wbdit_diffusers.data import CellDataset, CellSplit, encode_cells, read_cells
from wbdit_diffusers.processing import log_normalize
from wbdit_diffusers.training import TrainingConfig
from wbdit_diffusers.training.codec import fit_program_codec


NUM_MARKERS = 50
MIN_TYPE_CELLS = 10
NAMED_AUC = 0.9

# Loadings (genes, programs), weighted; and a function from cells to activities (cells, programs)
Programs = tuple[np.ndarray, Callable[[CellDataset], np.ndarray]]


def wbdit(cells: CellDataset, num_programs: int, seed: int) -> Programs:
    """Stage one of the training."""
    codec = fit_program_codec(
        TrainingConfig(output_dir=".", num_programs=num_programs, seed=seed), cells, torch.device("cpu")
    )
    return codec.weighted_loadings.numpy(), lambda others: codec.activities(encode_cells(others, codec)).numpy()


def nmf(cells: CellDataset, num_programs: int, seed: int) -> Programs:
    """Non-negative matrix factorisation of log1p(CP10k)."""
    model = NMF(num_programs, init="nndsvda", random_state=seed, max_iter=1000)
    model.fit(log_normalize(cells.matrix, cells.library_size))
    return model.components_.T, lambda others: model.transform(log_normalize(others.matrix, others.library_size))


def linear_scvi(cells: CellDataset, num_programs: int, seed: int) -> Programs:
    """scVI with a linear decoder (Svensson et al. 2020)."""
    import scvi

    modelled = _scvi_cells(cells, seed)
    scvi.model.LinearSCVI.setup_anndata(modelled)
    model = scvi.model.LinearSCVI(modelled, n_latent=num_programs)
    model.train(accelerator="cpu", max_epochs=10_000, early_stopping=True, enable_progress_bar=False)
    mean = np.asarray(modelled.X.mean(axis=0)).ravel()
    weighted = model.get_loadings().to_numpy() * np.sqrt(mean / (1 + mean))[:, None]
    return weighted, lambda others: model.get_latent_representation(_scvi_cells(others, seed))


def drvi(cells: CellDataset, num_programs: int, seed: int) -> Programs:
    """
    DRVI (Moinfar and Theis 2024), whose decoder adds the effects of the latents. The loading is the difference between
    the effects of a latent in its two directions.
    """
    from drvi.model import DRVI

    modelled = _scvi_cells(cells, seed)
    DRVI.setup_anndata(modelled, is_count_data=True)
    model = DRVI(modelled, n_latent=num_programs)
    model.train(accelerator="cpu", max_epochs=200, early_stopping=True, enable_progress_bar=False)
    latents = ad.AnnData(model.get_latent_representation(modelled))
    model.set_latent_dimension_stats(latents)
    effects = model.calculate_interpretability_scores(latents, methods="OOD", inplace=False)
    loadings = (effects["OOD_combined_positive"] - effects["OOD_combined_negative"]).T
    return loadings, lambda others: model.get_latent_representation(_scvi_cells(others, seed))


def _scvi_cells(dataset: CellDataset, seed: int) -> ad.AnnData:
    """The counts as scvi-tools takes them. Sets its seed."""
    import scvi

    scvi.settings.seed, scvi.settings.verbosity = seed, 40
    return ad.AnnData(dataset.matrix.astype(np.float32))


METHODS = {"wbdit": wbdit, "nmf": nmf, "linear_scvi": linear_scvi, "drvi": drvi}


def paired_correlation(some: np.ndarray, others: np.ndarray) -> float:
    """Mean absolute correlation of the columns of two matrices, paired for the highest sum."""
    with np.errstate(invalid="ignore"):
        correlation = np.abs(np.corrcoef(some.T, others.T)[: some.shape[1], some.shape[1] :])
    correlation = np.nan_to_num(correlation)  # a constant program correlates with none
    return float(correlation[linear_sum_assignment(-correlation)].mean())


def aucs_of(activities: np.ndarray, is_one: np.ndarray) -> np.ndarray:
    """AUC with which each program separates some cells from the others, regardless of its sign, `(programs,)`."""
    aucs = np.array([roc_auc_score(is_one, column) for column in activities.T])
    return np.maximum(aucs, 1 - aucs)


def markers_of(train: ad.AnnData, genes: np.ndarray, label_key: str) -> dict[str, list[str]]:
    """The modelled genes that Scanpy's Wilcoxon test ranks highest for each cell type."""
    cells = ad.AnnData(train.X.copy(), obs=train.obs, var=train.var)
    cells.obs[label_key] = cells.obs[label_key].astype(str).astype("category")
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    cells = cells[:, genes].copy()
    enough = cells.obs[label_key].value_counts()
    sc.tl.rank_genes_groups(
        cells, label_key, method="wilcoxon", groups=sorted(enough[enough >= MIN_TYPE_CELLS].index), n_genes=NUM_MARKERS
    )
    names = cells.uns["rank_genes_groups"]["names"]
    return {label: names[label].tolist() for label in names.dtype.names}


def measure(adata: ad.AnnData, method: str, args: argparse.Namespace) -> dict:
    """The results of one method."""
    label_key = args.label_key
    train, test = CellSplit.draw(adata, label_key=label_key).apply(adata)
    processor = ScRNAProcessor().fit(train)
    parts = CellSplit.draw(train, 0.5, label_key).apply(train)
    halves = [CellDataset(part, processor, with_labels=False) for part in parts]
    everything, held_out = (CellDataset(cells, processor, with_labels=False) for cells in (train, test))
    start = time.monotonic()
    fits = {
        "halves": [METHODS[method](half, args.num_programs, seed=0) for half in halves],
        "seeds": [METHODS[method](everything, args.num_programs, seed=seed) for seed in (0, 1)],
    }
    result = {"method": method, "seconds": round(time.monotonic() - start)}
    for name, pair in fits.items():
        (loadings, encode), (other_loadings, other_encode) = pair
        result[f"{name}_loadings"] = paired_correlation(loadings, other_loadings)
        result[f"{name}_activities"] = paired_correlation(encode(held_out), other_encode(held_out))

    loadings, encode = fits["seeds"][0]
    activities, genes = encode(held_out), processor.var_names.to_numpy()
    labels, overlaps, named = test.obs[label_key].astype(str).to_numpy(), [], 0
    for label, markers in markers_of(train, genes, label_key).items():
        is_one = labels == label
        if is_one.sum() < MIN_TYPE_CELLS:
            continue
        aucs = aucs_of(activities, is_one)
        best = int(aucs.argmax())
        named += aucs[best] >= NAMED_AUC
        sign = np.sign(activities[is_one, best].mean() - activities[~is_one, best].mean())  # the type has more of it
        raised = genes[np.argsort(-sign * loadings[:, best])[:NUM_MARKERS]]
        overlaps.append(len(set(raised) & set(markers)))
    result |= {"num_types": len(overlaps), "types_named": int(named), "marker_overlap": float(np.mean(overlaps))}
    if args.condition_key is not None:
        conditions = test.obs[args.condition_key].astype(str).to_numpy()
        result["condition_aucs"] = np.sort(aucs_of(activities, conditions == conditions[0]))[::-1][:2].tolist()
    return result


def table(rows: list[dict]) -> str:
    numbers = [key for key in rows[0] if key not in ("dataset", "method", "condition_aucs")]
    lines = [[row["dataset"], row["method"], *(f"{row[key]:.3g}" for key in numbers)] for row in rows]
    return markdown(["dataset", "method", *numbers], lines)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=["wbdit", "nmf"])
    parser.add_argument("--num_programs", type=int, default=16, help="Number of programs of each method.")
    parser.add_argument("--label_key", default="cell_type")
    parser.add_argument("--condition_key", help="Column of obs with two conditions, such as control and stimulated.")
    args = parse(parser, table, needs_work_dir=False)
    PartialState(cpu=True)  # the training's log needs it
    for path in args.dataset:
        adata = drop_empty_cells(read_cells(path))
        same = {"dataset": path.stem, "num_programs": args.num_programs}
        rows = add_rows(args.output, (same | measure(adata, method, args) for method in args.methods))
    print(table(rows))


if __name__ == "__main__":
    main()
