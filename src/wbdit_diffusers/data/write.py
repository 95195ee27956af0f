"""Cells into files, batch by batch: .h5ad, .zarr, or a folder of parquet files."""

import os
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from scipy import sparse

from ..files import one_line, write_whole
from .prepared import make_features, make_table, write_file, write_tables_of_folder


CELLS_PER_FILE = 2**18  # of parquet
CELLS_PER_CHUNK, VALUES_PER_CHUNK = 2**14, 2**20  # of zarr, which has a file for each chunk
FORMATS = {".h5ad": "h5ad", ".zarr": "zarr", ".parquet": "parquet", "": "parquet"}


def write_cells(path: str | Path, batches: Iterable[ad.AnnData]) -> tuple[int, int]:
    """
    Writes batches of cells as they come, so that one is in memory at a time. The file gets its name when it is
    complete.

    Args:
        path (`str` or `Path`): New .h5ad file, .zarr folder, or, with no suffix or .parquet, folder of parquet files.
        batches (`Iterable[AnnData]`):
            Cells with the same genes, `obs` columns and categories, `X` and layers in CSR and `obsm` in arrays, as
            [`ScRNAGenerationPipeline.stream`] yields them.

    Returns:
        `tuple[int, int]`: number of cells and of genes.

    Raises:
        ValueError: If there are no cells.
        OSError: If the path exists, or can't be written. Nothing has its name then.
    """
    path, batches = check_output(path), iter(batches)
    first = next(batches, None)  # the request is checked here, before a file is touched
    if first is None:
        raise ValueError("There are no cells to write.")
    write = {"h5ad": _write_h5ad, "zarr": _write_zarr, "parquet": _write_parquet}[output_format(path)]
    num_cells = 0

    def counted() -> Iterator[ad.AnnData]:
        nonlocal num_cells
        for batch in chain([first], batches):
            num_cells += batch.n_obs
            yield batch

    try:
        write_whole(path, lambda partial: write(partial, counted()))
    except OSError as error:
        raise OSError(f"{path} was not written: {one_line(error)}") from error
    return num_cells, first.n_vars


def output_format(path: str | Path) -> str:
    """`"h5ad"`, `"zarr"` or `"parquet"`, by the suffix. Raises a `ValueError` on another one."""
    suffix = Path(path).suffix
    if suffix not in FORMATS:
        raise ValueError(f"{path} has the suffix {suffix!r}: give an .h5ad file, a .zarr folder, or a folder.")
    return FORMATS[suffix]


def check_output(path: str | Path) -> Path:
    """
    Checks a path before cells are made for it, and makes the folder that it is in.

    Raises:
        ValueError: If its suffix is unknown.
        OSError: If the path exists, or the folder can't be written to.
    """
    output_format(path)
    path = Path(path)
    if path.is_symlink() or (path.exists() and (path.is_file() or any(path.iterdir()))):
        raise FileExistsError(f"{path} exists: remove it, or give another path.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent} can't be written to: give another path.")
    return path


def check_free_space(path: Path, num_bytes: int):
    """Raises an `OSError` if the disk has less free space than an output needs."""
    free = shutil.disk_usage(path.parent).free
    if free < num_bytes:
        raise OSError(f"{path.parent} has {free / 1e9:.1f} GB free, but {path.name} needs {num_bytes / 1e9:.1f} GB.")


# ==================== Formats ====================


def _write_h5ad(path: Path, batches: Iterator[ad.AnnData]):
    import h5py

    with h5py.File(path, "w") as file:
        _write_group(file, batches, is_hdf5=True)


def _write_zarr(path: Path, batches: Iterator[ad.AnnData]):
    import zarr

    _write_group(zarr.open_group(str(path), mode="w"), batches, is_hdf5=False)


