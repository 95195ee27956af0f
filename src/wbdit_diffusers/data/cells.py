"""Cells behind one interface: in memory, in a file whose values stay on disk, or in parquet files."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from diffusers.utils import logging
from scipy import sparse

from ..files import one_line


logger = logging.get_logger(__name__)
warn_once = lru_cache(logger.warning)  # a command may open a file several times

CHUNK_SIZE = 4096  # cells read at once, so that a file is never whole in memory
GENES = "Gene Expression"  # among the feature types of 10x Genomics
MAX_CELLS_IN_MEMORY = 100_000  # larger files stay on disk
MAX_COUNT = 2**31 - 1  # int32, and more molecules than any protocol reads
MAX_LOG_VALUE = 50  # 2⁵⁰ is more counts than any cell has


class CellSource(Protocol):
    """Cells in groups that are read at once."""

    name: str  # in messages
    var_names: pd.Index  # all genes, the columns of each group
    group_sizes: np.ndarray  # number of cells in each group: (groups,)

    @property
    def obs(self) -> pd.DataFrame: ...  # labels of all cells, in the order of the groups and in memory

    def read_group(self, group: int) -> tuple[sparse.csr_matrix, np.ndarray | None]:
        """Values of all genes `(cells, genes)`, and total counts `(cells,)` where the file records them."""


class AnnDataSource:
    """
    Genes of the cells of an AnnData (CSR, CSC, dense or backed). Other features, such as antibodies, are left out.

    Args:
        cells (`AnnData`): The cells.
        layer (`str`, *optional*): Layer that holds the matrix; `"raw"` also for `cells.raw`. Default: `X`.
        name (`str`, defaults to `"adata"`): Name of the cells in messages.
        round_counts (`bool`, defaults to `False`): Whether to round values to integers.
    """

    groups_per_chunk = 1

    def __init__(self, cells: ad.AnnData, layer: str | None = None, name: str = "adata", round_counts: bool = False):
        holder, key = find_layer(cells, cells.raw, cells.layers, layer)
        matrix = find_matrix(holder.X if key is None else None, cells.layers, key, name)
        if sparse.issparse(matrix):
            matrix = matrix.tocsr()
        self._set_up(cells.obs, holder.var, matrix, layer, name, round_counts)

    def _set_up(self, obs: pd.DataFrame, var: pd.DataFrame, matrix, layer: str | None, name: str, round_counts: bool):
        """A matrix in memory or on disk, with names."""
        self.all_obs, self.matrix, self.layer, self.name, self.round_counts = obs, matrix, layer, name, round_counts
        self.is_gene = find_genes(var, name)
        self.var = var if self.is_gene.all() else var[self.is_gene]
        self.var_names = self.var.index
        self._set_rows(np.arange(len(obs)))

    def _set_rows(self, rows: np.ndarray):
        """The rows of the matrix that are cells of this source, increasing."""
        size = CHUNK_SIZE // self.groups_per_chunk
        self.rows, self.obs = rows, self.all_obs.iloc[rows]
        self.groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        self.group_sizes = np.array([len(group) for group in self.groups], dtype=int)
        self.checked: set = set()  # groups

    def read_group(self, group: int) -> tuple[sparse.csr_matrix, None]:
        return self.read_rows(self.groups[group]), None

    def read_rows(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Values of all genes in some rows of the matrix, which must be increasing: `(cells, genes)`."""
        first, last = int(rows[0]), int(rows[-1]) + 1
        matrix = sparse.csr_matrix(self.matrix[first:last])
        if len(rows) < last - first:
            matrix = matrix[rows - first]
        if not self.is_gene.all():
            matrix = matrix[:, self.is_gene]
        if self.round_counts and matrix.dtype.kind == "f":
            matrix.data = np.rint(matrix.data)
        return matrix

    def empty_cells(self) -> np.ndarray:
        """Mask `(cells,)` of the cells in which nothing was measured."""
        return np.concatenate([np.diff(sorted_csr(self.read_rows(rows)).indptr) == 0 for rows in self.groups])

    def hash_cells(self) -> np.ndarray:
        """A number for each cell `(cells,)`, the same for copies."""
        return np.concatenate([hash_rows(sorted_csr(self.read_rows(rows))) for rows in self.groups])

    def take(self, rows: np.ndarray) -> "AnnDataSource":
        """The cells at these positions, which must be increasing, without a copy."""
        part = copy.copy(self)
        part._set_rows(self.rows[rows])
        return part

    def read(self) -> ad.AnnData:
        """The cells in memory: `obs`, `var`, and the matrix that was asked for."""
        parts = [self.read_rows(rows) for rows in self.groups] or [sparse.csr_matrix((0, len(self.var)))]
        matrix = sparse.vstack(parts, format="csr")
        layers = {} if self.layer is None else {self.layer: matrix}
        return ad.AnnData(matrix if self.layer is None else None, obs=self.obs, var=self.var, layers=layers)


