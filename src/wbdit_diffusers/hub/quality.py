"""What a model card says of a report of `wbdit evaluate`: a table with references, and the Hub's `model-index`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult

from .markdown import as_text, table


GENERATED, REFERENCE = "generated", "real reference"  # columns of a report
METRICS = {
    "auc_forest": "told from held-out cells by a random forest (AUC, 0.5 = not at all)",
    "auc_boosting": "… by gradient boosting on counts (AUC)",
    "auc_regression": "… by logistic regression on 50 PCs (AUC)",
    "membership_auc": "training cells recognised by nearness (AUC, 0.5 = no memory, 1 = copies)",
    "membership_auc_donor": "training donors recognised by nearness (AUC, 0.5 = no memory)",
    "nearest_training_cell": "distance to the nearest training cell, ratio to held-out cells (0 = copies)",
}
EXCESS = "excess: AUC of the best classifier above the real reference's (0 = as good as real)"


def read_report(path: Path, num_genes: int) -> dict[str, Any]:
    """
    Reads a report.json, or that of the folder that `wbdit evaluate` wrote.

    Args:
        path (`Path`): The file or the folder.
        num_genes (`int`): Genes of the model that the report must be of.

    Raises:
        OSError: If there is none.
        ValueError: If the file is no such report, or one of another model.
    """
    path = path / "report.json" if path.is_dir() else path
    if not path.is_file():
        raise OSError(f"There is no report {path}: give what `wbdit evaluate` wrote.")
    try:
        report = json.loads(path.read_text())
        quality_table(report)
        eval_results(report, "data")
        memory(report)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no report of `wbdit evaluate`: give its report.json.") from error
    if report["num_genes"] != num_genes:
        raise ValueError(
            f"{path} is of another model: it judged {report['num_genes']} genes, and this model makes {num_genes}."
        )
    return report


def quality_table(report: dict[str, Any]) -> str:
    """The headline, and the metrics beside the real reference and the baselines, as Markdown."""
    columns, best = report["metrics"], report["excess"][GENERATED]
    num_test, num_samples, num_genes = (int(report[name]) for name in ("num_test", "num_samples", "num_genes"))
    spread = f"Mean ± standard deviation over {num_samples} samples" if num_samples > 1 else "One sample"
    names = [GENERATED, REFERENCE, *(name for name in columns if name not in (GENERATED, REFERENCE))]
    rows = [[EXCESS, *(_excess(report, name) for name in names)]]
    for metric, title in METRICS.items():
        if metric in columns[GENERATED]:
            rows.append([title, *(_mean_and_sd(columns[name].get(metric)) for name in names)])
    return (
        f"The best of three classifiers ({as_text(best['judge'])}) tells generated cells from {num_test} held-out"
        f" ones better than real cells by **{_excess(report, GENERATED)}** (AUC), where 0 is as good as real."
        f" {spread} of {num_test} cells and"
        f" {num_genes} genes. The real reference is as many training cells of the same labels, judged in the"
        " same way: what can be reached. All metrics are in `report.json`.\n\n"
        + table(["metric", *map(as_text, names)], rows)
    )


def eval_results(report: dict[str, Any], data_name: str) -> list[EvalResult]:
    """The same for the metadata of the card, from which the Hub makes its `model-index`."""
    values = {"excess": (report["excess"][GENERATED]["mean"], EXCESS)}
    for metric, title in METRICS.items():
        ours = report["metrics"][GENERATED].get(metric)
        if ours is not None and not np.isnan(np.asarray(ours, dtype=float)).all():
            values[metric] = (_mean(ours), title.removeprefix("… "))
    reference = report["metrics"][REFERENCE]
    return [
        EvalResult(
            task_type="single-cell-generation",
            task_name="Generation of single-cell RNA-seq data",
            dataset_type="scRNA-seq",
            dataset_name=data_name,
            dataset_split="held-out cells",
            metric_type=metric,
            metric_name=title,
            metric_value=round(value, 4),
            metric_args={"real_reference": round(_mean(reference[metric]), 4)} if metric in reference else None,
        )
        for metric, (value, title) in values.items()
    ]


def memory(report: dict[str, Any] | None) -> str:
    """What was measured of memorisation, in a sentence."""
    ours = (report or {"metrics": {GENERATED: {}}})["metrics"][GENERATED]
    if "membership_auc" not in ours:
        return "not measured."
    sentence = (
        f"by the distance to the nearest generated cell, training cells are told from held-out ones with an AUC of"
        f" {_mean(ours['membership_auc']):.3f} (0.5 = not at all)"
    )
    if "membership_auc_donor" in ours:
        sentence += f", and donors with {_mean(ours['membership_auc_donor']):.3f}"
    if "nearest_training_cell" in ours:
        sentence += (
            f"; the nearest training cell is {_mean(ours['nearest_training_cell']):.2f} times as far as from a"
            " held-out cell"
        )
    return f"{sentence}. Stronger attacks were not tried."


def _excess(report: dict[str, Any], name: str) -> str:
    excess = report["excess"].get(name)
    if excess is None:
        return "–"
    return f"{excess['mean']:.3f} ± {excess['sd']:.3f}" if report["num_samples"] > 1 else f"{excess['mean']:.3f}"


def _mean_and_sd(values: list[float | None] | None) -> str:
    """What is NaN, or `None` in JSON, is left out; a single value has no spread."""
    numbers = np.array([] if values is None else values, dtype=float)
    if np.isnan(numbers).all():
        return "–"
    return f"{np.nanmean(numbers):.3f}" + (f" ± {np.nanstd(numbers):.3f}" if len(numbers) > 1 else "")


def _mean(values: list[float | None]) -> float:
    return float(np.nanmean(np.array(values, dtype=float)))
