"""The cells of a training that come from an AnnData file too large for memory, in which the values stay."""

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from diffusers.utils import logging

from ..data import dataset
from ..data.backed import BackedFile, BackedSource
from ..data.split import CellSplit
from .cells import split_cells
from .config import TrainingConfig
from .prepared import MAX_TEST_CELLS
from .run import hash_of


logger = logging.get_logger(__name__)


def backed_file(source: str | Path | ad.AnnData | None, config: TrainingConfig) -> BackedFile | None:
    """The file that a training is asked for, if it has more cells than are kept in memory and can be read by cell."""
    source = config.dataset if source is None else source
    if source is None or isinstance(source, ad.AnnData):
        return None
    path = Path(source)
    if path.suffix not in (".h5ad", ".zarr") or not path.exists():
        return None
    try:
        file = BackedFile(path, config.layer)
    except ValueError:  # what is wrong with it is said by those who read it whole; stored by gene, it can be read so
        return None
    return file if len(file.obs) > dataset.MAX_CELLS_IN_MEMORY else None


def open_backed(
    file: BackedFile, config: TrainingConfig, origin: Path | None
) -> tuple[BackedSource, ad.AnnData, CellSplit]:
    """
    Training cells on disk, held-out cells in memory (some, if there are many), and which are which.

    Args:
        file ([`BackedFile`]): The file.
        config ([`TrainingConfig`]): Says which labels to condition on, and which cells to hold out.
        origin (`Path`, *optional*): The run to go on with, whose split it is.

    Raises:
        ValueError: If a label is missing, or the cells can't be split.
    """
    for key in config.label_keys:
        if key not in file.obs:
            raise ValueError(f"--label_keys: `adata.obs` has no column {key!r}; it has {list(file.obs)}.")
    is_empty = file.num_values == 0
    if is_empty.any() and not is_empty.all():
        logger.warning(f"{is_empty.sum()} of {len(file.obs)} cells are empty and left out.")
    rows = np.flatnonzero(~is_empty)
    split = split_cells(ad.AnnData(obs=file.obs.iloc[rows]), config, origin)
    train_rows, test_rows = (np.sort(file.obs.index.get_indexer(names)) for names in (split.train, split.test))
    if len(test_rows) > MAX_TEST_CELLS:
        chosen = np.random.default_rng(config.seed).choice(test_rows, MAX_TEST_CELLS, replace=False)
        test_rows = np.sort(chosen)
    return BackedSource(file, train_rows), BackedSource(file, test_rows).read(), split


def describe_backed(file: BackedFile, config: TrainingConfig) -> dict[str, Any]:
    """What a resumed run compares: names, labels, how many genes each cell has, and the values of some cells."""
    some = file.read(0, min(len(file.obs), 1000))
    return {
        "number of cells": len(file.obs),
        "number of genes": len(file.var),
        "names of the cells": hash_of(file.obs.index),
        "names of the genes": hash_of(file.var.index),
        "values": hash_of([file.num_values.tobytes(), some.data.astype(np.float32).tobytes(), some.indices.tobytes()]),
        **{f"labels in {key!r}": hash_of(file.obs[key]) for key in config.label_keys},
    }