class NotByCellError(ValueError):
    """The cells of a file can't be read one by one."""


class BackedSource(AnnDataSource, AbstractContextManager):
    """An [`AnnDataSource`] of an .h5ad file or .zarr folder by cell. Values stay on disk. Use it with `with`."""

    groups_per_chunk = 16  # neighbours in a file often have the same label
    file: Any  # of HDF5 or zarr

    def __init__(self, path: str | Path, layer: str | None = None, round_counts: bool = False):
        self.path = find_file(path)
        try:
            if self.path.suffix == ".zarr":
                import zarr  # slow to import

                self.file = zarr.open_group(str(path), mode="r")
            else:
                self.file = h5py.File(path, "r")
            layers = self.file.get("layers", {})
            holder, key = find_layer(self.file, self.file.get("raw"), layers, layer)
            obs, var = ad.io.read_elem(self.file["obs"]), ad.io.read_elem(holder["var"])
        except Exception as error:
            raise ValueError(f"{path} cannot be read as an .h5ad or .zarr file: {one_line(error)}") from error
        self.element = find_matrix(holder.get("X"), layers, key, str(path))
        kind = self.element.attrs.get("encoding-type")
        if kind in (None, "csc_matrix"):
            what = "by gene (CSC)" if kind else "as AnnData did before 0.7"
            raise NotByCellError(f"{path} is stored {what}: use `adata.X = adata.X.tocsr()` and write it again.")
        self.is_sparse = kind == "csr_matrix"
        matrix = ad.io.sparse_dataset(self.element) if self.is_sparse else self.element
        self._set_up(obs, var, matrix, layer, str(path), round_counts)

    def __exit__(self, *error):
        if hasattr(self.file, "close"):  # zarr has nothing to close
            self.file.close()

    def empty_cells(self) -> np.ndarray:
        """Mask `(cells,)` of the cells in which nothing was measured: of a CSR file, the ones without values."""
        if not self.is_sparse or self.round_counts or not self.is_gene.all():
            return super().empty_cells()
        return np.diff(self.element["indptr"][:])[self.rows] == 0


def find_genes(var: pd.DataFrame, name: str) -> np.ndarray:
    """Mask `(features,)` of the genes, where `var["feature_types"]` distinguishes them from other features."""
    kinds = np.asarray(var.get("feature_types", np.full(len(var), GENES)), dtype=str)
    is_gene = np.isin(kinds, [GENES, "nan"])
    if is_gene.all() or GENES not in kinds:
        return np.ones(len(var), dtype=bool)
    others = ", ".join(np.unique(kinds[~is_gene]))
    warn_once(f"{(~is_gene).sum()} features of {name} are {others}, not genes, and are left out.")
    return is_gene


def iter_groups(
    source: CellSource, integer: bool = True, groups: Iterable[int] | None = None
) -> Iterator[tuple[int, sparse.csr_matrix, np.ndarray | None]]:
    """Reads groups (default: all), checked: the number of the first cell, values without stored zeros, and totals."""
    starts = np.concatenate([[0], np.cumsum(source.group_sizes)])
    checked: set = getattr(source, "checked", set())
    for group in range(len(source.group_sizes)) if groups is None else groups:
        matrix, totals = source.read_group(group)
        names = source.obs.index[starts[group] : starts[group + 1]]
        if (group, integer) not in checked:
            check_values(matrix, source.name, names, integer)
            checked.add((group, integer))
        if not matrix.data.all():
            matrix = matrix.copy()  # the caller may own this memory
            matrix.eliminate_zeros()
        empty = np.diff(matrix.indptr) == 0
        if empty.any():
            first, fix = names[empty][0], "remove them with `sc.pp.filter_cells(adata, min_counts=1)`"
            raise ValueError(f"{empty.sum()} cells of {source.name} have no counts at all ({first!r} first): {fix}.")
        yield int(starts[group]), matrix, totals


