"""The cells of a training that come from an AnnData file too large for memory, in which the values stay."""

from pathlib import Path

import anndata as ad
import numpy as np
from diffusers.utils import logging
from tqdm.auto import tqdm

from ..data import latents
from ..data.backed import BackedFile, BackedSource, StoredByGeneError, num_cells_of
from ..data.source import CHUNK_SIZE
from ..data.split import CellSplit
from .cells import check_dtype, check_largest, split_cells
from .config import TrainingConfig
from .prepared import MAX_TEST_CELLS


logger = logging.get_logger(__name__)


def backed_file(source: str | Path | ad.AnnData | None, config: TrainingConfig) -> BackedFile | None:
    """
    The opened file that a training is asked for, if it has more cells than are kept in memory and can be read by cell.

    Raises:
        ValueError: If it is such a file, and has no such layer, or is damaged.
    """
    source = config.dataset if source is None else source
    if source is None or isinstance(source, ad.AnnData):
        return None
    num_cells = num_cells_of(Path(source))
    if num_cells is None or num_cells <= latents.MAX_CELLS_IN_MEMORY:
        return None
    try:
        return BackedFile(source, config.layer)
    except StoredByGeneError as error:
        logger.warning(f"The whole file is read into memory: {error}")
        return None


def open_backed(file: BackedFile, config: TrainingConfig) -> tuple[BackedSource, ad.AnnData, CellSplit]:
    """
    Training cells on disk, held-out cells in memory (some, if there are many), which are which, and what a resumed run
    compares: the same as if all were in memory.

    Args:
        file ([`BackedFile`]): The file.
        config ([`TrainingConfig`]): Says which labels to condition on, and which cells to hold out.

    Raises:
        ValueError: If a label is missing, values are none that can be modelled, or the cells can't be split.
    """
    for key in config.label_keys:
        if key not in file.obs:
            raise ValueError(f"--label_keys: `adata.obs` has no column {key!r}; it has {list(file.obs)}.")
    check_dtype(file.matrix.dtype, file.name)
    is_empty = _look(file)
    if is_empty.any() and not is_empty.all():
        logger.warning(f"{is_empty.sum()} of {len(file.obs)} cells are empty and left out.")
    rows = np.flatnonzero(~is_empty)
    obs = file.obs.iloc[rows]
    split = split_cells(ad.AnnData(obs=obs), config)
    train_rows, test_rows = (np.sort(rows[obs.index.get_indexer(names)]) for names in (split.train, split.test))
    if len(test_rows) > MAX_TEST_CELLS:
        chosen = np.random.default_rng(config.seed).choice(test_rows, MAX_TEST_CELLS, replace=False)
        test_rows = np.sort(chosen)
    return BackedSource(file, train_rows), BackedSource(file, test_rows).read(), split


def _look(file: BackedFile) -> np.ndarray:
    """Which cells are empty `(cells,)`, and the totals of cells and of genes, in one pass."""
    is_empty = []
    with tqdm(total=len(file.obs), desc="Looking at the cells", unit=" cells", mininterval=1) as progress_bar:
        for start in range(0, len(file.obs), CHUNK_SIZE):
            matrix = file.read(start, min(start + CHUNK_SIZE, len(file.obs)))
            check_largest(matrix.data.max(initial=0), file.name)
            matrix.eliminate_zeros()
            is_empty.append(np.diff(matrix.indptr) == 0)
            progress_bar.update(matrix.shape[0])
    return np.concatenate(is_empty)
