"""Whether gene programs hold for other cells, and mean something, beside those of NMF, LinearSCVI and DRVI.

    python benchmarks/programs.py --dataset ../shared/data/kang_ifnb_pbmc.h5ad --condition_key condition \
        --output lab/results/programs_cpu.json --num_programs 16

Each method is fitted four times: to two halves of the training cells that share none, and to all of them with two
seeds. Flags that this script does not have are those of the training. Reported are, between the halves and between the
seeds, the mean absolute correlation of loadings (genes weighted as in `ProgramCodec.weighted_loadings`) and of the
activities of held-out cells, of programs that are paired for the highest one; and of the first fit to all training
cells, on held-out cells:

- `types_named`: cell types (with ten held-out cells) that one program tells from all other cells at an AUC of 0.9;
- `marker_overlap`: how many of a type's 50 markers (Wilcoxon, training cells) are among the 50 genes which that
  program raises most, mean over types;
- `condition_aucs`: the best two AUCs with which single programs tell one condition from the other.

`linear_scvi` and `drvi` need `pip install "wbdit_diffusers[benchmark]"`.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc
import torch
from accelerate import PartialState
from scipy.optimize import linear_sum_assignment
from sklearn.decomposition import NMF
from sklearn.metrics import roc_auc_score

from wbdit_diffusers import ScRNAProcessor
from wbdit_diffusers.cli import config_from_args
from wbdit_diffusers.data import CellDataset, CellSplit, drop_empty_cells, encode_cells, read_cells
from wbdit_diffusers.processing import log_normalize
from wbdit_diffusers.training import TrainingConfig
from wbdit_diffusers.training.codec import fit_program_codec


NUM_MARKERS = 50
MIN_TYPE_CELLS = 10
NAMED_AUC = 0.9

# Loadings (genes, programs), weighted; and a function from cells to activities (cells, programs)
Programs = tuple[np.ndarray, Callable[[CellDataset], np.ndarray]]


def wbdit(cells: CellDataset, config: TrainingConfig, seed: int) -> Programs:
    """Stage one of the training."""
    config.seed = seed
    codec = fit_program_codec(config, cells, torch.device("cpu"))
    return codec.weighted_loadings.numpy(), lambda others: codec.activities(encode_cells(others, codec)).numpy()


def nmf(cells: CellDataset, config: TrainingConfig, seed: int) -> Programs:
    """Non-negative matrix factorisation of log1p(CP10k)."""
    model = NMF(config.num_programs, init="nndsvda", random_state=seed, max_iter=1000)
    model.fit(log_normalize(cells.matrix, cells.library_size))
    return model.components_.T, lambda others: model.transform(log_normalize(others.matrix, others.library_size))


def linear_scvi(cells: CellDataset, config: TrainingConfig, seed: int) -> Programs:
    """scVI with a linear decoder (Svensson et al. 2020)."""
    import scvi

    scvi.settings.seed = seed
    scvi.settings.verbosity = 30

    def as_anndata(dataset: CellDataset) -> ad.AnnData:
        return ad.AnnData(dataset.matrix.astype(np.float32))

    modelled = as_anndata(cells)
    scvi.model.LinearSCVI.setup_anndata(modelled)
    model = scvi.model.LinearSCVI(modelled, n_latent=config.num_programs)
    model.train(accelerator="cpu", max_epochs=10_000, early_stopping=True, enable_progress_bar=False)
    mean = np.asarray(modelled.X.mean(axis=0)).ravel()
    weighted = model.get_loadings().to_numpy() * np.sqrt(mean / (1 + mean))[:, None]
    return weighted, lambda others: model.get_latent_representation(as_anndata(others))


def drvi(cells: CellDataset, config: TrainingConfig, seed: int) -> Programs:
    """DRVI (Moinfar and Theis 2024), whose decoder adds up what each latent does. A latent has an effect on a gene in
    both directions; their difference stands for the loading."""
    import scvi
    from drvi.model import DRVI

    scvi.settings.seed = seed
    scvi.settings.verbosity = 40

    def as_anndata(dataset: CellDataset) -> ad.AnnData:
        return ad.AnnData(dataset.matrix.astype(np.float32))

    modelled = as_anndata(cells)
    DRVI.setup_anndata(modelled, is_count_data=True)
    model = DRVI(modelled, n_latent=config.num_programs)
    model.train(accelerator="cpu", max_epochs=200, early_stopping=True, enable_progress_bar=False)
    latents = ad.AnnData(model.get_latent_representation(modelled))
    model.set_latent_dimension_stats(latents)
    effects = model.calculate_interpretability_scores(latents, methods="OOD", inplace=False)
    loadings = (effects["OOD_combined_positive"] - effects["OOD_combined_negative"]).T
    return loadings, lambda others: model.get_latent_representation(as_anndata(others))


METHODS = {"wbdit": wbdit, "nmf": nmf, "linear_scvi": linear_scvi, "drvi": drvi}


def paired_correlation(some: np.ndarray, others: np.ndarray) -> float:
    """Mean absolute correlation of the columns of two matrices, paired one to one for the highest sum."""
    with np.errstate(invalid="ignore"):
        correlation = np.abs(np.corrcoef(some.T, others.T)[: some.shape[1], some.shape[1] :])
    correlation = np.nan_to_num(correlation)  # a program that does nothing correlates with none
    return float(correlation[linear_sum_assignment(-correlation)].mean())


def aucs_of(activities: np.ndarray, is_one: np.ndarray) -> np.ndarray:
    """How well each program tells some cells from the others, whatever its sign: `(programs,)`."""
    aucs = np.array([roc_auc_score(is_one, column) for column in activities.T])
    return np.maximum(aucs, 1 - aucs)


def markers_of(train: ad.AnnData, genes: np.ndarray, label_key: str, layer: str | None) -> dict[str, list[str]]:
    """The modelled genes that Scanpy's Wilcoxon test ranks first for each cell type."""
    cells = ad.AnnData((train.X if layer is None else train.layers[layer]).copy(), obs=train.obs, var=train.var)
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