def choose_groups(group_sizes: np.ndarray, num_cells: int, seed: int) -> list[int]:
    """Random groups, in order, that hold `num_cells` cells or slightly more; all groups if there are fewer cells."""
    groups = np.random.default_rng(seed).permutation(len(group_sizes))
    enough = int(np.searchsorted(np.cumsum(group_sizes[groups]), num_cells)) + 1
    return np.sort(groups[:enough]).tolist()


def check_values(matrix: sparse.csr_matrix, name: str, obs_names: pd.Index, integer: bool):
    """Raises a `ValueError` that names the first cell with a value that is not a count, or not a log value."""
    values = matrix.data
    is_fraction = values != np.rint(values) if integer and values.dtype.kind == "f" else np.zeros(len(values), bool)
    if integer:
        limit, too_large = MAX_COUNT, "which is not a count: no protocol reads a molecule so often"
    else:
        limit, too_large = MAX_LOG_VALUE, "which is not a logarithm of expression: use values='counts' for counts"
    fix = "name the layer of counts, round them with --round_counts, or use values='log'"
    for wrong, problem in (
        (~np.isfinite(values), "which can't be modelled: remove or replace NaN and infinite values"),
        (values < 0, "but expression is never negative: give counts, or log1p values with values='log'"),
        (is_fraction, f"which is not an integer count: {fix}"),
        (values > limit, too_large),
    ):
        if wrong.any():
            row = np.searchsorted(matrix.indptr, np.flatnonzero(wrong)[0], side="right") - 1
            raise ValueError(f"{name} holds {values[wrong][0]:g} (cell {obs_names[row]!r}), {problem}.")


def label_column(obs: pd.DataFrame, label_key: str) -> pd.Series:
    """A column of `obs` with a label for each cell. Raises a `ValueError` if the column or a label is missing."""
    if label_key not in obs:
        raise ValueError(f"`adata.obs` has no column {label_key!r}; it has {list(obs)}. Check the label keys.")
    missing = obs[label_key].isna()
    if missing.any():
        raise ValueError(f"`adata.obs[{label_key!r}]` is missing for {missing.sum()} cells: name or remove them.")
    return obs[label_key]


def check_unique(names: pd.Index, what: str = "cell", where: str = ""):
    """Raises a `ValueError` unless each cell or gene has a name of its own."""
    attribute = "obs_names" if what == "cell" else "var_names"
    if not names.is_unique:
        twice, fix = names[names.duplicated()][0], f"call `adata.{attribute}_make_unique()`"
        raise ValueError(f"The {what} name {twice!r} occurs more than once{where}: {fix}.")


def hash_rows(matrix: sparse.csr_matrix) -> np.ndarray:
    """A number for each row `(cells,)`, the same for copies. The matrix comes from [`sorted_csr`]."""
    return matrix.astype(np.float64) @ np.random.default_rng(0).random(matrix.shape[1])


def place_genes(matrix: sparse.csr_matrix, places: np.ndarray, num_genes: int) -> sparse.csr_matrix:
    """Moves the genes of cells to `places` `(genes,)`, columns of the result, or leaves them out where it is -1."""
    columns = places[matrix.indices]
    stays = columns >= 0
    before = np.concatenate([[0], np.cumsum(stays)])  # number of values before each one that stay
    arrays = matrix.data[stays], columns[stays].astype(np.int32), before[matrix.indptr]
    placed = sparse.csr_matrix(arrays, shape=(matrix.shape[0], num_genes))
    placed.sort_indices()
    return placed


def find_layer(cells, raw, layers, layer: str | None) -> tuple[Any, str | None]:
    """What holds the layer and its genes, and the layer's name there: `raw` unless a layer has this name."""
    return (raw, None) if layer == "raw" and layer not in layers and raw is not None else (cells, layer)


def find_matrix(x, layers, layer: str | None, name: str):
    """`X`, or the layer. Raises a `ValueError` if it is missing."""
    matrix = x if layer is None else layers.get(layer)
    if matrix is None:
        what = "matrix in X" if layer is None else f"layer {layer!r}"
        raise ValueError(f"{name} has no {what}; its layers are {list(layers)}. Name one with `layer`.")
    return matrix


def find_file(path: str | Path) -> Path:
    """Raises a `FileNotFoundError` if there is no such file or folder."""
    if not Path(path).exists():
        raise FileNotFoundError(f"There is no file {path}: give the path of an .h5ad or .zarr file.")
    return Path(path)


def sorted_csr(matrix) -> sparse.csr_matrix:
    """CSR with sorted indices and without stored zeros, in memory of its own."""
    matrix = sparse.csr_matrix(matrix).sorted_indices()
    matrix.eliminate_zeros()
    return matrix
