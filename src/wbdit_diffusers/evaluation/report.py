"""Generators judged on held-out cells, next to real cells and baselines that are judged in the same way."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.decomposition import PCA
from tqdm.auto import tqdm

from ..data.cells import find_matrix
from ..processing.genes import most_variable
from ..processing.normalize import to_expression, total_counts
from ..progress import bar_options
from . import metrics
from .cells import CellArrays, combined_labels, generated_cells, needs_common_genes, real_cells
from .classifiers import JUDGES, judge
from .samples import draw_baselines, draw_matching, draw_samples, split_halves
from .table import GENERATED, REFERENCE


MAX_JUDGED_GENES = 2000


def evaluate(
    pipe: Any,
    train: ad.AnnData,
    test: ad.AnnData,
    num_samples: int = 3,
    seed: int = 0,
    baselines: bool = True,
    donor_key: str | None = None,
    **call_kwargs,
) -> dict:
    """
    Judges a pipeline over the genes that it models: [`draw_samples`], [`draw_baselines`], [`evaluate_cells`].

    `train` and `test` are its training cells and held-out cells, with all their genes. `num_samples` is also the
    number of draws of the real reference. `call_kwargs` are further arguments of the pipeline's call.
    """
    train, test = (pipe.processor.source(cells).read() for cells in (train, test))
    samples, test = draw_samples(pipe, test, num_samples, seed, **call_kwargs)
    drawn = draw_baselines(pipe, train, test, num_samples, seed) if baselines else None
    own = pipe.processor.config
    return evaluate_cells(samples, train, test, list(own.label_keys), own.layer, own.values, drawn, donor_key, seed)


def evaluate_cells(
    samples: list[ad.AnnData] | dict[str, list[ad.AnnData]],
    train: ad.AnnData,
    test: ad.AnnData,
    label_key: str | Sequence[str] | None = None,
    layer: str | None = None,
    values: str = "counts",
    baselines: dict[str, list[ad.AnnData]] | None = None,
    donor_key: str | None = None,
    seed: int = 0,
) -> dict:
    """
    Judges the cells of one or several generators on held-out cells, over the genes that all of them make.

    They are compared with the real reference: training cells with the label counts of the held-out cells. The cell
    type classifier is fitted on one half of the training cells. The reference is drawn from the other half, anew for
    each sample. Principal components are fitted on one half of the held-out cells, and the distances in them are those
    to the other half. Of more than 2,000 genes, the most variable ones are judged.

    The library size of a real cell is the sum of its row, and that of a generated cell is `obs["library_size"]`. If a
    sample has no such column, or all genes of the real cells, all cells are normalised within the common genes.

    Args:
        samples (`list[AnnData]` or `dict[str, list[AnnData]]`):
            Independent samples of a generator, or of several by name. Each has a cell for each test cell.
        train, test (`AnnData`): Training cells of the generators and held-out cells, with all their genes.
        label_key (`str` or `Sequence[str]`, *optional*):
            Column of `obs` with the cell type, or all columns of conditions, the cell type first.
        layer (`str`, *optional*): Layer of `train` and `test` that holds the matrix; `X` by default.
        values (`str`, defaults to `"counts"`): Content of the matrices: `"counts"`, or `"log"` (used unchanged).
        baselines (`dict[str, list[AnnData]]`, *optional*): Further columns of the report.
        donor_key (`str`, *optional*): Column of `obs` of `train` and `test` with the donor.

    Returns:
        `dict`: the settings and numbers of cells; `generators`, their names (`"generated"` for a list); `excess` of
        each column; `metrics`, each metric of each column as a list over samples; `per_type`, the same for each cell
        type.

    Raises a `ValueError` if columns have other cells or genes, or a type does not occur in the real cells.
    """
    generators = samples if isinstance(samples, dict) else {GENERATED: samples}
    columns = generators | (baselines or {})
    label_keys = [] if label_key is None else [label_key] if isinstance(label_key, str) else list(label_key)
    common = common_genes(columns, train, test)
    within_genes = any(needs_common_genes(sample, test) for drawn in columns.values() for sample in drawn)
    donors = None if donor_key is None else [combined_labels(adata, [donor_key]) for adata in (train, test)]
    if within_genes:
        train, test = train[:, common], test[:, common]
    genes = judged_genes(train[:, common], test[:, common], values, layer)
    settings = values, layer, label_keys
    real_train, real_test = real_cells(train, genes, *settings), real_cells(test, genes, *settings)
    arrays: dict[str, list[CellArrays]] = {}
    for name, drawn in columns.items():
        arrays[name] = [generated_cells(x[:, common], values, label_keys, within_genes, genes) for x in drawn]
    evaluator = _Evaluator(real_train, real_test, donors, seed)
    rows, per_type = evaluator.measure_all(arrays)
    return {
        "num_train": train.n_obs,
        "num_test": test.n_obs,
        "num_genes": len(common),
        "num_judged_genes": len(genes),
        "num_samples": max(map(len, columns.values())),
        "label_key": label_keys[0] if label_keys else None,
        "donor_key": donor_key,
        "within_genes": within_genes,
        "generators": list(generators),
        "excess": {name: excess(row, rows[REFERENCE]) for name, row in rows.items() if name != REFERENCE},
        "metrics": rows,
        "per_type": per_type,
    }


def excess(column: dict[str, list[float]], reference: dict[str, list[float]]) -> dict:
    """By how much a classifier's AUC is above that of the real reference, for the `judge` with the largest mean."""
    number = len(column["auc_forest"])
    differences = {name: np.subtract(column[f"auc_{name}"], reference[f"auc_{name}"][:number]) for name in JUDGES}
    by_judge = {name: float(values.mean()) for name, values in differences.items()}
    worst = max(by_judge, key=lambda name: by_judge[name])
    return {"judge": worst, "mean": by_judge[worst], "sd": float(differences[worst].std()), "by_judge": by_judge}


