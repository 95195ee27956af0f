"""Quality of a model on its card, from the report of `wbdit evaluate`. `evaluation` is slow to import."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult


METRICS = "auc_forest auc_boosting auc_regression membership_auc membership_auc_donor nearest_training_cell".split()


def read_report(path: Path, num_genes: int) -> dict[str, Any]:
    """The report.json of a model with `num_genes` genes. Raises a `ValueError` if it is not one of this model."""
    try:
        report = json.loads(path.read_text())
        report["metrics"]["generated"], report["excess"]["generated"], report["num_samples"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no report of `wbdit evaluate` for one model: give its report.json.") from error
    if report["num_genes"] != num_genes:
        raise ValueError(f"{path} judged {report['num_genes']} genes, and this model has {num_genes}: judge this one.")
    return report


def quality_table(report: dict[str, Any]) -> str:
    """The verdict and the card's metrics as Markdown."""
    from ..evaluation.table import describe_samples, metric_table, verdict

    described = f"{verdict(report)} {describe_samples(report)} All metrics are in `report.json`."
    return f"{described}\n\n{metric_table(report, METRICS)}"


def eval_results(report: dict[str, Any], data_name: str) -> list[EvalResult]:
    """The card's metrics as metadata, from which the Hub makes its `model-index`."""
    from ..evaluation.table import EXCESS, GENERATED, REFERENCE, TITLES

    ours, reference = report["metrics"][GENERATED], report["metrics"][REFERENCE]
    values = {"excess": (report["excess"][GENERATED]["mean"], EXCESS)}
    values |= {metric: (_mean(ours[metric]), TITLES[metric]) for metric in METRICS if metric in ours}
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
        if not np.isnan(value)
    ]


def memory(report: dict[str, Any] | None) -> str:
    """The measured memorisation in a sentence."""
    metrics = report["metrics"]["generated"] if report else {}
    ours = {name: _mean(metrics[name]) for name in METRICS if name in metrics}
    if "membership_auc" not in ours:
        return "not measured."
    donor = "membership_auc_donor"
    donors = f" Donors of training cells are separated from others with {ours[donor]:.3f}." if donor in ours else ""
    return (
        "the distance to the nearest generated cell separates training cells from held-out cells with an AUC of"
        f" {ours['membership_auc']:.3f} (0.5 = not at all).{donors} Generated cells are"
        f" {ours['nearest_training_cell']:.2f} times as far from the nearest training cell as held-out cells are."
        " Stronger attacks were not tried."
    )


def _mean(values: list[float | None]) -> float:
    """The mean without NaN, which is `None` in JSON."""
    return float(np.nanmean(np.array(values, dtype=float)))