def _write_group(group, batches: Iterator[ad.AnnData], is_hdf5: bool):
    """AnnData's own layout in a group of HDF5 or zarr, whose arrays grow."""

    def write(parent, name: str, element, rows: int):
        chunk = (rows, *element.shape[1:]) if isinstance(element, np.ndarray) else (rows,)
        kwargs: dict[str, Any] = {"chunks": True if is_hdf5 else chunk}
        if is_hdf5 and not sparse.issparse(element):  # sparse ones grow anyway
            kwargs["maxshape"] = (None, *chunk[1:])
        ad.io.write_elem(parent, name, element, dataset_kwargs=kwargs)

    first = next(batches)
    with ad.settings.override(auto_shard_zarr_v3=False):
        ad.io.write_elem(group, "/", ad.AnnData(var=first.var, uns=first.uns))
        write(group, "X", _growable(first.X), VALUES_PER_CHUNK)
        for name, layer in first.layers.items():
            write(group["layers"], name, _growable(layer), VALUES_PER_CHUNK)
        for name, matrix in first.varm.items():
            ad.io.write_elem(group["varm"], name, matrix)
        for name, matrix in first.obsm.items():
            write(group["obsm"], name, matrix, CELLS_PER_CHUNK)
        del group["obs"]
        write(group, "obs", first.obs, CELLS_PER_CHUNK)
    obs = group["obs"]
    for batch in batches:
        ad.io.sparse_dataset(group["X"]).append(_sorted(batch.X))
        for name, layer in batch.layers.items():
            ad.io.sparse_dataset(group["layers"][name]).append(_sorted(layer))
        for name, matrix in batch.obsm.items():
            _append(group["obsm"][name], matrix)
        _append(obs[obs.attrs["_index"]], batch.obs_names.to_numpy(dtype=object))
        for key, column in batch.obs.items():
            is_label = hasattr(column, "cat")
            values = column.cat.codes if is_label else column
            _append(obs[key]["codes"] if is_label else obs[key], values.to_numpy())


def _sorted(matrix) -> sparse.csr_matrix:
    """CSR with sorted indices and without stored zeros."""
    matrix = sparse.csr_matrix(matrix).sorted_indices()
    matrix.eliminate_zeros()
    return matrix


def _growable(matrix) -> sparse.csr_matrix:
    """The first batch of a matrix that may grow beyond 2³¹ values."""
    matrix = _sorted(matrix)
    matrix.indptr = matrix.indptr.astype(np.int64)
    return matrix


def _append(array, values: np.ndarray):
    """Appends to an array of HDF5 or zarr, along its first dimension."""
    length = array.shape[0]
    array.resize((length + len(values), *array.shape[1:]))
    array[length : length + len(values)] = values


def _write_parquet(path: Path, batches: Iterator[ad.AnnData]):
    """The layout of [`PreparedCells`], with all cells in the split `train`."""
    first = next(batches)
    features = make_features(first.obs, False, first.layers, first.obsm)
    (path / "data").mkdir(parents=True)
    files: dict[str, list[int]] = {}
    waiting = chain([first], batches)

    def tables() -> Iterator[Any]:
        """The cells of one file."""
        num_cells = 0
        while num_cells < CELLS_PER_FILE and (batch := next(waiting, None)) is not None:
            num_cells += batch.n_obs
            yield make_table(_sorted(batch.X), batch.obs, features, layers=batch.layers, obsm=batch.obsm)

    while (first_table := next(shard := tables(), None)) is not None:
        name = f"data/train-{len(files):05d}.parquet"
        files[name] = write_file(path / name, chain([first_table], shard), features)
    var = first.var.copy()
    for key, matrix in first.varm.items():
        for i, column in enumerate(np.asarray(matrix).T):
            var[f"{key}_{i}"] = column
    metadata = {
        "values": "log",
        "num_genes": first.n_vars,
        "labels": {key: feature.names for key, feature in features.items() if hasattr(feature, "names")},
        "obs": list(first.obs),
        "layers": list(first.layers),
        "obsm": list(first.obsm),
        "varm": {key: np.asarray(matrix).shape[1] for key, matrix in first.varm.items()},
        "splits": {"train": files},
    }
    write_tables_of_folder(path, var, metadata)
