"""What a model card says beyond the pipeline's own configuration: its data, its training, how good it was."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..data.split import CellSplit
from .quality import read_report


TRAINING_NAME = "training.json"  # what a training writes of itself when it is done
REPORT_NAME, FIGURE_NAME = "report.json", "report.png"  # what `wbdit evaluate` writes


@dataclass(frozen=True)
class CardFacts:
    """
    Args:
        data_name (`str`, *optional*): What the training data are called.
        data_license (`str`, *optional*): Their licence.
        data_source (`str`, *optional*): Their accession, or where they are.
        num_cells (`int`, *optional*): Number of training cells.
        command (`str`, *optional*): The command that trained the model.
        training (`dict[str, Any]`, *optional*): Rows of the training table.
        report (`dict`, *optional*): A report of `wbdit evaluate`.
        figure (`str`, *optional*): Name of the report's figure beside the card.
        variant (`str`, *optional*): Further weights in the repository, such as `"bf16"`.
        with_code (`bool`, defaults to `False`): Whether the repository has modules that Diffusers loads.
    """

    data_name: str | None = None
    data_license: str | None = None
    data_source: str | None = None
    num_cells: int | None = None
    command: str | None = None
    training: dict[str, Any] | None = None
    report: dict[str, Any] | None = None
    figure: str | None = None
    variant: str | None = None
    with_code: bool = False


def read_facts(
    folder: Path,
    num_genes: int,
    data_name: str | None = None,
    data_license: str | None = None,
    data_source: str | None = None,
    report: Path | None = None,
) -> CardFacts:
    """
    What the folder of a pipeline says: `training.json` and `split.json` of its training, `report.json` and
    `report.png` of `wbdit evaluate`. What it does not say stays unstated.

    Args:
        folder (`Path`): The folder of a pipeline.
        num_genes (`int`): Genes of the pipeline, which must be those of the report.
        data_name, data_license, data_source (`str`, *optional*): Instead of what the training was told.
        report (`Path`, *optional*): The report, or its folder, if it is not in `folder`.

    Raises:
        OSError: If `report` is not there.
        ValueError: If a file is damaged, or of another model.
    """
    facts = CardFacts()
    if (folder / TRAINING_NAME).is_file():
        facts = _read_training(folder / TRAINING_NAME)
    elif (folder / CellSplit.FILE_NAME).is_file():
        facts = replace(facts, num_cells=len(CellSplit.load(folder).train))
    facts = replace(
        facts,
        data_name=data_name or facts.data_name,
        data_license=data_license or facts.data_license,
        data_source=data_source or facts.data_source,
    )
    if report is not None or (folder / REPORT_NAME).is_file():
        figure = figure_of(folder, report)
        facts = replace(
            facts,
            report=read_report(report or folder / REPORT_NAME, num_genes),
            figure=FIGURE_NAME if figure.is_file() else None,
        )
    return facts


def figure_of(folder: Path, report: Path | None) -> Path:
    """Where the figure of a report is, if there is one."""
    if report is None:
        return folder / FIGURE_NAME
    return (report if report.is_dir() else report.parent) / FIGURE_NAME


def write_training(folder: Path, config: dict[str, Any], command: str, num_cells: int, table: dict[str, Any]):
    """Notes in the folder of a pipeline how it was trained, for its card. `config` must name no path."""
    data = {name: config.get(name) for name in ("data_name", "data_license", "data_source")}
    record = {"command": command, "num_cells": num_cells, "training": table, "config": config, **data}
    (folder / TRAINING_NAME).write_text(json.dumps(record, indent=1, default=str))


def _read_training(path: Path) -> CardFacts:
    names = ("data_name", "data_license", "data_source", "num_cells", "command", "training")
    try:
        record = json.loads(path.read_text())
        return CardFacts(**{name: record[name] for name in names})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: remove it, and the card will not state how was trained.") from error