def measure(adata: ad.AnnData, method: str, config: TrainingConfig, label_key: str, condition_key: str | None) -> dict:
    """All that is reported of one method."""
    train, test = CellSplit.draw(adata, config.test_fraction, label_key).apply(adata)
    processor = ScRNAProcessor(layer=config.layer, num_genes=config.num_genes or None).fit(train)
    parts = CellSplit.draw(train, 0.5, label_key).apply(train)
    halves = [CellDataset(part, processor, with_labels=False) for part in parts]
    everything, held_out = (CellDataset(cells, processor, with_labels=False) for cells in (train, test))
    start = time.monotonic()
    fits = {
        "halves": [METHODS[method](half, config, seed=0) for half in halves],
        "seeds": [METHODS[method](everything, config, seed=seed) for seed in (0, 1)],
    }
    result = {"method": method, "seconds": round(time.monotonic() - start)}
    for name, pair in fits.items():
        (loadings, encode), (other_loadings, other_encode) = pair
        result[f"{name}_loadings"] = paired_correlation(loadings, other_loadings)
        result[f"{name}_activities"] = paired_correlation(encode(held_out), other_encode(held_out))

    loadings, encode = fits["seeds"][0]
    activities, genes = encode(held_out), processor.var_names.to_numpy()
    labels, overlaps, named = test.obs[label_key].astype(str).to_numpy(), [], 0
    for label, markers in markers_of(train, genes, label_key, config.layer).items():
        is_one = labels == label
        if is_one.sum() < MIN_TYPE_CELLS:
            continue
        aucs = aucs_of(activities, is_one)
        best = int(aucs.argmax())
        named += aucs[best] >= NAMED_AUC
        # The sign of a program is that in which the type has more of it.
        sign = np.sign(activities[is_one, best].mean() - activities[~is_one, best].mean())
        raised = genes[np.argsort(-sign * loadings[:, best])[:NUM_MARKERS]]
        overlaps.append(len(set(raised) & set(markers)))
    result |= {"num_types": len(overlaps), "types_named": int(named), "marker_overlap": float(np.mean(overlaps))}
    if condition_key is not None:
        conditions = test.obs[condition_key].astype(str).to_numpy()
        result["condition_aucs"] = np.sort(aucs_of(activities, conditions == conditions[0]))[::-1][:2].tolist()
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=["wbdit", "nmf"])
    parser.add_argument("--label_key", default="cell_type")
    parser.add_argument("--condition_key", help="Column of obs with two conditions, such as control and stimulated.")
    parser.add_argument("--output", type=Path, required=True, help="JSON list; results are appended to it.")
    args, train_flags = parser.parse_known_args()
    PartialState(cpu=True)  # the training's log asks for it
    for path in args.dataset:
        adata = drop_empty_cells(read_cells(path))
        for method in args.methods:
            config = config_from_args(["train", *train_flags, "--dataset", str(path), "--output_dir", "."])
            if config.num_programs is None:
                parser.error("Give --num_programs: all methods are compared with as many.")
            result = {
                "dataset": path.stem,
                "num_programs": config.num_programs,
                **measure(adata, method, config, args.label_key, args.condition_key),
            }
            results = json.loads(args.output.read_text()) if args.output.exists() else []
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps([*results, result], indent=1))
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
