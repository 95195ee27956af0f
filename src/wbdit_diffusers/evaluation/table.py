"""A report as Markdown, for people."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np


GENERATED, REFERENCE = "generated", "real reference"
TITLES = {
    "auc_forest": "told from held-out cells by a random forest (AUC, 0.5 = not at all)",
    "auc_boosting": "… by gradient boosting on counts (AUC)",
    "auc_regression": "… by logistic regression on 50 PCs (AUC)",
    "w2": "distance of distributions: 2-Wasserstein, 30 PCs",
    "mmd2": "distance of distributions: MMD², 30 PCs",
    "mean_pearson": "mean of each gene: Pearson correlation",
    "mean_spearman": "mean of each gene: Spearman correlation",
    "variance_pearson": "variance of each gene: Pearson correlation",
    "variance_ratio": "total variance, ratio to held-out cells",
    "zero_fraction_error": "share of zeros of each gene: mean absolute error",
    "gene_correlation": "correlations between genes: Pearson correlation",
    "library_size_w1": "log library size: 1-Wasserstein",
    "other_genes_mean_error": "share of counts outside the judged genes: error of its mean",
    "other_genes_w1": "share of counts outside the judged genes: 1-Wasserstein",
    "precision": "precision (generated cells that lie among real ones)",
    "recall": "recall (real cells that lie among generated ones)",
    "density": "density (1 = as dense as real cells)",
    "coverage": "coverage (real cells with a generated neighbour)",
    "nearest_training_cell": "distance to the nearest training cell, ratio to held-out cells (0 = copies)",
    "membership_auc": "training cells recognised by nearness (AUC, 0.5 = no memory, 1 = copies)",
    "membership_auc_donor": "training donors recognised by nearness (AUC)",
    "purity": "cells recognised as their type, ratio to held-out cells",
    "f1": "F1 on held-out cells of a type classifier trained on these cells",
    "lfc_slope": "log fold changes of marker genes, slope (1 = as strong as real)",
    "de_recovery": "marker genes found again, share",
    "paper_kl": "paper parity: KL of paired rows",
    "paper_wasserstein": "paper parity: flattened Wasserstein-1",
    "paper_mmd": "paper parity: MMD² by blocks of 20 genes",
}
PER_TYPE = ("purity", "lfc_slope", "de_recovery", "w2", "mmd2", "library_size_w1")


def to_markdown(report: dict) -> str:
    """
    A report as Markdown: the headline in a sentence, all metrics in a table, and the cell types in another one.

    Args:
        report (`dict`): What [`evaluate_cells`] returns.

    Returns:
        `str`
    """
    columns = report["metrics"]
    ours, real = columns[GENERATED], columns[REFERENCE]
    others = [name for name in columns if name not in (GENERATED, REFERENCE)]
    lines = [*_headline(report), ""]
    titles = ["metric", "generated", "real reference", "difference", *others]
    lines += ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for metric, title in TITLES.items():
        if metric in ours:
            difference = np.subtract(ours[metric], real[metric]) if metric in real else None
            cells = [ours[metric], real.get(metric), difference, *(columns[name].get(metric) for name in others)]
            lines.append(f"| {title} | " + " | ".join(mean_and_sd(values) for values in cells) + " |")
    cells = [excess_and_sd(report, name) for name in (GENERATED, *others)]
    lines.append(f"| **excess: AUC of the best classifier over the real reference's** | {cells[0]} | – | – | ")
    lines[-1] += "".join(f"{cell} | " for cell in cells[1:])
    lines[-1] = lines[-1].rstrip()
    if report["per_type"]:
        lines += ["", *_table_of_types(report)]
    return "\n".join(lines) + "\n"


def _headline(report: dict) -> list[str]:
    best = report["excess"][GENERATED]
    ours, real = (np.mean(report["metrics"][name][f"auc_{best['judge']}"]) for name in (GENERATED, REFERENCE))
    num_test, num_samples = report["num_test"], report["num_samples"]
    spread = f"Mean ± standard deviation over {num_samples} samples" if num_samples > 1 else "One sample"
    lines = [
        f"The best of three classifiers ({best['judge']}) tells generated cells from {num_test} held-out ones with an"
        f" AUC of {ours:.3f}, and real cells that were not held out with {real:.3f}: an excess of"
        f" **{excess_and_sd(report, GENERATED)}**, where 0 is as good as real.",
        "",
        f"{spread} of {num_test} cells and {report['num_genes']} genes."
        " The real reference is as many training cells of the same labels, judged in the same way: what can be"
        f" reached. Trained on {num_test} cells a side, classifiers overlook what they would see with more; an excess"
        " near 0 says no more than that.",
    ]
    if report["within_genes"]:
        lines += [
            "",
            f"All cells are judged as if these {report['num_genes']} genes were all: the real ones have no others, or"
            " the generated ones do not say how many counts they have in others.",
        ]
    return lines


def excess_and_sd(report: dict, name: str) -> str:
    """The excess of a column: `0.112 ± 0.058`, or `0.112` of a single sample."""
    excess = report["excess"][name]
    return f"{excess['mean']:.3f} ± {excess['sd']:.3f}" if report["num_samples"] > 1 else f"{excess['mean']:.3f}"


def to_json(report: dict, indent: int | None = 1) -> str:
    """A report as JSON, which has no NaN: what could not be measured is `null`. Without `indent` it is one line."""

    def without_nan(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_nan(one) for key, one in value.items()}
        if isinstance(value, list):
            return [without_nan(one) for one in value]
        return None if isinstance(value, float) and not np.isfinite(value) else value

    return json.dumps(without_nan(report), indent=indent, allow_nan=False)


def mean_and_sd(values: Sequence[float | None] | None) -> str:
    """`0.585 ± 0.029`; of one value, which has no spread, `0.585`. What is NaN, or `None` in JSON, is left out."""
    numbers = np.array([] if values is None else values, dtype=float)
    if np.isnan(numbers).all():
        return "–"
    mean, sd = np.nanmean(numbers), np.nanstd(numbers)
    if len(numbers) == 1:
        return f"{mean:.1e}" if 0 < abs(mean) < 0.005 else f"{mean:.3f}"
    # Three decimals, and two digits of what is smaller than that, as MMD² between cells that are much alike.
    return f"{mean:.1e} ± {sd:.0e}" if 0 < abs(mean) < 0.005 else f"{mean:.3f} ± {sd:.3f}"


def _table_of_types(report: dict) -> list[str]:
    types = report["per_type"]
    metrics = [name for name in PER_TYPE if any(name in entry["metrics"][GENERATED] for entry in types.values())]
    titles = [report["label_key"], "training cells", "held out", *(TITLES[metric] for metric in metrics)]
    lines = [
        f"By `{report['label_key']}`, types of at least 30 training cells; in brackets the real reference.",
        "",
        "| " + " | ".join(titles) + " |",
        "|---" * len(titles) + "|",
    ]
    for label, entry in types.items():
        row = [label, str(entry["num_train"]), str(entry["num_test"])]
        for metric in metrics:
            ours, real = (entry["metrics"].get(name, {}).get(metric) for name in (GENERATED, REFERENCE))
            has_reference = real is not None and not np.isnan(real).all()
            row.append(mean_and_sd(ours) + (f" ({np.nanmean(real):.3f})" if has_reference else ""))
        lines.append("| " + " | ".join(row) + " |")
    return lines