def common_genes(columns: dict[str, list[ad.AnnData]], train: ad.AnnData, test: ad.AnnData) -> pd.Index:
    """The genes of all columns. Raises a `ValueError` if cells or genes do not fit each other."""
    named = [(name, sample) for name, samples in columns.items() for sample in samples]
    for name, adata in [("training cells", train), ("held-out cells", test), *named]:
        if not adata.var_names.is_unique:
            raise ValueError(f"{name!r} has a gene more than once: call `adata.var_names_make_unique()`.")
    for name, sample in named:
        if sample.n_obs != test.n_obs:
            raise ValueError(
                f"{name!r} has {sample.n_obs} cells, and {test.n_obs} are held out: generate one for each."
            )
    if min(train.n_obs, test.n_obs) < 4 or train.n_obs < test.n_obs // 2:
        raise ValueError(f"{train.n_obs} training and {test.n_obs} held-out cells are too few to judge with.")
    genes = reduce(lambda common, names: common[common.isin(names)], [sample.var_names for _, sample in named])
    missing = genes[~(genes.isin(train.var_names) & genes.isin(test.var_names))]
    if genes.empty or len(missing):
        which = f"{', '.join(columns)} have no gene in common"
        if len(missing):
            which = f"{len(missing)} generated genes are not among the genes of the real cells, e.g. {missing[0]!r}"
        raise ValueError(f"{which}: give cells with the same gene names.")
    return genes


def judged_genes(train: ad.AnnData, test: ad.AnnData, values: str, layer: str | None) -> pd.Index:
    """The genes that classifiers and metrics see: at most 2,000, the most variable ones."""
    if train.n_vars <= MAX_JUDGED_GENES:
        return train.var_names
    # Genes chosen on one side alone would help to separate real cells from real cells.
    matrices = [sparse.csr_matrix(find_matrix(x.X, x.layers, layer, "The data of real cells")) for x in (train, test)]
    matrix = sparse.vstack(matrices, format="csr")
    expression = to_expression(matrix, total_counts(matrix, values), values)
    return train.var_names[most_variable(sparse.csr_matrix(expression, dtype=np.float32), MAX_JUDGED_GENES)]


