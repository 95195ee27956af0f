"""Whether cells that were written can be read again: each value is looked at, a piece at a time."""

from pathlib import Path

import numpy as np


CELLS_AT_ONCE = 4096


def check_group(group, num_cells: int, num_genes: int):
    """Raises a `ValueError` unless a group of HDF5 or zarr is an AnnData of so many cells and genes, whole."""
    _check_sparse(group["X"], "X", num_cells, num_genes)
    for name in group["layers"]:
        _check_sparse(group["layers"][name], f"layers/{name}", num_cells, num_genes)
    obs = group["obs"]
    columns = [obs.attrs["_index"], *obs.attrs["column-order"]]
    lengths = {f"obs/{key}": (obs[key]["codes"] if "codes" in _members(obs[key]) else obs[key]) for key in columns}
    lengths |= {f"obsm/{name}": group["obsm"][name] for name in group["obsm"]}
    for name, array in lengths.items():
        if array.shape[0] != num_cells:
            raise ValueError(f"{name} has {array.shape[0]} entries for {num_cells} cells")


def check_parquet(folder: Path, num_cells: int, num_genes: int):
    """The same for a folder of parquet files."""
    import pyarrow.parquet as pq

    if pq.read_metadata(folder / "genes.parquet").num_rows != num_genes:
        raise ValueError(f"genes.parquet has not {num_genes} genes")
    found = 0
    for path in sorted(folder.glob("cells-*.parquet")):
        with pq.ParquetFile(path) as file:
            for i in range(file.num_row_groups):
                table = file.read_row_group(i, columns=["genes", "expressions"])
                for piece in table.to_batches():
                    genes, values = piece.column("genes"), piece.column("expressions")
                    indptr = genes.offsets.to_numpy().astype(np.int64)
                    _check_rows(path.name, indptr - indptr[0], genes.flatten().to_numpy(), values.flatten().to_numpy())
                    if len(genes.flatten()) and genes.flatten().to_numpy().max() >= num_genes:
                        raise ValueError(f"{path.name} names a gene that there is not")
                    found += len(piece)
    if found != num_cells:
        raise ValueError(f"there are {found} cells, not {num_cells}")


def _check_sparse(matrix, name: str, num_cells: int, num_genes: int):
    if tuple(int(size) for size in matrix.attrs["shape"]) != (num_cells, num_genes):
        raise ValueError(f"{name} has shape {tuple(matrix.attrs['shape'])}, not {(num_cells, num_genes)}")
    indptr, indices, data = matrix["indptr"], matrix["indices"], matrix["data"]
    if indptr.shape[0] != num_cells + 1 or int(np.asarray(indptr[0])) != 0:
        raise ValueError(f"{name}/indptr is damaged")
    for start in range(0, num_cells, CELLS_AT_ONCE):
        rows = np.asarray(indptr[start : min(start + CELLS_AT_ONCE, num_cells) + 1])
        if (np.diff(rows) < 0).any() or rows[0] < 0:
            raise ValueError(f"{name}/indptr descends")
        genes = np.asarray(indices[int(rows[0]) : int(rows[-1])])
        if len(genes) and genes.max() >= num_genes:
            raise ValueError(f"{name}/indices name a gene that there is not")
        values = np.asarray(data[int(rows[0]) : int(rows[-1])])
        _check_rows(name, rows - rows[0], genes, values)
        if (values == 0).any():  # which is what a failed write leaves
            raise ValueError(f"{name}/data holds zeros")
    last = int(np.asarray(indptr[num_cells]))
    if indices.shape[0] != last or data.shape[0] != last:
        raise ValueError(f"{name} has {indices.shape[0]} indices and {data.shape[0]} values, not {last}")


def _check_rows(name: str, indptr: np.ndarray, genes: np.ndarray, values: np.ndarray):
    """Genes ascend in each row, and all values are finite."""
    if len(genes) != indptr[-1] or len(values) != indptr[-1]:
        raise ValueError(f"{name} is cut off")
    if not len(genes):
        return
    ascends = np.diff(genes) > 0
    starts = indptr[1:-1]
    ascends[starts[(starts > 0) & (starts < len(genes))] - 1] = True  # from one row to the next
    if genes.min() < 0 or not ascends.all():
        raise ValueError(f"{name} has wrong indices")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinite values")


def _members(node) -> list[str]:
    return list(node) if hasattr(node, "keys") else []
