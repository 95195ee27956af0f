"""Generated cells judged on held-out cells, beside their floors."""

from collections import defaultdict

import anndata as ad
import numpy as np
import torch
from diffusers.utils import logging

from ..pipelines.pipeline_scrna_generation import ScRNAGenerationPipeline
from .metrics import compare, compare_labels, paper_parity


logger = logging.get_logger(__name__)

TITLES = {
    "rf_auc": "random forest AUC, genes (0.5 = can't tell)",
    "rf_auc_pca": "random forest AUC, 50 PCs",
    "w2": "2-Wasserstein distance, 30 PCs",
    "mmd2": "MMD², 30 PCs",
    "mean_pearson": "gene means, Pearson",
    "mean_spearman": "gene means, Spearman",
    "variance_pearson": "gene variances, Pearson",
    "variance_ratio": "total variance ratio",
    "zero_fraction_error": "zero fractions, mean absolute error",
    "gene_correlation": "gene-gene correlations, Pearson",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "nearest_training_cell": "distance to the nearest training cell, ratio",
    "purity": "classifier accuracy, ratio to real cells",
    "f1": "F1 of a classifier trained on these cells",
    "lfc_slope": "marker log fold changes, slope",
    "de_recovery": "marker genes recovered",
    "paper_kl": "paper parity: KL of paired rows",
    "paper_wasserstein": "paper parity: flattened Wasserstein-1",
    "paper_mmd": "paper parity: MMD² by blocks of 20 genes",
}
PER_TYPE = ("purity", "lfc_slope", "de_recovery", "w2", "mmd2")
FLOORS = ("real: training cells", "real: halves of the held-out")


def log_normalise(cells: ad.AnnData) -> np.ndarray:
    """log1p(CP10k) of counts, cells × genes."""
    import scanpy as sc

    cells = cells.copy()
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    return np.asarray(cells.to_df())


def expression(cells: ad.AnnData, values: str = "counts") -> np.ndarray:
    """What is judged and drawn, cells × genes: log1p(CP10k) of counts, log values as they are."""
    return log_normalise(cells) if values == "counts" else np.asarray(cells.to_df())


def evaluate(
    pipe: ScRNAGenerationPipeline,
    train: ad.AnnData,
    test: ad.AnnData,
    num_seeds: int = 3,
    parity: bool = False,
    **call_kwargs,
) -> dict:
    """
    Judges a pipeline over the genes that it models: [`draw_samples`], then [`evaluate_cells`].

    Args:
        pipe ([`ScRNAGenerationPipeline`]): What is judged.
        train (`AnnData`): The cells that it was trained on.
        test (`AnnData`): The held-out cells.
        num_seeds (`int`, defaults to 3): Samples to draw.
        parity (`bool`, defaults to `False`): Add the metrics of arXiv 2411.06785, which reward collapse.
        call_kwargs: Further arguments of [`draw_samples`] and of the pipeline's call, e.g. `num_inference_steps`.

    Returns:
        `dict`: see [`evaluate_cells`].
    """
    samples, test = draw_samples(pipe, test, num_seeds, **call_kwargs)
    config = pipe.processor.config
    label_key = next(iter(config.label_keys), None)
    return evaluate_cells(samples, train, test, label_key, layer=config.layer, values=config.values, parity=parity)