class _Evaluator:
    """Judges columns one after the other. Components of training cells would count against cells like them."""

    def __init__(self, train: CellArrays, test: CellArrays, donors: list | None, seed: int):
        self.train, self.test, self.donors, self.seed = train, test, donors, seed
        fitted, self.other_half = split_halves(train.labels, seed)
        self.fitted = train[fitted]
        neutral, self.judged_half = split_halves(test.labels, seed)
        basis = test.expression[neutral]
        self.pca = PCA(min(30, *basis.shape), random_state=seed).fit(basis)
        self.train_pcs = self.pca.transform(train.expression)
        self.test_pcs = self.pca.transform(test.expression[self.judged_half])

    def draw(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Training cells of a draw: with the labels of the held-out ones (the reference), and of the judged half."""
        rng, labels = np.random.default_rng([self.seed, number]), np.asarray(self.test.labels)
        halves = labels, labels[self.judged_half]
        return tuple(draw_matching(self.train.labels, wanted, rng, self.other_half) for wanted in halves)

    def measure_all(self, columns: dict[str, list[CellArrays]]) -> tuple[dict[str, dict], dict[str, dict]]:
        """All metrics of each column and of a new reference for each draw, as lists over draws; also by type."""
        for name, types in ((name, cells.types) for name, drawn in columns.items() for cells in drawn):
            unknown = [] if types is None else np.setdiff1d(types, np.append(self.train.types, self.test.types))
            if len(unknown):
                raise ValueError(f"{name!r} has the unknown type {str(unknown[0])!r}: rename it as in the real cells.")
        rows: dict[str, list] = {name: [] for name in [*columns, REFERENCE]}  # of each draw: metrics, and by type
        num_draws = max(map(len, columns.values()))
        total = num_draws + sum(map(len, columns.values()))
        with tqdm(**bar_options(total=total, desc="Judging", unit=" samples")) as progress_bar:
            for i in range(num_draws):
                reference, members = self.draw(i)
                draws = {name: drawn[i] for name, drawn in columns.items() if i < len(drawn)}
                for name, cells in (draws | {REFERENCE: self.train[reference]}).items():
                    rows[name].append(self.measure(cells, None if name == REFERENCE else members, self.seed + i))
                    progress_bar.update()
        per_type: dict[str, dict] = {}
        if self.train.types is not None:  # rare types have a row, if only with their number of cells
            for label in np.unique(np.append(self.train.types, self.test.types)).tolist():
                num_train, num_test = (int((real.types == label).sum()) for real in (self.train, self.test))
                of_label = {name: _lists([types.get(label, {}) for _, types in drawn]) for name, drawn in rows.items()}
                of_label = {name: lists for name, lists in of_label.items() if lists}
                per_type[label] = {"num_train": num_train, "num_test": num_test, "metrics": of_label}
        return {name: _lists([row for row, _ in drawn]) for name, drawn in rows.items()}, per_type

    def measure(self, cells: CellArrays, members: np.ndarray | None, seed: int) -> tuple[dict, dict[str, dict]]:
        """All metrics, and those by type. `members` are training cells to find; the reference consists of some."""
        pcs, test = self.pca.transform(cells.expression), self.test
        half = split_halves(cells.labels, self.seed)[1]  # has the labels of the judged half if labels are the same
        row = {f"auc_{name}": value for name, value in judge(test, cells, seed).items()}
        row |= metrics.distances(self.test_pcs, pcs[half])
        row |= metrics.gene_statistics(test.expression, cells.expression)
        row |= metrics.manifold_metrics(self.test_pcs, pcs[half])
        if cells.library_size is not None:
            row["library_size_w1"] = metrics.library_size_w1(test.library_size, cells.library_size)
            row |= metrics.other_genes_error(test.other_genes_share(), cells.other_genes_share())
        if members is not None:
            row["nearest_training_cell"] = metrics.nearest_training_cell_ratio(self.train_pcs, self.test_pcs, pcs)
            near = [metrics.nearest_distances(real, pcs) for real in (self.train_pcs[members], self.test_pcs)]
            row["membership_auc"] = metrics.membership_auc(*near)
            if self.donors is not None:
                donors = self.donors[0][members], self.donors[1][self.judged_half]
                row["membership_auc_donor"] = metrics.membership_auc(*map(metrics.mean_by_donor, near, donors))
        if cells.types is None:
            return row, {}
        labels = metrics.judged_labels(self.fitted, test, cells)
        frequent = metrics.judged_labels(self.train, test, cells, metrics.MIN_TRAIN_CELLS)
        pooled, by_type = metrics.compare_labels(self.fitted, test, cells, labels, frequent, seed)
        types, real_types = np.asarray(cells.types)[half], np.asarray(test.types)[self.judged_half]
        for label, of_label in by_type.items():
            of_label |= metrics.distances(self.test_pcs[real_types == label], pcs[half][types == label])
        return row | pooled, by_type


def _lists(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """The values of each metric in some rows, as far as they have it."""
    return {metric: [row[metric] for row in rows if metric in row] for row in rows for metric in row}
