"""Generated cells judged on held-out cells, beside real cells and baselines judged in the same way."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import anndata as ad
import numpy as np
from sklearn.decomposition import PCA
from tqdm.auto import tqdm

from .cells import Cells, combined_labels, generated_cells, label_keys_of, needs_common_genes, real_cells
from .classifiers import JUDGES, judge
from .metrics import (
    compare_labels,
    donor_membership_auc,
    gene_statistics,
    judged_labels,
    library_size_w1,
    manifold_metrics,
    membership_auc,
    mmd2,
    nearest_distances,
    nearest_training_cell_ratio,
    other_genes_error,
    paper_parity,
    wasserstein2,
)
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
        pipe ([`ScRNAGenerationPipeline`]): What is judged.
        train (`AnnData`): The cells that it was trained on, with all their genes.
        test (`AnnData`): The held-out cells, with all their genes.
        num_samples (`int`, defaults to 3): Samples to draw, and so draws of the real reference.
        seed (`int`, defaults to 0): Seed of the first sample and of everything that judges.
        baselines (`bool`, defaults to `True`): Whether to judge [`draw_baselines`] as well.
        donor_key (`str`, *optional*): Column of `obs` with the donor, for the memory of donors.
        parity (`bool`, defaults to `False`): Add the metrics of arXiv 2411.06785, which reward collapse.
        call_kwargs: Further arguments of [`draw_samples`] and of the pipeline's call, e.g. `num_inference_steps`.

    Returns:
        `dict`: see [`evaluate_cells`].

    Raises:
        ValueError: If the cells can't be judged, see [`evaluate_cells`].
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
    samples: list[ad.AnnData],
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
    Judges cells of any generator on held-out cells, over the genes of the generated cells.

    The real reference stands beside them: as many training cells, with the labels of the held-out ones. Whatever the
    judging itself needs (principal components, cell type classifier) is fitted on one half of the training cells, and
    the reference is drawn from the other half, anew for each sample.

    The library size of a cell counts all of its genes: the sum of its row for real cells, and for generated ones
    `obs["library_size"]`. If the generated cells have no `obs["library_size"]`, or all genes of the real ones, all
    cells are judged within the generated genes, and their library is the sum of the row.

    Args:
        samples (`list[AnnData]`): Independent samples of as many cells as `test` has, with the labels of `test`.
        train (`AnnData`): The cells that the generator was trained on, with all their genes.
        test (`AnnData`): The held-out cells, with all their genes.
        label_key (`str` or `Sequence[str]`, *optional*):
            Column of `obs` with the cell type. Of several, the first is the cell type, and the reference is matched
            by all of them: name every column that the generated cells were conditioned on.
        layer (`str`, *optional*): Layer of `train` and `test` that holds the matrix; `X` by default.
        values (`str`, defaults to `"counts"`): What the matrices hold: `"counts"`, or `"log"` (used as they are).
        baselines (`dict[str, list[AnnData]]`, *optional*): Further columns, each with as many samples as `samples`.
        donor_key (`str`, *optional*): Column of `obs` of `train` and `test` with the donor.
        parity (`bool`, defaults to `False`): Add the metrics of arXiv 2411.06785, which reward collapse.
        seed (`int`, defaults to 0): Seed of the halves, the reference and the classifiers.
        n_jobs (`int`, *optional*): Threads of the classifiers; all cores by default.

    Returns:
        `dict`: `num_train`, `num_test`, `num_genes`, `num_samples`, `label_key`, `donor_key`, `within_genes`; `excess`
        of each column, see [`excess`]; `metrics`: for each column, each metric as a list over samples; `per_type`:
        `num_train`, `num_test` and `metrics` for each cell type with at least 30 training cells.

    Raises:
        ValueError: If columns don't fit `test` or each other in cells, genes or samples, a gene stands there twice, a
            type is unknown to the real cells, or cells are too few.
    """
    if REFERENCE in (baselines or {}):
        raise ValueError(f"A baseline can't be called {REFERENCE!r}, which is another column's name: rename it.")
    columns = {GENERATED: samples, **(baselines or {})}
    return evaluate_columns(columns, train, test, label_key, layer, values, donor_key, parity, seed, n_jobs)


