"""Generators judged on held-out cells, next to real cells and baselines that are judged in the same way."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from tqdm.auto import tqdm

from . import metrics
from .cells import CellArrays, combined_labels, generated_cells, needs_common_genes, real_cells
from .classifiers import JUDGES, judge
from .references import draw_matching, split_halves
from .samples import draw_baselines, draw_samples
from .table import GENERATED, REFERENCE


def evaluate(
    pipe: Any,
    train: ad.AnnData,
    test: ad.AnnData,
    num_samples: int = 3,
    seed: int = 0,
    baselines: bool = True,
    donor_key: str | None = None,
    parity: bool = False,
    **call_kwargs,
) -> dict:
    """
    Judges a pipeline over the genes that it models: [`draw_samples`], [`draw_baselines`], [`evaluate_cells`].

    Args:
        pipe ([`ScRNAGenerationPipeline`]): The pipeline to judge.
        train, test (`AnnData`): Its training cells and the held-out cells, with all their genes.
        num_samples (`int`, defaults to 3): Number of samples, and of draws of the real reference.
        seed (`int`, defaults to 0): Seed of the first sample and of the judging.
        baselines (`bool`, defaults to `True`): Whether to judge [`draw_baselines`] as well.
        donor_key, parity: As in [`evaluate_cells`], which describes the returned `dict` and the errors.
        call_kwargs: Further arguments of [`draw_samples`] and of the pipeline's call, e.g. `num_inference_steps`.
    """
    samples, test = draw_samples(pipe, test, num_samples, seed, **call_kwargs)
    config = pipe.processor.config
    return evaluate_cells(
        samples,
        train,
        test,
        label_key=list(config.label_keys),
        layer=config.layer,
        values=config.values,
        baselines=draw_baselines(pipe, train, test, num_samples, seed) if baselines else None,
        donor_key=donor_key,
        parity=parity,
        seed=seed,
    )


def evaluate_cells(
    samples: list[ad.AnnData] | dict[str, list[ad.AnnData]],
    train: ad.AnnData,
    test: ad.AnnData,
    label_key: str | Sequence[str] | None = None,
    layer: str | None = None,
    values: str = "counts",
    baselines: dict[str, list[ad.AnnData]] | None = None,
    donor_key: str | None = None,
    parity: bool = False,
    seed: int = 0,
    n_jobs: int | None = None,
) -> dict:
    """
    Judges the cells of one or several generators on held-out cells, over the genes that all of them make.

    They are compared with the real reference: training cells with the label counts of the held-out cells. Principal
    components and the cell type classifier are fitted on one half of the training cells. The reference is drawn from
    the other half, anew for each sample.

    The library size of a cell counts all of its genes: the sum of its row for real cells, `obs["library_size"]` for
    generated cells. If a generated sample has no such column, or all genes of the real cells, all cells are normalised
    within the judged genes.

    Args:
        samples (`list[AnnData]` or `dict[str, list[AnnData]]`):
            Independent samples of a generator, or of several by name, each with the number and labels of the cells in
            `test`.
        train, test (`AnnData`): Training cells of the generators and held-out cells, with all their genes.
        label_key (`str` or `Sequence[str]`, *optional*):
            Column of `obs` with the cell type, or several, the cell type first. The reference is matched by all of
            them: name every column that the generated cells were conditioned on.
        layer (`str`, *optional*): Layer of `train` and `test` that holds the matrix; `X` by default.
        values (`str`, defaults to `"counts"`): Content of the matrices: `"counts"`, or `"log"` (used unchanged).
        baselines (`dict[str, list[AnnData]]`, *optional*): Further columns, with the number of samples of `samples`.
        donor_key (`str`, *optional*): Column of `obs` of `train` and `test` with the donor.
        parity (`bool`, defaults to `False`): Whether to add the metrics of arXiv 2411.06785, which reward collapse.
        seed (`int`, defaults to 0): Seed of the halves, the reference and the classifiers.
        n_jobs (`int`, *optional*): Threads of the classifiers; all cores by default.

    Returns:
        `dict`: `num_train`, `num_test`, `num_genes`, `num_samples`, `label_key`, `donor_key`, `within_genes`;
        `generators`, their names (`"generated"` for a list); `excess` of each column, see [`excess`]; `metrics`, each
        metric of each column as a list over samples; `per_type`, with `num_train`, `num_test` and `metrics` of each
        cell type that has at least 30 training cells.

    Raises:
        ValueError: If columns differ in cells, genes or samples, gene names repeat, a type does not occur in the real
            cells, or there are too few cells.
    """
    generators = samples if isinstance(samples, dict) else {GENERATED: samples}
    columns = generators | (baselines or {})
    label_keys = [] if label_key is None else [label_key] if isinstance(label_key, str) else list(label_key)
    genes = common_genes(columns, train, test)
    within_genes = any(needs_common_genes(sample, test) for drawn in columns.values() for sample in drawn)
    real_train, real_test = (
        real_cells(adata, genes, values, layer, label_keys, within_genes) for adata in (train, test)
    )
    donors = None if donor_key is None else [combined_labels(adata, [donor_key]) for adata in (train, test)]
    arrays = {
        name: [generated_cells(sample[:, genes], values, label_keys, within_genes) for sample in drawn]
        for name, drawn in columns.items()
    }
    rows, per_type = _Evaluator(real_train, real_test, donors, parity, seed, n_jobs).measure_all(arrays)
    return {
        "num_train": train.n_obs,
        "num_test": test.n_obs,
        "num_genes": len(genes),
        "num_samples": len(next(iter(columns.values()))),
        "label_key": label_keys[0] if label_keys else None,
        "donor_key": donor_key,
        "within_genes": within_genes,
        "generators": list(generators),
        "excess": {name: excess(row, rows[REFERENCE]) for name, row in rows.items() if name != REFERENCE},
        "metrics": rows,
        "per_type": per_type,
    }


def excess(column: dict[str, list[float]], reference: dict[str, list[float]]) -> dict:
    """
    How much more easily a classifier separates generated cells than real training cells from held-out cells.

    Args:
        column, reference (`dict[str, list[float]]`): Metrics of the column and of the real reference, by draw.

    Returns:
        `dict`: `judge` (the classifier with the largest mean difference of AUC), `mean` and `sd` of its differences
        over draws, and `by_judge`, the mean difference of each classifier.
    """
    differences = {name: np.subtract(column[f"auc_{name}"], reference[f"auc_{name}"]) for name in JUDGES}
    by_judge = {name: float(values.mean()) for name, values in differences.items()}
    worst = max(by_judge, key=lambda name: by_judge[name])
    return {"judge": worst, "mean": by_judge[worst], "sd": float(differences[worst].std()), "by_judge": by_judge}


def common_genes(columns: dict[str, list[ad.AnnData]], train: ad.AnnData, test: ad.AnnData) -> pd.Index:
    """The genes of all columns. Raises a `ValueError` if columns do not fit the held-out cells or each other."""
    num_samples = {name: len(samples) for name, samples in columns.items()}
    if len(set(num_samples.values())) > 1:
        raise ValueError(f"Give equally many samples of each generator; there are {num_samples}.")
    named = [(name, sample) for name, samples in columns.items() for sample in samples]
    for name, adata in [("training cells", train), ("held-out cells", test), *named]:
        if not adata.var_names.is_unique:
            gene = adata.var_names[adata.var_names.duplicated()][0]
            raise ValueError(f"{name!r} has the gene {gene!r} more than once: call `adata.var_names_make_unique()`.")
    for name, sample in named:
        if sample.n_obs != test.n_obs:
            raise ValueError(
                f"A sample of {name!r} has {sample.n_obs} cells, and {test.n_obs} are held out: generate one for each."
            )
    if train.n_obs < max(4, test.n_obs // 2):
        raise ValueError(f"{train.n_obs} training cells are too few for a reference of {test.n_obs} cells.")
    genes = reduce(lambda common, names: common[common.isin(names)], [sample.var_names for _, sample in named])
    if genes.empty:
        raise ValueError(f"{', '.join(columns)} have no gene in common: give cells with the same gene names.")
    return genes


@dataclass
class _Evaluator:
    """Everything fitted once on the real cells, and the metrics of one column after the other."""

    train: CellArrays
    test: CellArrays
    donors: list[np.ndarray] | None
    parity: bool
    seed: int
    n_jobs: int | None

    def __post_init__(self):
        fitted, self.other_half = split_halves(self.train.label_or_blank(), self.seed)
        self.fitted = self.train[fitted]
        self.pca = PCA(min(30, *self.fitted.expression.shape), random_state=self.seed).fit(self.fitted.expression)
        self.train_pcs, self.test_pcs = (self.pca.transform(cells.expression) for cells in (self.train, self.test))

    def draw_reference(self, rng: np.random.Generator) -> np.ndarray:
        """Positions of training cells with the labels of the held-out cells, from the half that was not fitted."""
        return draw_matching(self.train.label_or_blank(), self.test.label_or_blank(), rng, self.other_half)

    def measure_all(self, columns: dict[str, list[CellArrays]]) -> tuple[dict[str, dict], dict[str, dict]]:
        """All metrics of each column and of a new reference for each draw, as lists over draws; also by type."""
        all_cells: dict[str, dict] = {}
        per_type: dict[str, dict] = {}
        for name, cells in [
            (name, cells) for name, drawn in columns.items() for cells in drawn if cells.types is not None
        ]:
            unknown = np.setdiff1d(cells.types, np.union1d(self.train.types, self.test.types))
            if len(unknown):
                raise ValueError(f"{name!r} has cells of type {str(unknown[0])!r}, which no real cell has: rename it.")
        draws = list(zip(*columns.values()))
        total = len(draws) * (len(columns) + 1)
        progress_bar = tqdm(total=total, desc="Judging", unit=" samples", disable=None)  # only at a terminal
        for i, draw in enumerate(draws):
            rng = np.random.default_rng([self.seed, i])
            reference = self.train[self.draw_reference(rng)]
            members = self.draw_reference(rng)
            for name, cells in zip([*columns, REFERENCE], [*draw, reference]):
                row, rows_of_types = self.measure(cells, None if name == REFERENCE else members, self.seed + i)
                _append(all_cells.setdefault(name, {}), row)
                for label, row in rows_of_types.items():
                    num_train, num_test = (int(np.sum(side.types == label)) for side in (self.train, self.test))
                    entry = {"num_train": num_train, "num_test": num_test, "metrics": {}}
                    _append(per_type.setdefault(label, entry)["metrics"].setdefault(name, {}), row)
                progress_bar.update()
        progress_bar.close()
        return all_cells, per_type

    def measure(self, cells: CellArrays, members: np.ndarray | None, seed: int) -> tuple[dict, dict[str, dict]]:
        """
        All metrics of one column, over all cells and by cell type. `members` are positions of training cells for
        membership inference; the reference, which consists of training cells, has none.
        """
        pcs = self.pca.transform(cells.expression)
        row = {
            **{f"auc_{name}": value for name, value in judge(self.test, cells, seed, self.n_jobs).items()},
            "w2": metrics.wasserstein2(self.test_pcs, pcs),
            "mmd2": metrics.mmd2(self.test_pcs, pcs),
            **metrics.gene_statistics(self.test.expression, cells.expression),
            **metrics.manifold_metrics(self.test_pcs, pcs),
        }
        if cells.library_size is not None:
            row["library_size_w1"] = metrics.library_size_w1(self.test.library_size, cells.library_size)
            row |= metrics.other_genes_error(self.test.other_genes_share(), cells.other_genes_share())
        if members is not None:
            row |= self._memory(pcs, members)
        if self.parity:
            row |= metrics.paper_parity(self.test.expression, cells.expression)
        if cells.types is None:
            return row, {}
        labels = metrics.judged_labels(self.train, self.test, cells)
        pooled, of_types = metrics.compare_labels(self.fitted, self.test, cells, labels, self.pca, seed)
        if cells.library_size is not None:
            for label, row_of_type in of_types.items():
                sides = [side[side.types == label].library_size for side in (self.test, cells)]
                row_of_type["library_size_w1"] = metrics.library_size_w1(*sides)
        return row | pooled, of_types

    def _memory(self, pcs: np.ndarray, members: np.ndarray) -> dict[str, float]:
        """Metrics of memorisation."""
        of_train, of_test = (metrics.nearest_distances(x, pcs) for x in (self.train_pcs[members], self.test_pcs))
        row = {
            "nearest_training_cell": metrics.nearest_training_cell_ratio(self.train_pcs, self.test_pcs, pcs),
            "membership_auc": metrics.membership_auc(of_train, of_test),
        }
        if self.donors is not None:
            donors = self.donors[0][members], self.donors[1]
            row["membership_auc_donor"] = metrics.donor_membership_auc(of_train, donors[0], of_test, donors[1])
        return row


def _append(lists: dict[str, list], row: dict[str, float]):
    """Appends each value to the list of its name."""
    for metric, value in row.items():
        lists.setdefault(metric, []).append(value)
