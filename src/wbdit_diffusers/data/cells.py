"""Cells behind one interface: in memory, in a file whose values stay on disk, or in parquet files."""

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from ..files import one_line


CHUNK_SIZE = 4096  # cells read at once, so that a file is never whole in memory
MAX_CELLS_IN_MEMORY = 100_000  # larger files stay on disk
MAX_COUNT = 2**31 - 1  # int32, and more molecules than any protocol reads
MAX_LOG_VALUE = 50  # 2⁵⁰ is more counts than any cell has


class CellSource(Protocol):
    """Cells in groups that are read at once."""

    name: str  # in messages
    var_names: pd.Index  # all genes, the columns of each group
    group_sizes: np.ndarray  # number of cells in each group: (groups,)

    @property
    def obs(self) -> pd.DataFrame:
        """Labels of all cells, in the order of the groups. They are in memory."""
        ...

    def read_group(self, group: int) -> tuple[sparse.csr_matrix, np.ndarray | None]:
        """Values of all genes `(cells, genes)`, and total counts `(cells,)` where the file records them."""
        ...


class AnnDataSource:
    """
    An AnnData as a [`CellSource`].

    Args:
        cells (`AnnData`): Cells; CSR, CSC, dense or backed.
        layer (`str`, *optional*): Layer that holds the matrix. Default: `X`.
        name (`str`, *optional*): Name of the cells in messages, such as their file.

    Raises:
        ValueError: If there is no such layer, its values are no numbers, or it is damaged.
    """

    def __init__(self, cells: ad.AnnData, layer: str | None = None, name: str = "adata"):
        self.cells = cells
        matrix = _find_matrix(cells.X if layer is None else None, cells.layers, layer, name)
        if sparse.issparse(matrix):
            _check_indices(matrix, name)  # slicing crashes on wrong ones
            matrix = matrix.tocsr()
        self._set_up(cells.obs, cells.var_names, matrix, layer, name)

    def _set_up(self, obs: pd.DataFrame, var_names: pd.Index, matrix, layer: str | None, name: str):
        """A matrix in memory or on disk, with names."""
        self.all_obs, self.var_names, self.matrix, self.layer, self.name = obs, var_names, matrix, layer, name
        dtype = np.dtype(matrix.dtype)
        if dtype.kind not in "iuf" or (dtype.kind == "f" and dtype.itemsize not in (4, 8)):
            fix = "convert them, as by `adata.X = adata.X.astype('float32')`"
            raise ValueError(f"{name} holds values of type {dtype}, not integers, float32 or float64: {fix}.")
        self._set_rows(np.arange(len(obs)))

    def _set_rows(self, rows: np.ndarray):
        """The rows of the matrix that are cells of this source, increasing."""
        self.rows, self.obs = rows, self.all_obs if len(rows) == len(self.all_obs) else self.all_obs.iloc[rows]
        self.group_sizes = np.minimum(self.group_size, len(rows) - np.arange(0, len(rows), self.group_size))
        self.checked: set = set()  # groups

    @property
    def group_size(self) -> int:
        return CHUNK_SIZE

    def read_group(self, group: int) -> tuple[sparse.csr_matrix, None]:
        return self.read_rows(self.rows[group * self.group_size : (group + 1) * self.group_size]), None

    def read_rows(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Values of all genes in some rows of the matrix, which must be increasing: `(cells, genes)`."""
        first, last = int(rows[0]), int(rows[-1]) + 1
        try:
            matrix = sparse.csr_matrix(self.matrix[first:last])
        except Exception as error:
            raise ValueError(f"{self.name} can't be read at cell {first}: {one_line(error)}") from error
        _check_indices(matrix, self.name)
        return matrix if len(rows) == last - first else matrix[rows - first]

    def empty_cells(self) -> np.ndarray:
        """Mask `(cells,)` of the cells in which nothing was measured."""
        groups = (self.read_group(group)[0] for group in range(len(self.group_sizes)))
        return np.concatenate([np.asarray((matrix != 0).sum(axis=1)).ravel() == 0 for matrix in groups])

    def take(self, rows: np.ndarray) -> "AnnDataSource":
        """The cells at these positions, which must be increasing, without a copy."""
        part = copy.copy(self)
        part._set_rows(self.rows[rows])
        return part

    def read(self) -> ad.AnnData:
        """The cells in memory, as a view."""
        return self.cells[self.rows]


class OldLayoutError(ValueError):
    """A file was written by AnnData before 0.7."""


class BackedSource(AnnDataSource):
    """
    An .h5ad file or .zarr folder as a [`CellSource`]. Only names and labels are in memory. Use it with `with`.

    Args:
        path (`str` or `Path`): An .h5ad file or .zarr folder.
        layer (`str`, *optional*): Layer that holds the matrix. Default: `X`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no AnnData file, has no such layer, or that holds no numbers.
    """

    def __init__(self, path: str | Path, layer: str | None = None):
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"There is no file {path}: give the path of an .h5ad or .zarr file.")
        try:
            self.file = _open(self.path)
            obs, self.var = ad.io.read_elem(self.file["obs"]), ad.io.read_elem(self.file["var"])
        except Exception as error:
            raise ValueError(f"{path} cannot be read as an .h5ad or .zarr file: {one_line(error)}") from error
        matrix = _find_matrix(self.file.get("X"), self.file.get("layers", {}), layer, str(path))
        kind = matrix.attrs.get("encoding-type")
        if kind is None or not isinstance(obs, pd.DataFrame):
            fix = "write it again with `anndata.read_h5ad(path).write_h5ad(path)`"
            raise OldLayoutError(f"{path} was written by AnnData before 0.7: {fix}.")
        self.is_by_gene = kind == "csc_matrix"
        self._indptr = matrix.get("indptr") if kind == "csr_matrix" else None
        matrix = ad.io.sparse_dataset(matrix) if kind in ("csr_matrix", "csc_matrix") else matrix
        self._set_up(obs, self.var.index, matrix, layer, str(path))

    @property
    def group_size(self) -> int:
        return CHUNK_SIZE // 16  # neighbours in a file often have the same label

    def __enter__(self) -> "BackedSource":
        return self

    def __exit__(self, *error):
        if hasattr(self.file, "close"):  # zarr has nothing to close
            self.file.close()

    def read_rows(self, rows: np.ndarray) -> sparse.csr_matrix:
        if self.is_by_gene:
            fix = "store it by cell, with `adata.X = adata.X.tocsr()`"
            raise ValueError(f"{self.name} is stored by gene (CSC), so cells can't be read one by one: {fix}.")
        return super().read_rows(rows)

    def empty_cells(self) -> np.ndarray:
        return super().empty_cells() if self._indptr is None else np.diff(self._indptr[:])[self.rows] == 0

    def read(self) -> ad.AnnData:
        """The cells in memory: `obs`, `var`, and the matrix that was asked for."""
        if len(self.rows) < len(self.all_obs):
            groups = range(len(self.group_sizes))
            matrix = sparse.vstack([self.read_group(group)[0] for group in groups], format="csr")
        else:
            matrix = self.matrix.to_memory() if hasattr(self.matrix, "to_memory") else self.matrix[:]
        layers = {} if self.layer is None else {self.layer: matrix}
        return ad.AnnData(matrix if self.layer is None else None, obs=self.obs, var=self.var, layers=layers)


def as_source(cells: ad.AnnData | CellSource, layer: str | None = None) -> CellSource:
    """An AnnData as a [`CellSource`]. A source stays as it is: it was opened with its layer."""
    return AnnDataSource(cells, layer) if isinstance(cells, ad.AnnData) else cells


def iter_groups(
    source: CellSource, integer: bool = True, groups: Iterable[int] | None = None
) -> Iterator[tuple[int, sparse.csr_matrix, np.ndarray | None]]:
    """
    Reads cells group by group, and checks each group once.

    Args:
        source ([`CellSource`]): Cells.
        integer (`bool`, defaults to `True`): Whether the values must be counts; otherwise they are log values.
        groups (`Iterable[int]`, *optional*): Numbers of the groups to read. Default: all in order.

    Yields:
        `tuple`: number of the group's first cell, its values `(cells, genes)` without stored zeros, and the recorded
        total counts of its cells, if there are any.

    Raises:
        ValueError: If a cell is empty or has a value that can't be modelled, see [`check_values`].
    """
    starts = np.concatenate([[0], np.cumsum(source.group_sizes)])
    checked = getattr(source, "checked", set())
    for group in range(len(source.group_sizes)) if groups is None else groups:
        matrix, totals = source.read_group(group)
        names = source.obs.index[int(starts[group]) : int(starts[group + 1])]
        if (group, integer) not in checked:
            check_values(matrix, source.name, names, integer)
            checked.add((group, integer))
        if not matrix.data.all():
            matrix = matrix.copy()  # the caller may own this memory
            matrix.eliminate_zeros()
        empty = np.diff(matrix.indptr) == 0
        if empty.any():
            raise ValueError(
                f"{empty.sum()} cells of {source.name} have no counts at all (the first is {names[empty][0]!r}):"
                " remove them with `sc.pp.filter_cells(adata, min_counts=1)`."
            )
        yield int(starts[group]), matrix, totals


def check_values(matrix: sparse.csr_matrix, name: str, obs_names: pd.Index, integer: bool):
    """
    Raises a `ValueError` that names the first cell with a value that can't be modelled: NaN, infinite, negative, too
    large, or, if `integer`, not a count. `name` is the name of the matrix in the message.
    """
    values = matrix.data
    if not len(values):
        return

    def at(wrong: np.ndarray) -> str:
        row = np.searchsorted(matrix.indptr, np.flatnonzero(wrong)[0], side="right") - 1
        return f"{name} holds {values[wrong][0]:g} (cell {obs_names[row]!r})"

    is_float = values.dtype.kind == "f"
    if is_float and not np.isfinite(values).all():
        raise ValueError(f"{at(~np.isfinite(values))}: remove or replace NaN and infinite values.")
    if values.min() < 0:
        fix = "give counts, or log1p values with values='log'; centred or scaled values can't be modelled"
        raise ValueError(f"{at(values < 0)}, but expression is never negative: {fix}.")
    if integer and is_float and (values != np.rint(values)).any():
        fix = "use values='log' for log-normalised values, or name the layer that holds counts"
        raise ValueError(f"{at(values != np.rint(values))}, which is not an integer count: {fix}.")
    if values.max() > (MAX_COUNT if integer else MAX_LOG_VALUE):
        what, fix = "a logarithm of expression", "use values='counts' for counts, or take log1p of the values"
        what, fix = ("a count", "no protocol reads a molecule so often") if integer else (what, fix)
        raise ValueError(f"{at(values == values.max())}, which is not {what}: {fix}.")


def label_column(obs: pd.DataFrame, label_key: str) -> pd.Series:
    """A column of `obs` with a label for each cell. Raises a `ValueError` if the column or a label is missing."""
    if label_key not in obs:
        raise ValueError(f"`adata.obs` has no column {label_key!r}; it has {list(obs)}. Check the label keys.")
    missing = obs[label_key].isna()
    if missing.any():
        raise ValueError(f"`adata.obs[{label_key!r}]` is missing for {missing.sum()} cells: name or remove them.")
    return obs[label_key]


def place_genes(matrix: sparse.csr_matrix, places: np.ndarray, num_genes: int) -> sparse.csr_matrix:
    """
    Moves genes to other columns.

    Args:
        matrix (`scipy.sparse.csr_matrix` of shape `(cells, genes)`): Cells.
        places (`np.ndarray` of shape `(genes,)`): New column of each gene, -1 for those left out.
        num_genes (`int`): Number of new columns. Columns without a gene are zero.

    Returns:
        `scipy.sparse.csr_matrix` of shape `(cells, num_genes)`: with sorted indices.
    """
    columns = places[matrix.indices]
    stays = columns >= 0
    before = np.concatenate([[0], np.cumsum(stays)])  # number of values before each one that stay
    placed = sparse.csr_matrix(
        (matrix.data[stays], columns[stays].astype(np.int32), before[matrix.indptr]),
        shape=(matrix.shape[0], num_genes),
    )
    placed.sort_indices()
    return placed


def _open(path: Path):
    """The root of an .h5ad file or .zarr folder."""
    if path.suffix == ".zarr":
        import zarr

        return zarr.open_group(str(path), mode="r")
    import h5py

    return h5py.File(path, "r")


def _find_matrix(x, layers, layer: str | None, name: str):
    """`X`, or the layer. Raises a `ValueError` if it is missing."""
    matrix = x if layer is None else layers.get(layer)
    if matrix is None:
        what = "matrix in X" if layer is None else f"layer {layer!r}"
        raise ValueError(f"{name} has no {what}; its layers are {list(layers)}. Name one with `layer`.")
    return matrix


def _check_indices(matrix, name: str):
    """Raises a `ValueError` if a sparse matrix is damaged: if it names other genes than there are, for example."""
    try:
        matrix.check_format()
    except ValueError as error:
        raise ValueError(f"{name} is damaged: {one_line(error)}.") from error