def draw_samples(
    pipe: ScRNAGenerationPipeline,
    test: ad.AnnData,
    num_seeds: int = 3,
    seed: int = 0,
    max_cells: int = 5000,
    **call_kwargs,
) -> tuple[list[ad.AnnData], ad.AnnData]:
    """
    Generates as many cells as there are test cells, with their labels.

    Args:
        pipe ([`ScRNAGenerationPipeline`]): What is judged.
        test (`AnnData`): The held-out cells. Those with a label that the pipeline does not know are left out.
        num_seeds (`int`, defaults to 3): Samples to draw.
        seed (`int`, defaults to 0): Seed of the first sample; the others follow.
        max_cells (`int`, defaults to 5000): Test cells to use; the optimal assignment takes their number cubed.
        call_kwargs: Further arguments of the pipeline's call.

    Returns:
        `tuple`: the samples, and the test cells that they correspond to.
    """
    known = np.ones(test.n_obs, dtype=bool)
    for key, names in zip(pipe.processor.config.label_keys, pipe.processor.config.categories):
        known &= test.obs[key].astype(str).isin(names).to_numpy()
    if not known.all():
        logger.warning(f"{(~known).sum()} held-out cells have labels that no training cell has: left out.")
    test = test[known]
    if test.n_obs > max_cells:
        test = test[np.sort(np.random.default_rng(0).choice(test.n_obs, max_cells, replace=False))]
    labels = {key: test.obs[key].astype(str).tolist() for key in pipe.processor.config.label_keys}
    generators = [torch.Generator().manual_seed(seed + i) for i in range(num_seeds)]
    samples = [
        pipe(num_cells=test.n_obs, conditions=labels, generator=generator, **call_kwargs).cells
        for generator in generators
    ]
    return samples, test


def evaluate_cells(
    samples: list[ad.AnnData],
    train: ad.AnnData,
    test: ad.AnnData,
    label_key: str | None = None,
    layer: str | None = None,
    values: str = "counts",
    floors: bool = True,
    parity: bool = False,
) -> dict:
    """
    Judges cells of any generator on held-out cells, over the genes of the generated cells.

    The floors are as many training cells of the same labels, and one half of the test cells against the other. (The
    principal components are fitted on the training cells, which spreads those a little more than cells they have not
    seen: a W2 below the floor is not better than real.)

    Args:
        samples (`list[AnnData]`): Independent samples of as many cells as `test` has, with the labels of `test`.
        train (`AnnData`): The cells that the generator was trained on.
        test (`AnnData`): The held-out cells.
        label_key (`str`, *optional*): Column of `obs` with the cell type, for the metrics that need it.
        layer (`str`, *optional*): Layer of `train` and `test` that holds the matrix; `X` by default.
        values (`str`, defaults to `"counts"`): What the matrices hold: `"counts"`, or `"log"` (used as they are).
        floors (`bool`, defaults to `True`): Whether to measure the floors.
        parity (`bool`, defaults to `False`): Add the metrics of arXiv 2411.06785, which reward collapse.

    Returns:
        `dict`: `num_train`, `num_test`, `num_genes`, `label_key`; `metrics`: for `"generated"` and both floors, each
        metric (see [`~evaluation.metrics.compare`] and [`~evaluation.metrics.compare_labels`]) as a list over samples;
        `per_type`: the same for each cell type with at least 30 training cells.

    Raises:
        ValueError: If a sample has another number of cells than `test`, or genes that `test` lacks.
    """
    var_names = samples[0].var_names
    missing = var_names.difference(test.var_names)
    if len(missing):
        raise ValueError(f"{len(missing)} generated genes are not among the held-out cells', e.g. {missing[0]!r}.")
    for sample in samples:
        if sample.n_obs != test.n_obs:
            raise ValueError(f"A sample has {sample.n_obs} cells, not as many as the {test.n_obs} held-out ones.")

    def matrix(cells: ad.AnnData, layer: str | None = None) -> np.ndarray:
        cells = cells[:, var_names]
        cells = ad.AnnData(cells.X if layer is None else cells.layers[layer])
        return expression(cells, values)

    def labels_of(cells: ad.AnnData) -> np.ndarray:
        return np.zeros(cells.n_obs) if label_key is None else cells.obs[label_key].astype(str).to_numpy()

    train_x, test_x = matrix(train, layer), matrix(test, layer)
    train_labels, test_labels = labels_of(train), labels_of(test)
    metrics = defaultdict(lambda: defaultdict(list))
    per_type = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for seed, sample in enumerate(samples):
        columns = {"generated": (test_x, test_labels, matrix(sample), labels_of(sample))}
        if floors:
            rng = np.random.default_rng(seed)
            some_train = same_labels(train_labels, test_labels, rng)
            half, other_half = _halves(test_labels, rng)
            columns[FLOORS[0]] = (test_x, test_labels, train_x[some_train], train_labels[some_train])
            columns[FLOORS[1]] = (test_x[half], test_labels[half], test_x[other_half], test_labels[other_half])
        for name, (real, real_labels, x, x_labels) in columns.items():
            row = compare(train_x, real, x, seed=seed)
            if label_key is not None:
                pooled, each = compare_labels(train_x, train_labels, real, real_labels, x, x_labels, seed=seed)
                row |= pooled
                for label, label_row in each.items():
                    for metric, value in label_row.items():
                        per_type[label][name][metric].append(value)
            if parity:
                row |= paper_parity(real, x)
            for metric, value in row.items():
                metrics[name][metric].append(value)
    return {
        "num_train": train.n_obs,
        "num_test": test.n_obs,
        "num_genes": len(var_names),
        "label_key": label_key,
        "metrics": {name: dict(row) for name, row in metrics.items()},
        "per_type": {
            label: {
                "num_train": int((train_labels == label).sum()),
                "num_test": int((test_labels == label).sum()),
                "metrics": {name: dict(row) for name, row in columns.items()},
            }
            for label, columns in per_type.items()
        },
    }