def evaluate_columns(
    columns: dict[str, list[ad.AnnData]],
    train: ad.AnnData,
    test: ad.AnnData,
    label_key: str | Sequence[str] | None = None,
    layer: str | None = None,
    values: str = "counts",
    donor_key: str | None = None,
    parity: bool = False,
    seed: int = 0,
    n_jobs: int | None = None,
) -> dict:
    """[`evaluate_cells`] of columns by name, whose genes are those of the first one."""
    _check_columns(columns, train, test)
    samples = next(iter(columns.values()))
    label_keys, genes = label_keys_of(label_key), samples[0].var_names
    within_genes = any(needs_common_genes(sample, test) for drawn in columns.values() for sample in drawn)
    real_train, real_test = (
        real_cells(adata, genes, values, layer, label_keys, within_genes) for adata in (train, test)
    )
    donors = None if donor_key is None else [combined_labels(adata, [donor_key]) for adata in (train, test)]
    ruler = _Ruler(real_train, real_test, donors, parity, seed, n_jobs)

    drawn = [
        {
            name: generated_cells(cells[i][:, genes], values, label_keys, within_genes)
            for name, cells in columns.items()
        }
        for i in range(len(samples))
    ]
    if label_keys:
        _check_labels(drawn, real_train, real_test, label_keys[0])
    metrics, per_type = ruler.measure_columns(drawn, seed)
    return {
        "num_train": train.n_obs,
        "num_test": test.n_obs,
        "num_genes": len(genes),
        "num_samples": len(samples),
        "label_key": label_keys[0] if label_keys else None,
        "donor_key": donor_key,
        "within_genes": within_genes,
        "excess": {name: excess(row, metrics[REFERENCE]) for name, row in metrics.items() if name != REFERENCE},
        "metrics": metrics,
        "per_type": {
            label: ruler.count_type(label) | {"metrics": {name: dict(row) for name, row in rows.items()}}
            for label, rows in per_type.items()
        },
    }


def excess(column: dict[str, list[float]], reference: dict[str, list[float]]) -> dict:
    """
    How much better than real cells the classifiers tell a column's cells from held-out ones.

    Args:
        column (`dict[str, list[float]]`): Metrics of the column, `auc_forest`, `auc_boosting`, `auc_regression` among
            them.
        reference (`dict[str, list[float]]`): Metrics of the real reference, for the same draws.

    Returns:
        `dict`: `judge` (the classifier with the largest mean difference of AUC), `mean` and `sd` of its differences
        over draws, and `by_judge`, the mean difference of each.
    """
    differences = {name: np.subtract(column[f"auc_{name}"], reference[f"auc_{name}"]) for name in JUDGES}
    by_judge = {name: float(values.mean()) for name, values in differences.items()}
    worst = max(by_judge, key=lambda name: by_judge[name])
    return {
        "judge": worst,
        "mean": by_judge[worst],
        "sd": float(differences[worst].std()),
        "by_judge": by_judge,
    }


def _check_columns(columns: dict[str, list[ad.AnnData]], train: ad.AnnData, test: ad.AnnData):
    first, first_samples = next(iter(columns.items()))
    if not first_samples:
        raise ValueError("There are no samples to judge: give at least one.")
    genes = first_samples[0].var_names
    for adata, name in ((train, "training cells"), (test, "held-out cells")):
        check_gene_names(adata, name)
    for name, samples in columns.items():
        if len(samples) != len(first_samples):
            raise ValueError(
                f"{name!r} has {len(samples)} samples, and {first!r} has {len(first_samples)}: draw as many of each."
            )
        for sample in samples:
            check_gene_names(sample, name)
            if sample.n_obs != test.n_obs:
                raise ValueError(
                    f"A sample of {name!r} has {sample.n_obs} cells, not as many as the {test.n_obs} held-out ones:"
                    " draw as many."
                )
            if len(sample.var_names.symmetric_difference(genes)):
                raise ValueError(f"A sample of {name!r} has other genes than the first one: judge the common ones.")
    if train.n_obs < test.n_obs // 2 or train.n_obs < 4:
        raise ValueError(f"{train.n_obs} training cells are too few for a reference of {test.n_obs} cells.")


def check_gene_names(adata: ad.AnnData, name: str):
    """Raises a `ValueError` if cells, which a message calls `name`, have a gene twice."""
    if not adata.var_names.is_unique:
        gene = adata.var_names[adata.var_names.duplicated()][0]
        raise ValueError(f"{name!r} has the gene {gene!r} more than once: call `adata.var_names_make_unique()`.")


def _check_labels(drawn: list[dict[str, Cells]], real_train: Cells, real_test: Cells, label_key: str):
    """Raises a `ValueError` if generated cells have a type that no real one has: it can't be judged."""
    known = {*_types(real_train), *_types(real_test)}
    for columns in drawn:
        for name, cells in columns.items():
            unknown = sorted({*_types(cells)} - known)
            if unknown:
                raise ValueError(
                    f"{name!r} has cells whose obs[{label_key!r}] is {unknown[0]!r}, which no real cell has: give"
                    " them the names of the held-out cells' labels."
                )


def _types(cells: Cells) -> list[str]:
    return [] if cells.types is None else np.unique(cells.types).tolist()


