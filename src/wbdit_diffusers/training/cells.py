"""The cells of a training: read, looked at, and split, before any work is done."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata as ad
import numpy as np
from scipy import sparse

from ..data.io import drop_empty_cells, read_cells
from ..data.source import CellSource
from ..data.split import CellSplit
from .config import TrainingConfig


MIN_CELLS = 10  # to train on
MAX_VALUE = 2**31  # of a count: no protocol reads a molecule so often, and sums stay finite


@contextmanager
def open_cells(
    source: str | Path | ad.AnnData | None, config: TrainingConfig
) -> Iterator[tuple[ad.AnnData | CellSource, ad.AnnData, CellSplit]]:
    """Opens training cells, wherever they are stored, held-out cells in memory, and the split."""
    from .backed import backed_file, open_backed
    from .prepared import open_prepared, prepared_folder

    folder = prepared_folder(source, config)
    if folder is not None:
        yield open_prepared(folder, config)
        return
    file = backed_file(source, config)
    if file is not None:
        with file:
            yield open_backed(file, config)
        return
    adata = read_source(source, config)
    split = split_cells(adata, config)
    yield *split.apply(adata), split


def read_source(source: str | Path | ad.AnnData | None, config: TrainingConfig) -> ad.AnnData:
    """
    The cells without empty ones, after a look at what no later step could name.

    Raises:
        ValueError: If there are none or two sources, or the matrix is missing or of no numbers.
        OSError: If the file can't be read.
    """
    if source is not None and config.dataset is not None:
        raise ValueError("Give the cells once: as `source`, or as --dataset.")
    source = source if source is not None else config.dataset
    if source is None:
        raise ValueError("--dataset is required.")
    adata = source if isinstance(source, ad.AnnData) else read_cells(source)
    if not isinstance(source, ad.AnnData) and not isinstance(adata, ad.AnnData):
        raise ValueError(f"--dataset {source} holds no AnnData.")
    check_matrix(adata, config.layer)
    for key in config.label_keys:
        if key not in adata.obs:
            raise ValueError(f"--label_keys: `adata.obs` has no column {key!r}; it has {list(adata.obs)}.")
    return drop_empty_cells(adata, config.layer)


def check_matrix(adata: ad.AnnData, layer: str | None):
    """Raises a `ValueError` if there is no matrix, or its type is not one of real numbers that can be summed."""
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise ValueError(f"The data are empty: {adata.n_obs} cells × {adata.n_vars} genes.")
    if layer is not None and layer not in adata.layers:
        raise ValueError(f"The data have no layer {layer!r}; they have {list(adata.layers)}: see --layer.")
    matrix = adata.X if layer is None else adata.layers[layer]
    name = "X" if layer is None else f"Layer {layer!r}"
    if matrix is None:
        raise ValueError(f"The data have no matrix in X, only layers {list(adata.layers)}: name one (`--layer`).")
    check_dtype(matrix.dtype, name)
    values = matrix.data if sparse.issparse(matrix) else matrix
    if isinstance(values, np.ndarray) and values.size and not adata.isbacked:
        check_largest(values.max(), name)


def check_largest(largest: float, name: str):
    """Raises a `ValueError` if the largest of the values, which a message calls `name`, is none that was measured."""
    if np.isfinite(largest) and largest > MAX_VALUE:
        raise ValueError(f"{name} holds {largest:g}, which is no count and no logarithm: mend these values.")


def check_dtype(dtype: np.dtype, name: str):
    """Raises a `ValueError` unless values, which a message calls `name`, are real numbers that can be summed."""
    dtype = np.dtype(dtype)
    if dtype.kind not in "iuf" or dtype.itemsize > 8 or dtype == np.float16:
        raise ValueError(
            f"{name} holds values of type {dtype}, not numbers of 32 or 64 bits: convert them, as by"
            " `adata.X = adata.X.astype('float32')`."
        )


def split_cells(adata: ad.AnnData, config: TrainingConfig) -> CellSplit:
    """
    Which cells are held out: as in the run to go on with, as --split says, or drawn.

    Raises:
        ValueError: If there are too few cells, or the split is not of these cells.
    """
    if config.split is not None:
        split = CellSplit.load(config.split)
    elif config.resume_from_checkpoint is not None and (config.output_dir / CellSplit.FILE_NAME).is_file():
        split = CellSplit.load(config.output_dir)
    else:
        label_key = config.label_keys[0] if config.label_keys else None
        if label_key is not None:
            _check_label_sizes(adata, label_key, config.test_fraction)
        split = CellSplit.draw(adata, config.test_fraction, label_key=label_key, seed=config.seed)
    split.apply(adata)  # that it is of other cells is said first
    if len(split.train) < MIN_CELLS:
        raise ValueError(f"{len(split.train)} training cells are too few to learn from: {MIN_CELLS} are the least.")
    return split


def _check_label_sizes(adata: ad.AnnData, label_key: str, test_fraction: float):
    """Of enough cells none is held out if each label has one or two: then the labels are to blame."""
    missing = adata.obs[label_key].isna()
    if missing.any():
        raise ValueError(f"`adata.obs[{label_key!r}]` is missing for {missing.sum()} cells: name or remove them.")
    largest = int(adata.obs[label_key].value_counts().max())

    def holds_out(number: int) -> bool:
        return (number - 0.5) / number > 1 - test_fraction

    if holds_out(adata.n_obs) and not holds_out(largest):
        raise ValueError(
            f"No label in obs[{label_key!r}] has cells enough to hold out a share of {test_fraction}: the largest has"
            f" {largest}. Labels are groups of many cells: give such a column."
        )
