"""Cells into files, batch by batch: what is named at the end is whole, checked, and on the disk."""

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from scipy import sparse

from .hdf5_sink import HDF5Sink
from .verify import check_group, check_parquet


CELLS_PER_FILE = 2**18  # of parquet
CELLS_PER_CHUNK, VALUES_PER_CHUNK = 2**14, 2**20  # of zarr, which has a file for each chunk
MARKERS = {"zarr": ("zarr.json", ".zgroup"), "parquet": ("genes.parquet",)}  # by which a folder is one of ours


def write_cells(path: str | Path, batches: Iterable[ad.AnnData]) -> tuple[int, int]:
    """
    Writes batches of cells, each as it comes: only one is in memory at a time. They are written beside, read again,
    and renamed at the end: a failure leaves what was there before, and nothing else.

    Args:
        path (`str` or `Path`):
            An .h5ad file, a .zarr folder, or, with no suffix or .parquet, a folder of parquet files: `cells-*.parquet`
            with one row for each cell (`genes` and `expressions`, its values above zero, as Tahoe-100M has them;
            labels as `ClassLabel`), and `genes.parquet` with the names that the numbers in `genes` stand for.
        batches (`Iterable[AnnData]`): Cells with the same genes, `obs` columns and categories, `X` and layers in
            CSR, `obsm` in arrays; as [`ScRNAGenerationPipeline.stream`] yields them.

    Returns:
        `tuple[int, int]`: number of cells and of genes.

    Raises:
        ValueError: If there are no cells.
        OSError: If the path can't be written to, the disk is full, or what was written can't be read again.
    """
    kind, path = output_format(path), check_output(path)
    batches = iter(batches)
    first = next(batches, None)  # what was asked for is checked here, before a file is touched
    if first is None:
        raise ValueError("There are no cells to write.")
    partial = path.with_name(f"{path.name}.partial")  # what a killed process left is written over
    write = {"h5ad": _write_h5ad, "zarr": _write_zarr, "parquet": _write_parquet}[kind]
    try:
        num_cells = write(partial, first, batches)
        check_cells_file(partial, kind, num_cells, first.n_vars)
        _replace(partial, path)
    except BlockingIOError as error:  # what is there is another's
        raise OSError(f"{path} was not written: {_reason(error)}.") from error
    except OSError as error:
        remove(partial)
        raise OSError(f"{path} was not written: {_reason(error)}.") from error
    except BaseException:
        remove(partial)
        raise
    return num_cells, first.n_vars


def output_format(path: str | Path) -> str:
    """`"h5ad"`, `"zarr"` or `"parquet"`, by the suffix. Raises a `ValueError` on another one."""
    suffix = "" if str(path).endswith("/") else Path(path).suffix
    formats = {".h5ad": "h5ad", ".zarr": "zarr", ".parquet": "parquet", "": "parquet"}
    if suffix not in formats:
        raise ValueError(f"{path} has the suffix {suffix!r}: give an .h5ad file, a .zarr folder, or a folder.")
    return formats[suffix]