def same_labels(train_labels: np.ndarray, test_labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Positions of as many training cells as test cells, with the same labels where there are enough."""
    shuffled = rng.permutation(len(train_labels))
    chosen = []
    for label, number in zip(*np.unique(test_labels, return_counts=True)):
        chosen.append(shuffled[train_labels[shuffled] == label][:number])
    chosen = np.concatenate(chosen)
    others = shuffled[~np.isin(shuffled, chosen)]
    return np.concatenate([chosen, others[: len(test_labels) - len(chosen)]])


def _halves(labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Positions of two halves with the same labels; of an odd number of cells one is left out."""
    halves = [[], []]
    for label in np.unique(labels):
        cells = rng.permutation(np.flatnonzero(labels == label))
        for half, part in zip(halves, cells[: len(cells) // 2 * 2].reshape(2, -1)):
            half.append(part)
    return np.concatenate(halves[0]), np.concatenate(halves[1])


def to_markdown(report: dict) -> str:
    """The report of [`evaluate`] as tables, mean ± standard deviation over samples: all cells, then by cell type."""
    columns = report["metrics"]
    num_seeds = len(next(iter(columns["generated"].values())))

    def cell(values: list[float] | None) -> str:
        if not values or np.isnan(values).all():
            return "–"
        return f"{np.nanmean(values):.3f} ± {np.nanstd(values):.3f}"

    lines = [
        f"Against {report['num_test']} held-out cells, {report['num_genes']} genes; mean ± standard deviation of"
        f" {num_seeds} samples of as many cells.",
        "",
        "| metric | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for metric, title in TITLES.items():
        if metric in columns["generated"]:
            lines.append(f"| {title} | " + " | ".join(cell(row.get(metric)) for row in columns.values()) + " |")
    if report["per_type"]:
        titles = ["type", "training cells", "held out", *(TITLES[metric] for metric in PER_TYPE)]
        lines += [
            "",
            f"By `{report['label_key']}`, types of at least 30 training cells; in brackets the training-cell floor.",
            "",
            "| " + " | ".join(titles) + " |",
            "|---" * len(titles) + "|",
        ]
        for label, entry in report["per_type"].items():
            row = [label, str(entry["num_train"]), str(entry["num_test"])]
            for metric in PER_TYPE:
                value = cell(entry["metrics"]["generated"].get(metric))
                floor_values = entry["metrics"].get(FLOORS[0], {}).get(metric)
                row.append(value + (f" ({np.nanmean(floor_values):.3f})" if floor_values else ""))
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"
