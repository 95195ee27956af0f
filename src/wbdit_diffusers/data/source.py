"""Cells behind one interface, wherever they are: in memory, in a backed file, in parquet files here or on the Hub."""

from collections.abc import Iterable, Iterator
from typing import Protocol

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse


CHUNK_SIZE = 4096  # cells read at once, so that a file is never whole in memory


class CellSource(Protocol):
    """
    Cells in groups that are read at once: what training needs of them, and no more.

    Args:
        name (`str`): What messages call them.
        var_names (`pd.Index`): All genes, the columns of what is read.
        obs (`pd.DataFrame`): The labels of all cells, in the order of the groups: all of them that is in memory.
        group_sizes (`np.ndarray` of shape `(groups,)`): How many cells are in each group.
        is_shuffled (`bool`): Whether neighbours in a group are a random sample of all cells.
    """

    name: str
    var_names: pd.Index
    group_sizes: np.ndarray
    is_shuffled: bool

    @property
    def obs(self) -> pd.DataFrame: ...

    def read_group(self, group: int) -> tuple[sparse.csr_matrix, np.ndarray | None]:
        """Values of all genes `(cells, genes)`, and the total counts of the cells where they are on record."""
        ...


class AnnDataSource:
    """
    An AnnData as a [`CellSource`].

    Args:
        adata (`AnnData`): Cells; CSR, CSC, dense or backed.
        layer (`str`, *optional*): Layer that holds the matrix; `X` by default.

    Raises:
        ValueError: If there is no such layer.
    """

    is_shuffled = False

    def __init__(self, adata: ad.AnnData, layer: str | None = None):
        if layer is not None and layer not in adata.layers:
            raise ValueError(f"`adata` has no layer {layer!r}; it has {list(adata.layers)}. Give one, or None for X.")
        self.adata, self.layer = adata, layer
        self.name = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
        self.var_names, self.obs = adata.var_names, adata.obs
        starts = np.arange(0, adata.n_obs, CHUNK_SIZE)
        self.group_sizes = np.minimum(CHUNK_SIZE, adata.n_obs - starts)

    def read_group(self, group: int) -> tuple[sparse.csr_matrix, None]:
        # Slicing the AnnData, not the matrix, works alike for dense, CSR, CSC and backed ones.
        chunk = self.adata[group * CHUNK_SIZE : (group + 1) * CHUNK_SIZE]
        matrix = chunk.X if self.layer is None else chunk.layers[self.layer]
        if matrix is None:
            raise ValueError(f"The data have no matrix in X, only layers {list(self.adata.layers)}: name one.")
        return sparse.csr_matrix(matrix), None


def as_source(cells: ad.AnnData | CellSource, layer: str | None = None) -> CellSource:
    """An AnnData as a [`CellSource`]; one that is a source already has one matrix, and no layers to choose from."""
    if isinstance(cells, ad.AnnData):
        return AnnDataSource(cells, layer)
    if layer is not None and layer != getattr(cells, "layer", None):
        raise ValueError(f"{cells.name} has one matrix and no layer {layer!r}: leave `layer` out.")
    return cells


def iter_groups(
    source: CellSource, integer: bool = True, groups: Iterable[int] | None = None
) -> Iterator[tuple[int, sparse.csr_matrix, np.ndarray | None]]:
    """
    Reads cells group by group, and checks them.

    Args:
        source ([`CellSource`]): Cells.
        integer (`bool`, defaults to `True`): Whether the values must be integer counts.
        groups (`Iterable[int]`, *optional*): Which groups; all in order by default.

    Yields:
        `tuple`: number of the group's first cell, its values `(cells, genes)` without stored zeros, and the recorded
        total counts of its cells, if there are any.

    Raises:
        ValueError: If a value can't be modelled: NaN, infinite, negative, not integer though it must be; or if a cell
            is empty. The message names the first cell at fault.
    """
    starts = np.concatenate([[0], np.cumsum(source.group_sizes)])
    for group in range(len(source.group_sizes)) if groups is None else groups:
        matrix, totals = source.read_group(group)
        start = int(starts[group])
        check_values(matrix, source.name, source.obs.index[start : start + matrix.shape[0]], integer)
        if not matrix.data.all():
            matrix = matrix.copy()  # what was read may be somebody else's memory
            matrix.eliminate_zeros()
        empty = np.diff(matrix.indptr) == 0
        if empty.any():
            raise ValueError(
                f"{empty.sum()} cells of {source.name} have no counts at all (the first is"
                f" {source.obs.index[start + np.flatnonzero(empty)[0]]!r}): remove them with"
                " `sc.pp.filter_cells(adata, min_counts=1)`."
            )
        yield start, matrix, totals


def check_values(matrix: sparse.csr_matrix, name: str, obs_names: pd.Index, integer: bool):
    """
    Raises a `ValueError` that names the first cell with a value that is NaN, infinite, negative, or, if they must be
    `integer`, not a whole count. `name` is what the message calls the matrix.
    """
    values = matrix.data

    def at(wrong: np.ndarray) -> str:
        row = np.searchsorted(matrix.indptr, np.flatnonzero(wrong)[0], side="right") - 1
        return f"{name} holds {values[wrong][0]:g} (cell {obs_names[row]!r})"

    if values.dtype.kind not in "fiub" or values.dtype.itemsize == 2 and values.dtype.kind == "f":
        raise ValueError(f"{name} holds values of type {values.dtype}: give integers, float32 or float64.")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"{at(~np.isfinite(values))}: remove or replace NaN and infinite values.")
    if len(values) and values.min() < 0:
        mend = "centred or scaled values can't be modelled; give counts, or log1p values with values='log'"
        raise ValueError(f"{at(values < 0)}, but expression is never negative: {mend}.")
    if integer and values.dtype.kind == "f":
        fractional = values != np.rint(values)
        if fractional.any():
            raise ValueError(
                f"{at(fractional)}, which is no integer count. If these are log-normalised values, pass values='log';"
                " if the counts are in a layer, name it with `layer`."
            )


def place_genes(matrix: sparse.csr_matrix, places: np.ndarray, num_genes: int) -> sparse.csr_matrix:
    """
    Cells with other columns: `(cells, num_genes)`, with sorted indices.

    Args:
        matrix (`scipy.sparse.csr_matrix` of shape `(cells, genes)`): Cells.
        places (`np.ndarray` of shape `(genes,)`): The new column of each gene, -1 for those that are left out.
        num_genes (`int`): Number of new columns; those to which no gene goes are zero.
    """
    columns = places[matrix.indices]
    stays = columns >= 0
    before = np.concatenate([[0], np.cumsum(stays)])  # how many of the values before each one stay
    placed = sparse.csr_matrix(
        (matrix.data[stays], columns[stays].astype(np.int32), before[matrix.indptr]),
        shape=(matrix.shape[0], num_genes),
    )
    placed.sort_indices()
    return placed
