"""The cells of a training that come from a prepared folder, which is split already."""

from pathlib import Path

import anndata as ad

from ..data.prepared import PreparedCells, is_prepared
from ..data.split import CellSplit
from .cells import MIN_CELLS
from .config import TrainingConfig


MAX_TEST_CELLS = 10_000  # that the loss of held-out cells is measured on


def prepared_folder(source: str | Path | ad.AnnData | None, config: TrainingConfig) -> str | Path | None:
    """The prepared folder that a training is asked for, if it is one; else `None`."""
    if source is not None and config.dataset is not None:
        raise ValueError("Give the cells once: as `source`, or as --dataset.")
    source = config.dataset if source is None else source
    return None if source is None or isinstance(source, ad.AnnData) or not is_prepared(source) else source


def open_prepared(folder: str | Path, config: TrainingConfig) -> tuple[PreparedCells, ad.AnnData, CellSplit]:
    """
    Training cells on disk, held-out cells in memory (some, if there are many), and what to write to split.json.

    Args:
        folder (`str` or `Path`): What `wbdit prepare` wrote.
        config ([`TrainingConfig`]): Says what the cells hold, and which labels to condition on.

    Raises:
        ValueError: If the folder is not what the configuration says, or a flag has no effect on it.
        OSError: If it can't be read.
    """
    for name in ("layer", "split", "test_fraction"):
        if getattr(config, name) != getattr(TrainingConfig, name):
            raise ValueError(f"--{name} has no effect on {folder}, which `wbdit prepare` has split: leave it out.")
    train = PreparedCells(folder)
    if train.metadata["values"] != config.values:
        values = train.metadata["values"]
        raise ValueError(f"{folder} was prepared with --values {values}: train with --values {values}.")
    if "test" not in train.metadata["splits"]:
        raise ValueError(f"{folder} has no held-out cells: prepare it with a --test_fraction above 0.")
    num_cells = int(train.group_sizes.sum())
    if num_cells < MIN_CELLS:
        raise ValueError(f"{num_cells} training cells are too few to learn from: {MIN_CELLS} are the least.")
    for key in config.label_keys:
        if key not in train.metadata["labels"]:
            known = ", ".join(train.metadata["labels"]) or "none"
            raise ValueError(f"{folder} has no label {key!r}, only {known}: prepare it with --label_keys {key}.")
    test = PreparedCells(folder, "test").sample(MAX_TEST_CELLS, config.seed)
    return train, test, CellSplit([], [], train.metadata["seed"], train.fingerprint)
