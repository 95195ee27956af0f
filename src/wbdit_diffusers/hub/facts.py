"""Facts on a model card that a pipeline's configuration doesn't hold: data, training and quality."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


TRAINING_NAME = "training.json"  # written at the end of a training
REPORT_NAME, FIGURE_NAME = "report.json", "report.png"  # written by `wbdit evaluate`
HIGH_EXCESS = 0.2  # of the AUC; then cells are easy to distinguish from real ones
STATED = ("data_name", "data_license", "data_source", "num_cells", "command", "training")  # in training.json


@dataclass(frozen=True)
class CardFacts:
    """Facts about a model that its configuration doesn't hold. The card calls those that are `None` "not stated"."""

    data_name: str | None = None
    data_license: str | None = None
    data_source: str | None = None  # accession or address
    num_cells: int | None = None  # of the training
    command: str | None = None  # that trained the model
    training: dict[str, Any] | None = None  # rows of the table of the training
    report: dict[str, Any] | None = None  # of `wbdit evaluate`
    figure: str | None = None  # name of the report's file


def read_facts(folder: Path, num_genes: int, report: Path | None = None, **given) -> CardFacts:
    """The facts in a pipeline's folder and in `report`, replaced by those `given` that are not `None`."""
    training, path = folder / TRAINING_NAME, report_path(folder, report)
    record = json.loads(training.read_text()) if training.is_file() else {}
    facts: dict[str, Any] = {name: record.get(name) for name in STATED}
    facts |= {name: value for name, value in given.items() if value is not None}
    if report is not None or path.is_file():
        facts["report"] = read_report(path, num_genes)
        facts["figure"] = FIGURE_NAME if path.with_name(FIGURE_NAME).is_file() else None
    return CardFacts(**facts)


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


def report_path(folder: Path, report: Path | None) -> Path:
    """The report.json of a pipeline: `report`, a file or folder, or the one in the pipeline's `folder`."""
    path = folder if report is None else report
    return path / REPORT_NAME if path.is_dir() else path


def read_warning(folder: str | Path) -> str:
    """Says why the pipeline in a folder is not fit for use: a short training or a high excess. `""` if neither."""
    paths = (Path(folder, name) for name in (TRAINING_NAME, REPORT_NAME))
    training, report = (json.loads(path.read_text()) if path.is_file() else {} for path in paths)
    warning = (training.get("training") or {}).get("warning", "")
    excess = report.get("excess", {}).get("generated", {}).get("mean") or 0
    if excess > HIGH_EXCESS:
        warning += " A classifier separates its cells from held-out cells more easily than real cells, by"
        warning += f" {excess:.2f} (AUC)."
    return f"This pipeline is not fit for use: {warning.strip()}" if warning else ""


def write_training(folder: Path, config: dict[str, Any], command: str | None, num_cells: int, table: dict[str, Any]):
    """Writes how a pipeline was trained into its folder, for the model card. `config` must not contain paths."""
    data = {name: config.get(name) for name in STATED[:3]}
    record = {"command": command, "num_cells": num_cells, "training": table, "config": config, **data}
    (folder / TRAINING_NAME).write_text(json.dumps(record, indent=1, default=str))
