"""A report as Markdown and as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Template

from ..hub.facts import HIGH_EXCESS


GENERATED, REFERENCE = "generated", "real reference"
EXCESS = "excess: AUC of the best classifier minus that of real training cells (0 = as good as real)"
TITLES = {
    "auc_forest": "random forest separates them from held-out cells (AUC, 0.5 = not at all)",
    "auc_boosting": "gradient boosting on counts (AUC)",
    "auc_regression": "logistic regression on 50 PCs (AUC)",
    "w2": "2-Wasserstein distance, 30 PCs",
    "mmd2": "MMD², 30 PCs",
    "mean_pearson": "gene means: Pearson correlation",
    "mean_spearman": "gene means: Spearman correlation",
    "variance_pearson": "gene variances: Pearson correlation",
    "variance_ratio": "total variance, ratio to held-out cells",
    "zero_fraction_error": "fraction of zeros per gene: mean absolute error",
    "gene_correlation": "gene-gene correlations: Pearson correlation",
    "library_size_w1": "log library size: 1-Wasserstein distance",
    "other_genes_mean_error": "fraction of counts in other genes: error of the mean",
    "other_genes_w1": "fraction of counts in other genes: 1-Wasserstein distance",
    "precision": "precision (generated cells near real cells)",
    "recall": "recall (real cells near generated cells)",
    "density": "density (1 = as dense as real cells)",
    "coverage": "coverage (real cells with a generated neighbour)",
    "nearest_training_cell": "distance to the nearest training cell, ratio to held-out cells (0 = copies)",
    "membership_auc": "membership inference of training cells (AUC, 0.5 = no memory, 1 = copies)",
    "membership_auc_donor": "membership inference of training donors (AUC, 0.5 = no memory)",
    "purity": "cells classified as their type, ratio to held-out cells",
    "f1": "F1 on held-out cells of a type classifier trained on these cells",
    "lfc_slope": "marker log fold changes, slope (1 = as strong as real)",
    "de_recovery": "marker genes recovered, fraction",
}

SUMMARY = ("coverage", "purity", "lfc_slope", "gene_correlation", "variance_ratio", "membership_auc")
CLASSIFIERS = {"forest": "A random forest", "boosting": "Gradient boosting", "regression": "Logistic regression"}
MIXTURE = "Gaussian mixture per label"
# What an excess means, up to a limit. Beyond the last one, cells are not fit for use.
VERDICTS = {
    0.03: "As real as training cells, as far as three classifiers can see.",
    0.1: "Close to real cells.",
    HIGH_EXCESS: "Distinguishable from real cells.",
}
NOT_FIT = "Easily distinguished from real cells: do not use them."


def to_markdown(report: dict) -> str:
    """A report of [`evaluate_cells`] as Markdown: the [`summary`], and all numbers, folded."""
    types = report["per_type"] if GENERATED in report["generators"] else {}
    shown = dict.fromkeys(metric for entry in types.values() for metric in entry["metrics"].get(GENERATED, {}))
    names = {"types": types, "shown": shown, "titles": TITLES}
    names |= {"summary": summary(report), "samples": describe_samples(report), "table": metric_table(report)}
    return _render("report", report=report, mean_and_sd=mean_and_sd, **names) + "\n"


def _render(name: str, **values: Any) -> str:
    """One of the templates beside this file."""
    path = Path(__file__).parent / f"{name}_template.md"
    return Template(path.read_text(encoding="utf-8")).render(**values)


def summary(report: dict) -> str:
    """The [`verdict`], and a table of six rows."""
    best = by_excess(report)[0]
    shown = [metric for metric in SUMMARY if metric in report["metrics"][best]][:4]
    table = metric_table(report, [f"auc_{report['excess'][best]['judge']}", *shown])
    return f"{verdict(report)}\n\n{table}"


def verdict(report: dict) -> str:
    """How real the cells of the best generator are, compared with real cells and with the Gaussian mixture."""
    name = by_excess(report)[0]
    excess, judge = report["excess"][name], report["excess"][name]["judge"]
    words = next((words for limit, words in VERDICTS.items() if excess["mean"] <= limit), NOT_FIT)
    ours, real = (np.nanmean(report["metrics"][column][f"auc_{judge}"]) for column in (name, REFERENCE))
    values = {"words": words, "classifier": CLASSIFIERS[judge], "column": name, "ours": ours, "real": real}
    if MIXTURE in report["excess"]:
        values["mixture"] = excess_and_sd(report, MIXTURE)
        values["is_worse"] = excess["mean"] > report["excess"][MIXTURE]["mean"] + excess["sd"]
    return " ".join(_render("verdict", report=report, excess=excess_and_sd(report, name), **values).split())


def describe_samples(report: dict) -> str:
    """A paragraph that explains the numbers of a table."""
    return " ".join(_render("samples", report=report).split())


def metric_table(report: dict, metrics: Sequence[str] = tuple(TITLES)) -> str:
    """Excess and metrics as a Markdown table: the generators, the best first, the real reference, the baselines."""
    generators, columns = by_excess(report), report["metrics"]
    names = [*generators, REFERENCE, *(name for name in columns if name not in (*generators, REFERENCE))]
    rows = [["metric", *(name.replace("|", "\\|") for name in names)]]
    rows.append([f"**{EXCESS}**", *("–" if name == REFERENCE else excess_and_sd(report, name) for name in names)])
    shown = [metric for metric in metrics if any(metric in columns[name] for name in generators)]
    rows += [[TITLES[metric], *(mean_and_sd(columns[name].get(metric)) for name in names)] for metric in shown]
    if len(generators) == 1:
        differences = ["generated minus reference", "–"]
        for metric in shown:
            ours, real = (np.array(columns[name].get(metric, [np.nan]), dtype=float) for name in names[:2])
            differences.append(mean_and_sd(ours - real[: len(ours)]))
        rows = [[*row, difference] for row, difference in zip(rows, differences)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def excess_and_sd(report: dict, name: str) -> str:
    """The excess of a column: `0.112 ± 0.058`, or `0.112` for a single sample."""
    excess = report["excess"][name]
    is_one = len(report["metrics"][name]["auc_forest"]) == 1
    return f"{excess['mean']:.3f}" if is_one else f"{excess['mean']:.3f} ± {excess['sd']:.3f}"


def mean_and_sd(values: Sequence[float | None] | None) -> str:
    """`0.585 ± 0.029`, or `0.585` for a single value. NaN, which is `None` in JSON, is left out."""
    numbers = np.array([] if values is None else values, dtype=float)
    if np.isnan(numbers).all():
        return "–"
    mean, sd = np.nanmean(numbers), np.nanstd(numbers)
    if len(numbers) == 1:
        return f"{mean:.1e}" if 0 < abs(mean) < 0.005 else f"{mean:.3f}"
    # Three decimals, or two digits of smaller numbers, such as MMD² between similar cells
    return f"{mean:.1e} ± {sd:.0e}" if 0 < abs(mean) < 0.005 else f"{mean:.3f} ± {sd:.3f}"


def to_json(report: Any, indent: int | None = 1) -> str:
    """A report as JSON. NaN, which JSON does not have, becomes `null`. Without `indent`, it is one line."""
    without_nan = json.loads(json.dumps(report), parse_constant=lambda name: None)
    return json.dumps(without_nan, indent=indent, allow_nan=False)


def by_excess(report: dict) -> list[str]:
    """The generators, the best first."""
    return sorted(report["generators"], key=lambda name: report["excess"][name]["mean"])