def check_output(path: str | Path) -> Path:
    """
    Looks at where cells are to be written, before any are made. Makes the folder that the path is in.

    Returns:
        `Path`: the path, with symbolic links followed: it is what they point to that is replaced.

    Raises:
        ValueError: If it is no path of a format that can be written.
        OSError: If something else is there (a folder, a device, other files), or it can't be written.
    """
    if not str(path).strip() or "\0" in str(path):
        raise ValueError(f"{str(path)!r} is no path: give an .h5ad file, a .zarr folder, or a folder.")
    kind = output_format(path)
    path = Path(os.path.realpath(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        mode = path.stat().st_mode if path.exists() else None
    except OSError as error:
        raise OSError(f"{path} cannot be written: {_reason(error)}.") from error
    if mode is None:
        return path
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(f"{path} is a device or a pipe, which is never replaced: give the path of a file.")
    if kind == "h5ad":
        if stat.S_ISDIR(mode):
            raise OSError(f"{path} is a folder: give the path of a file in it, such as {path / 'cells.h5ad'}.")
        if not os.access(path, os.W_OK):
            raise OSError(f"{path} is write-protected: give another path.")
        return path
    if stat.S_ISREG(mode):
        raise OSError(
            f"{path} is a file, and cells of this format are a folder: give another path, or end it in .h5ad."
        )
    if any(path.iterdir()) and not any((path / marker).is_file() for marker in MARKERS[kind]):
        raise OSError(f"{path} holds other files: give the path of a new folder.")
    return path


def check_cells_file(path: Path, kind: str, num_cells: int, num_genes: int):
    """Reads a written file again. Raises an `OSError` if it does not hold so many cells, whole."""
    try:
        if kind == "parquet":
            check_parquet(path, num_cells, num_genes)
        elif kind == "zarr":
            import zarr

            check_group(zarr.open_group(str(path), mode="r"), num_cells, num_genes)
        else:
            import h5py

            with h5py.File(path, "r") as file:
                check_group(file, num_cells, num_genes)
    except Exception as error:  # of whatever kind: HDF5, zarr and Arrow have their own
        raise OSError(f"what is on the disk is not what was written ({_reason(error)}): check the disk") from error


def remove(path: Path):
    """A file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ==================== Formats ====================


def _write_h5ad(path: Path, first: ad.AnnData, batches: Iterator[ad.AnnData]) -> int:
    import h5py

    sink = HDF5Sink(path)
    try:
        with h5py.File(sink, "w") as file:
            num_cells = _write_group(file, first, batches, lambda: (file.flush(), sink.check()))
        sink.check()
    finally:
        sink.close()
    return num_cells


def _write_zarr(path: Path, first: ad.AnnData, batches: Iterator[ad.AnnData]) -> int:
    import zarr

    return _write_group(zarr.open_group(str(path), mode="w"), first, batches, lambda: None)


def _write_group(group, first: ad.AnnData, batches: Iterator[ad.AnnData], check: Callable) -> int:
    """AnnData's own layout, in a group of HDF5 or zarr, whose arrays then grow. `check` is called for each batch."""
    import h5py

    is_hdf5 = isinstance(group, h5py.Group)

    def write(parent, name: str, element, rows: int):
        chunk = (rows, *element.shape[1:]) if isinstance(element, np.ndarray) else (rows,)
        kwargs: dict[str, Any] = {"chunks": True if is_hdf5 else chunk}
        if is_hdf5 and not sparse.issparse(element):  # sparse ones grow anyway
            kwargs["maxshape"] = (None, *chunk[1:])
        ad.io.write_elem(parent, name, element, dataset_kwargs=kwargs)

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
    check()
    obs = group["obs"]
    num_cells = first.n_obs
    for batch in batches:
        _append_sparse(group["X"], batch.X)
        for name, layer in batch.layers.items():
            _append_sparse(group["layers"][name], layer)
        for name, matrix in batch.obsm.items():
            _append(group["obsm"][name], matrix)
        _append(obs[obs.attrs["_index"]], batch.obs_names.to_numpy(dtype=object))
        for key, column in batch.obs.items():
            is_categorical = hasattr(column, "cat")
            values = column.cat.codes if is_categorical else column
            _append(obs[key]["codes"] if is_categorical else obs[key], values.to_numpy())
        num_cells += batch.n_obs
        check()
    return num_cells


def _growable(matrix) -> sparse.csr_matrix:
    matrix = _without_zeros(matrix).copy()
    matrix.indptr = matrix.indptr.astype(np.int64)  # the file may grow beyond 2³¹ values
    return matrix


def _sorted(matrix) -> sparse.csr_matrix:
    matrix = sparse.csr_matrix(matrix)
    return matrix if matrix.has_sorted_indices else matrix.sorted_indices()


def _without_zeros(matrix) -> sparse.csr_matrix:
    matrix = _sorted(matrix)
    if (matrix.data == 0).any():
        matrix = matrix.copy()
        matrix.eliminate_zeros()
    return matrix


def _append_sparse(group, matrix):
    matrix = _without_zeros(matrix)
    last = int(np.asarray(group["indptr"][group["indptr"].shape[0] - 1]))
    for name, values in (
        ("indices", matrix.indices),
        ("data", matrix.data),
        ("indptr", matrix.indptr[1:].astype(np.int64) + last),
    ):
        _append(group[name], values)
    group.attrs["shape"] = [group["indptr"].shape[0] - 1, matrix.shape[1]]


def _append(array, values: np.ndarray):
    """To an array of HDF5 or zarr, along its first dimension."""
    length = array.shape[0]
    array.resize((length + len(values), *array.shape[1:]))
    array[length : length + len(values)] = values


def _write_parquet(path: Path, first: ad.AnnData, batches: Iterator[ad.AnnData]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    remove(path)
    path.mkdir()
    schema = _schema(first)
    num_cells, in_file, writer = 0, 0, None
    batch: ad.AnnData | None = first
    try:
        while batch is not None:
            if in_file + batch.n_obs > CELLS_PER_FILE and writer is not None:
                writer, in_file = writer.close(), 0
            if writer is None:
                number = len(list(path.glob("cells-*.parquet")))
                writer = pq.ParquetWriter(path / f"cells-{number:05d}.parquet", schema, compression="zstd")
            writer.write_table(pa.table(_columns(batch), schema=schema))
            num_cells, in_file = num_cells + batch.n_obs, in_file + batch.n_obs
            batch = next(batches, None)
    finally:
        if writer is not None:
            writer.close()
    genes = {"gene": first.var_names.to_list()}
    for name, matrix in first.varm.items():
        genes |= {f"{name}_{i}": column for i, column in enumerate(np.asarray(matrix).T)}
    pq.write_table(pa.table(genes), path / "genes.parquet")
    return num_cells


def _schema(cells: ad.AnnData):
    """What `datasets` knows the columns by."""
    from datasets import ClassLabel, Features, List, Value

    features = {"cell": Value("string"), "genes": List(Value("int32")), "expressions": List(Value("float32"))}
    features |= {name: List(Value("float32")) for name in cells.layers}
    for key, column in cells.obs.items():
        names = list(column.cat.categories) if hasattr(column, "cat") else None
        features[key] = Value(str(column.dtype)) if names is None else ClassLabel(names=names)
    features |= {name: List(Value("float32")) for name in cells.obsm}
    return Features(features).arrow_schema


def _columns(cells: ad.AnnData) -> dict:
    """One batch, with each cell's values above zero as lists that share CSR's memory."""
    import pyarrow as pa

    matrix = _sorted(cells.X)

    def lists(values: np.ndarray, offsets: np.ndarray):
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))

    columns = {
        "cell": cells.obs_names.to_list(),
        "genes": lists(matrix.indices.astype(np.int32), matrix.indptr),
        "expressions": lists(matrix.data.astype(np.float32), matrix.indptr),
    }
    for name, layer in cells.layers.items():  # the counts of the same values
        layer = _sorted(layer)
        columns[name] = lists(layer.data.astype(np.float32), layer.indptr)
    for key, column in cells.obs.items():
        columns[key] = column.cat.codes.to_numpy().astype(np.int64) if hasattr(column, "cat") else column.to_numpy()
    for name, values in cells.obsm.items():
        values = np.asarray(values, dtype=np.float32)
        columns[name] = lists(values.ravel(), np.arange(len(values) + 1) * values.shape[1])
    return columns


# ==================== Files ====================


def _replace(partial: Path, path: Path):
    """Renames what is whole, once it is on the disk."""
    for file in [partial] if partial.is_file() else [file for file in partial.rglob("*") if file.is_file()]:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    if partial.is_dir() and path.exists():  # a folder can't replace one that is not empty
        old = path.with_name(f"{path.name}.old")
        remove(old)
        path.rename(old)
        partial.rename(path)
        remove(old)
    else:
        partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _reason(error: Exception) -> str:
    """One line of an error, which may have many."""
    text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    return " ".join(text.split()) or type(error).__name__
