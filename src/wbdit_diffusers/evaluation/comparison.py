"""Several generators' cells beside each other: one split, one judge, one table."""

from collections.abc import Sequence
from functools import reduce

import anndata as ad

from .report import check_gene_names, evaluate_columns
from .table import REFERENCE, excess_and_sd, mean_and_sd


METRICS = {
    "auc_forest": "forest",
    "auc_boosting": "boosting",
    "auc_regression": "regression",
    "w2": "W2",
    "variance_ratio": "variance",
    "zero_fraction_error": "zeros",
    "gene_correlation": "gene-gene",
    "recall": "recall",
    "membership_auc": "membership",
    "purity": "purity",
    "lfc_slope": "marker slope",
}


def compare_cells(
    generators: dict[str, list[ad.AnnData]],
    train: ad.AnnData,
    test: ad.AnnData,
    label_key: str | Sequence[str] | None = None,
    layer: str | None = None,
    values: str = "counts",
    seed: int = 0,
) -> dict:
    """
    Judges the cells of several generators on the same held-out cells, over the genes that all of them make.

    Args:
        generators (`dict[str, list[AnnData]]`):
            For each name as many samples, each of as many cells as `test` has, with its labels.
        train, test, label_key, layer, values, seed: See [`evaluate_cells`].

    Returns:
        `dict`: that of [`evaluate_cells`], whose columns have the generators' names.

    Raises:
        ValueError: If there are no two generators, a name is taken, they have no gene in common, or their cells can't
            be judged; see [`evaluate_cells`].
    """
    if len(generators) < 2:
        raise ValueError("Give at least two generators to compare; `wbdit evaluate` judges one.")
    if REFERENCE in generators:
        raise ValueError(f"A generator can't be called {REFERENCE!r}, which is another column's name: rename it.")
    every = [sample.var_names for samples in generators.values() for sample in samples]
    if not every:
        raise ValueError("There are no samples to judge: give at least one of each generator.")
    for name, samples in generators.items():
        for sample in samples:
            check_gene_names(sample, name)
    genes = reduce(lambda common, names: common[common.isin(names)], every)
    if genes.empty:
        raise ValueError(f"{', '.join(generators)} have no gene in common: give cells of the same genes.")
    columns = {name: [sample[:, genes].copy() for sample in samples] for name, samples in generators.items()}
    return evaluate_columns(columns, train, test, label_key, layer, values, seed=seed)


def comparison_to_markdown(report: dict) -> str:
    """
    A report of [`compare_cells`] as Markdown: generators by their excess, the best first, above real cells.

    Args:
        report (`dict`): What [`compare_cells`] returns.

    Returns:
        `str`
    """
    excess, metrics = report["excess"], report["metrics"]
    shown = {key: title for key, title in METRICS.items() if any(key in column for column in metrics.values())}
    num_samples = report["num_samples"]
    spread = f"Mean ± standard deviation of {num_samples} samples" if num_samples > 1 else "One sample of each"
    order = sorted(excess, key=lambda name: excess[name]["mean"])
    lines = [
        f"Excess: by how much the best of three classifiers tells a generator's cells from {report['num_test']}"
        " held-out ones better than it tells real training cells from them (AUC; 0 = as good as real, 0.5 = told apart"
        f" at once). {spread}, over {report['num_genes']} genes.",
        "",
        "| generator | excess | " + " | ".join(shown.values()) + " |",
        "|---" * (2 + len(shown)) + "|",
    ]
    for name in [*order, REFERENCE]:
        headline = "0 by definition"
        if name in excess:
            headline = f"**{excess_and_sd(report, name)}** ({excess[name]['judge']})"
        cells = [mean_and_sd(metrics[name].get(key)) for key in shown]
        title = name.replace("|", "\\|")
        lines.append(f"| {title} | {headline} | " + " | ".join(cells) + " |")
    if report["within_genes"]:
        lines += ["", f"All cells are judged as if these {report['num_genes']} genes were all."]
    return "\n".join(lines) + "\n"
