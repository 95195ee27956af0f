"""The cells of a training: opened once, checked and split before any work is done."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import anndata as ad
import numpy as np
from diffusers.utils import logging

from ..data import cells as data_cells
from ..data.cells import AnnDataSource, BackedSource, CellSource, NotByCellError, choose_groups
from ..data.prepared import PreparedCells, is_prepared
from ..data.read import read_cells
from ..data.split import CellSplit
from .config import TrainingConfig


logger = logging.get_logger(__name__)

MIN_CELLS = 10  # to train on
MAX_TEST_CELLS = 10_000  # for the validation loss


@contextmanager
def open_cells(
    source: str | Path | ad.AnnData | None, config: TrainingConfig
) -> Iterator[tuple[CellSource, ad.AnnData, CellSplit]]:
    """Training cells (in memory or an open file), at most 10,000 held-out cells, and their split. None is empty."""
    source = config.dataset if source is None else source
    if source is None:
        raise ValueError("--dataset is required.")
    if not isinstance(source, ad.AnnData) and not Path(source).is_file() and is_prepared(source):
        yield _open_prepared(source, config)
        return
    with _open(source, config) as cells:
        _check_number(len(cells.obs))
        is_empty = cells.empty_cells()
        if is_empty.any() and not is_empty.all():  # if all are, the processor says so
            logger.warning(f"{is_empty.sum()} of {len(is_empty)} cells are empty and left out.")
            cells = cells.take(np.flatnonzero(~is_empty))
        split = _split_to_keep(config)
        if split is None:
            label_key = config.label_keys[0] if config.label_keys else None
            copies = None if isinstance(cells, BackedSource) else cells.hash_cells()
            split = CellSplit.draw(cells, config.test_fraction, label_key, config.seed, copies)
        train, test = (np.sort(rows) for rows in split.rows(cells.obs.index))  # in the order of the file
        _check_number(len(train))
        if len(test) > MAX_TEST_CELLS:
            test = np.sort(np.random.default_rng(config.seed).choice(test, MAX_TEST_CELLS, replace=False))
        yield cells.take(train), cells.take(test).read(), split


def _open(source: str | Path | ad.AnnData, config: TrainingConfig):
    """A source of all cells for a `with` block. A file of many cells stays on disk."""
    layer, round_counts = config.layer, config.round_counts
    if isinstance(source, ad.AnnData):
        return nullcontext(AnnDataSource(source, layer, round_counts=round_counts))
    if Path(source).suffix in (".h5ad", ".zarr"):
        try:
            file = BackedSource(source, layer, round_counts)
            if len(file.obs) > data_cells.MAX_CELLS_IN_MEMORY:
                return file
            with file:
                return nullcontext(AnnDataSource(file.read(), layer, str(source)))
        except NotByCellError as error:
            logger.warning(f"The whole file is read into memory: {error}")
    return nullcontext(AnnDataSource(read_cells(source), layer, str(source), round_counts))


def _open_prepared(folder: str | Path, config: TrainingConfig) -> tuple[PreparedCells, ad.AnnData, CellSplit]:
    """The cells and the split of a folder that `wbdit prepare` wrote."""
    train, test = PreparedCells(folder), PreparedCells(folder, "test")
    _check_number(len(train.obs))
    split = CellSplit([], [], train.metadata["seed"], train.fingerprint)
    kept = _split_to_keep(config)
    if kept is not None and kept.prepared != split.prepared:
        raise ValueError(f"{folder} is not the prepared folder of the split to continue with: give that one.")
    return train, test.read(choose_groups(test.group_sizes, MAX_TEST_CELLS, config.seed)), split


def _split_to_keep(config: TrainingConfig) -> CellSplit | None:
    """The split of the run to resume, or of --split."""
    is_resumed = config.resume_from_checkpoint is not None and (config.output_dir / CellSplit.FILE_NAME).is_file()
    path = config.output_dir if is_resumed else config.split
    return None if path is None else CellSplit.load(path)


def _check_number(num_cells: int):
    if num_cells < MIN_CELLS:
        raise ValueError(f"{num_cells} training cells are too few to learn from: {MIN_CELLS} are the minimum.")
