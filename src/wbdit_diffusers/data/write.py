"""Cells into files, batch by batch: .h5ad, .zarr, or a folder of parquet files."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
from scipy import sparse

from ..files import one_line, write_whole
from .cells import sorted_csr
from .prepared import make_features, make_table, write_file, write_metadata


CELLS_PER_CHUNK, VALUES_PER_CHUNK = 2**14, 2**20  # of zarr, which has a file for each chunk


def write_cells(path: str | Path, batches: Iterable[ad.AnnData]):
    """
    Writes batches of cells as they come. The file gets its name when it is complete.

    `path` is a new .h5ad file, .zarr folder, or, with no suffix or .parquet, folder with a parquet file, in which
    integers are counts. All batches have the same genes, `obs` columns and categories, with `X` and layers in CSR and
    `obsm` in arrays, as [`ScRNAGenerationPipeline.stream`] yields them. Raises an `OSError` if the path exists, or
    can't be written: nothing has its name then.
    """
    path, batches = check_output(path), iter(batches)
    first = next(batches, None)  # the request is checked here, before a file is touched
    if first is None:
        raise ValueError("There are no cells to write.")

    def write(partial: Path):
        if path.suffix == ".h5ad":
            with h5py.File(partial, "w") as file:
                _write_group(file, first, batches)
        elif path.suffix == ".zarr":
            import zarr  # slow to import

            _write_group(zarr.open_group(str(partial), mode="w"), first, batches)
        else:
            _write_parquet(partial, first, batches)

    try:
        write_whole(path, write)
    except OSError as error:
        raise OSError(f"{path} was not written: {one_line(error)}") from error


def check_output(path: str | Path) -> Path:
    """Checks a path before cells are made for it, and makes the folder that it is in."""
    path = Path(path)
    if path.suffix not in (".h5ad", ".zarr", ".parquet", ""):
        raise ValueError(f"{path} has the suffix {path.suffix!r}: give an .h5ad file, a .zarr folder, or a folder.")
    if path.is_symlink() or (path.exists() and (path.is_file() or any(path.iterdir()))):
        raise FileExistsError(f"{path} exists: remove it, or give another path.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write_group(group, first: ad.AnnData, others: Iterator[ad.AnnData]):
    """AnnData's own layout in a group of HDF5 or zarr, whose arrays grow."""
    is_hdf5 = isinstance(group, h5py.Group)

    def write(name: str, element, rows: int):
        chunk = (rows, *element.shape[1:]) if isinstance(element, np.ndarray) else (rows,)
        kwargs: dict[str, Any] = {"chunks": True if is_hdf5 else chunk}
        if is_hdf5 and not sparse.issparse(element):  # sparse ones grow anyway
            kwargs["maxshape"] = (None, *chunk[1:])
        ad.io.write_elem(group, name, element, dataset_kwargs=kwargs)

    with ad.settings.override(auto_shard_zarr_v3=False):
        ad.io.write_elem(group, "/", ad.AnnData(var=first.var, uns=first.uns, varm=first.varm))
        for name, matrix in _matrices(first).items():
            matrix = sorted_csr(matrix)
            matrix.indptr = matrix.indptr.astype(np.int64)  # it may grow beyond 2³¹ values
            write(name, matrix, VALUES_PER_CHUNK)
        for name, matrix in first.obsm.items():
            write(f"obsm/{name}", matrix, CELLS_PER_CHUNK)
        write("obs", first.obs, CELLS_PER_CHUNK)
    obs = group["obs"]
    for batch in others:
        for name, matrix in _matrices(batch).items():
            ad.io.sparse_dataset(group[name]).append(sorted_csr(matrix))
        for name, matrix in batch.obsm.items():
            _append(group["obsm"][name], matrix)
        _append(obs[obs.attrs["_index"]], batch.obs_names.to_numpy(dtype=object))
        for key, column in batch.obs.items():
            is_label = hasattr(column, "cat")
            values = column.cat.codes if is_label else column
            _append(obs[key]["codes"] if is_label else obs[key], values.to_numpy())


def _matrices(cells: ad.AnnData) -> dict[str, Any]:
    """`X` and the layers, by their place in a file."""
    return {"X": cells.X, **{f"layers/{name}": layer for name, layer in cells.layers.items()}}


def _append(array, values: np.ndarray):
    """Appends to an array of HDF5 or zarr, along its first dimension."""
    length = array.shape[0]
    array.resize((length + len(values), *array.shape[1:]))
    array[length : length + len(values)] = values


def _write_parquet(path: Path, first: ad.AnnData, others: Iterator[ad.AnnData]):
    """The layout of [`PreparedCells`], with all cells in the split `train`."""
    values = "counts" if (first.X.data == np.rint(first.X.data)).all() else "log"

    def with_totals(cells: ad.AnnData) -> ad.AnnData:
        if values == "counts":
            cells = cells.copy()
            cells.obs["total_counts"] = np.asarray(cells.X.sum(axis=1), dtype=np.int64).ravel()
        return cells

    (path / "data").mkdir(parents=True)
    first, name = with_totals(first), "data/train-00000-of-00001.parquet"
    features = make_features(first, values)
    tables = (make_table(batch, features) for batch in chain([first], map(with_totals, others)))
    write_metadata(path, first, values, features, {"train": {name: write_file(path / name, tables, features)}})