class _Ruler:
    """Everything that is fitted once on the real cells, and then measures one column after the other."""

    def __init__(
        self,
        train: Cells,
        test: Cells,
        donors: list[np.ndarray] | None,
        parity: bool,
        seed: int,
        n_jobs: int | None,
    ):
        self.train, self.test, self.donors, self.parity, self.n_jobs = train, test, donors, parity, n_jobs
        self.train_labels, self.test_labels = (
            np.full(len(cells), "") if cells.labels is None else cells.labels for cells in (train, test)
        )
        fitted, self.other_half = split_halves(self.train_labels, seed)
        self.fitted = train[fitted]
        self.pca = PCA(min(30, *self.fitted.expression.shape), random_state=seed).fit(self.fitted.expression)
        self.train_pcs, self.test_pcs = (self.pca.transform(cells.expression) for cells in (train, test))

    def draw_reference(self, rng: np.random.Generator) -> np.ndarray:
        """Positions of training cells with the labels of the held-out ones, from the half that nothing has seen."""
        return draw_matching(self.train_labels, self.test_labels, rng, self.other_half)

    def count_type(self, label: str) -> dict[str, int]:
        """How many training and held-out cells have a label."""
        return {
            "num_train": int(np.sum(self.train.types == label)),
            "num_test": int(np.sum(self.test.types == label)),
        }

    def measure_columns(self, draws: list[dict[str, Cells]], seed: int) -> tuple[dict[str, dict], dict[str, dict]]:
        """
        All metrics of all draws of all columns and of the reference, which is drawn anew for each: by column, each
        metric as a list over draws; and the same for each cell type.
        """
        metrics: dict[str, dict] = defaultdict(lambda: defaultdict(list))
        per_type: dict[str, dict] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
        num_columns = sum(len(columns) + 1 for columns in draws)
        progress_bar = tqdm(total=num_columns, desc="Judging", unit=" samples", disable=None)  # only at a terminal
        for i, columns in enumerate(draws):
            rng = np.random.default_rng([seed, i])
            generated, *others = columns
            drawn = {generated: columns[generated], REFERENCE: self.train[self.draw_reference(rng)]}
            members = self.draw_reference(rng)
            for name, cells in (drawn | {name: columns[name] for name in others}).items():
                row, rows_of_types = self.measure(cells, members if name != REFERENCE else None, seed + i)
                for metric, value in row.items():
                    metrics[name][metric].append(value)
                for label, row in rows_of_types.items():
                    for metric, value in row.items():
                        per_type[label][name][metric].append(value)
                progress_bar.update()
        progress_bar.close()
        return {name: dict(row) for name, row in metrics.items()}, per_type

    def measure(self, cells: Cells, members: np.ndarray | None, seed: int) -> tuple[dict, dict[str, dict]]:
        """
        All metrics of one column, pooled and by cell type. `members` are the training cells whose nearness to the
        column is compared with that of held-out cells; none for the reference, which is made of training cells.
        """
        pcs = self.pca.transform(cells.expression)
        row = {
            **{f"auc_{name}": value for name, value in judge(self.test, cells, seed, self.n_jobs).items()},
            "w2": wasserstein2(self.test_pcs, pcs),
            "mmd2": mmd2(self.test_pcs, pcs),
            **gene_statistics(self.test.expression, cells.expression),
            **manifold_metrics(self.test_pcs, pcs),
        }
        if cells.library_size is not None:
            row["library_size_w1"] = library_size_w1(self.test.library_size, cells.library_size)
            row |= other_genes_error(self.test.other_genes_share(), cells.other_genes_share())
        if members is not None:
            row |= self._memory(pcs, members)
        if self.parity:
            row |= paper_parity(self.test.expression, cells.expression)
        pooled, of_types = self._measure_types(cells, seed)
        return row | pooled, of_types

    def _memory(self, pcs: np.ndarray, members: np.ndarray) -> dict[str, float]:
        distances = nearest_distances(self.train_pcs[members], pcs), nearest_distances(self.test_pcs, pcs)
        row = {
            "nearest_training_cell": nearest_training_cell_ratio(self.train_pcs, self.test_pcs, pcs),
            "membership_auc": membership_auc(*distances),
        }
        if self.donors is not None:
            row["membership_auc_donor"] = donor_membership_auc(
                distances[0], self.donors[0][members], distances[1], self.donors[1]
            )
        return row

    def _measure_types(self, cells: Cells, seed: int) -> tuple[dict, dict[str, dict]]:
        if cells.types is None:
            return {}, {}
        labels = judged_labels(self.train.types, self.test.types, cells.types)
        pooled, of_types = compare_labels(
            *(self.fitted.expression, self.fitted.types, self.test.expression, self.test.types),
            *(cells.expression, cells.types),
            labels=labels,
            pca=self.pca,
            seed=seed,
        )
        if cells.library_size is not None and self.test.library_size is not None:
            for label, row in of_types.items():
                of_real, of_cells = self.test.types == label, cells.types == label
                row["library_size_w1"] = library_size_w1(self.test.library_size[of_real], cells.library_size[of_cells])
        return pooled, of_types
