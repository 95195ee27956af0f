"""AnnData files that stay on disk: .h5ad and .zarr, read a few thousand cells at a time."""

import hashlib
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from .source import CHUNK_SIZE


REWRITE = "Write it again, by `anndata.read_h5ad(path).write_h5ad(path)`."


class StoredByGeneError(ValueError):
    """A matrix is stored by gene (CSC), so that no cell can be read without all others."""


def num_cells_of(path: Path) -> int | None:
    """How many cells an .h5ad file or .zarr folder has, without reading them; `None` where it does not say so."""
    if path.suffix not in (".h5ad", ".zarr") or not path.exists():
        return None
    try:
        file = _open(path)
        try:
            obs = file["obs"]
            return int(obs[obs.attrs["_index"]].shape[0])
        finally:
            if hasattr(file, "close"):
                file.close()
    except Exception:  # damaged, or of an old layout: those who read it say what is wrong
        return None


class BackedFile:
    """
    An AnnData file of which names and labels are in memory, and values are read when asked for. To be opened by `with`

    Args:
        path (`str` or `Path`): An .h5ad file, or the folder of a .zarr.
        layer (`str`, *optional*): Layer that holds the matrix; `X` by default.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it can't be read as AnnData, or its matrix can't be read by cell.
    """

    def __init__(self, path: str | Path, layer: str | None = None):
        self.path, self.layer = Path(path), layer
        if not self.path.exists():
            raise FileNotFoundError(f"There is no file {path}: give the path of an .h5ad or .zarr file.")
        try:
            self.file = _open(self.path)
            self.obs: pd.DataFrame = ad.io.read_elem(self.file["obs"])
            self.var: pd.DataFrame = ad.io.read_elem(self.file["var"])
            layers = list(self.file["layers"]) if "layers" in self.file else []
            if not isinstance(self.obs, pd.DataFrame) or not isinstance(self.var, pd.DataFrame):
                raise ValueError(f"it is stored in an old layout. {REWRITE}")
        except Exception as error:
            raise ValueError(f"{path} cannot be read as an .h5ad or .zarr file: {_line(error)}") from error
        if layer is not None and layer not in layers:
            raise ValueError(f"{path} has no layer {layer!r}; it has {layers}. Name one, or none for X.")
        if layer is None and "X" not in self.file:
            raise ValueError(f"{path} has no matrix in X, only layers {layers}: name one (--layer).")
        self.name = f"{path}" if layer is None else f"{path}, layer {layer!r},"
        element = self.file["X" if layer is None else f"layers/{layer}"]
        kind = element.attrs.get("encoding-type", "array" if hasattr(element, "shape") else None)
        if kind is None:
            raise ValueError(f"{self.name} is stored in an old layout. {REWRITE}")
        if kind == "csc_matrix":
            raise StoredByGeneError(
                f"{self.name} is stored by gene (CSC), so that no cell can be read without all others: store it by"
                " cell, with `adata.X = adata.X.tocsr()`."
            )
        if kind not in ("csr_matrix", "array"):
            raise ValueError(f"{self.name} holds a {kind}: store it as CSR.")
        self.matrix = ad.io.sparse_dataset(element) if kind == "csr_matrix" else element
        if tuple(self.matrix.shape) != (len(self.obs), len(self.var)):
            raise ValueError(
                f"{self.name} is damaged: {' × '.join(map(str, self.matrix.shape))} values for {len(self.obs)} cells"
                f" and {len(self.var)} genes."
            )

    def __enter__(self) -> "BackedFile":
        return self

    def __exit__(self, *error):
        if hasattr(self.file, "close"):  # zarr has nothing to close
            self.file.close()

    def read(self, start: int, stop: int) -> sparse.csr_matrix:
        """The cells from `start` to `stop`, all genes; raises a `ValueError` if the file is damaged there."""
        try:
            matrix = sparse.csr_matrix(self.matrix[start:stop])
            matrix.check_format()
        except Exception as error:
            raise ValueError(f"{self.name} cannot be read at cell {start}; is it damaged? {_line(error)}") from error
        matrix.sum_duplicates()  # and sorts
        return matrix


class BackedSource:
    """
    Some cells of an AnnData file as a [`CellSource`].

    Args:
        file ([`BackedFile`]): Cells.
        rows (`np.ndarray`, *optional*): Which of them, in increasing order; all by default.
    """

    is_shuffled = False
    GROUP_SIZE = CHUNK_SIZE // 16  # small groups, as neighbours in a file are often of one kind

    def __init__(self, file: BackedFile, rows: np.ndarray | None = None):
        self.file, self.name, self.layer, self.var_names = file, file.name, file.layer, file.var.index
        self.rows = np.arange(len(file.obs)) if rows is None else rows
        self.obs = file.obs if rows is None else file.obs.iloc[rows]
        stat = file.path.stat()
        rows_sha256 = hashlib.sha256(self.rows.tobytes()).hexdigest()
        self.fingerprint = f"{file.path.resolve()} {stat.st_size} {stat.st_mtime_ns} {rows_sha256}"
        starts = np.arange(0, len(self.rows), self.GROUP_SIZE)
        self.group_sizes = np.minimum(self.GROUP_SIZE, len(self.rows) - starts)

    def read_group(self, group: int) -> tuple[sparse.csr_matrix, None]:
        rows = self.rows[group * self.GROUP_SIZE : (group + 1) * self.GROUP_SIZE]
        first, last = int(rows[0]), int(rows[-1])
        if last + 1 - first > 16 * len(rows):  # few of many: one by one
            return sparse.vstack([self.file.read(int(row), int(row) + 1) for row in rows], format="csr"), None
        return self.file.read(first, last + 1)[rows - first], None

    def read(self) -> ad.AnnData:
        """All of them in memory, where a training looks for their matrix."""
        parts = [self.read_group(group)[0] for group in range(len(self.group_sizes))]
        matrix = sparse.vstack(parts, format="csr")
        cells = ad.AnnData(None if self.layer else matrix, obs=self.obs, var=self.file.var)
        if self.layer is not None:
            cells.layers[self.layer] = matrix
        return cells


def _open(path: Path):
    if path.suffix == ".zarr" or path.is_dir():
        import zarr

        return zarr.open_group(str(path), mode="r")
    import h5py

    return h5py.File(path, "r")


def _line(error: Exception) -> str:
    """An error of a library in one line."""
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__
