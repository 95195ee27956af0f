"""`CellArrays`: the arrays of an AnnData that the evaluation compares, with one rule for library sizes."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import anndata as ad
import numpy as np
import pandas as pd

from ..data.cells import find_matrix
from ..processing.normalize import to_expression, total_counts


@dataclass
class CellArrays:
    """Arrays of the judged cells. Indexing with positions or a mask selects cells."""

    matrix: np.ndarray  # (cells, genes), counts or log values as measured
    expression: np.ndarray  # (cells, genes), on the log scale
    library_size: np.ndarray | None = None  # (cells,), total counts over all genes; none for log values
    labels: np.ndarray | None = None  # (cells,), all label keys of a cell, combined; "" by default
    types: np.ndarray | None = None  # (cells,), the first label key alone, e.g. the cell type

    def __post_init__(self):
        self.labels = np.full(len(self), "") if self.labels is None else self.labels

    def __len__(self) -> int:
        return self.matrix.shape[0]

    def __getitem__(self, cells: np.ndarray) -> "CellArrays":
        arrays = (getattr(self, field.name) for field in fields(self))
        return CellArrays(*(None if array is None else array[cells] for array in arrays))

    def other_genes_share(self) -> np.ndarray:
        """Fraction of each cell's counts in genes that are not judged, `(cells,)`."""
        return 1 - self.matrix.sum(axis=1) / np.maximum(self.library_size, 1)


def combined_labels(adata: ad.AnnData, label_keys: Sequence[str], name: str = "obs") -> np.ndarray:
    """All label keys of a cell in one string, `(cells,)`; `""` without keys. Raises `ValueError` without a column."""
    for key in label_keys:
        if key not in adata.obs:
            raise ValueError(f"{name} has no column {key!r} in obs, only {list(adata.obs)}.")
    if not label_keys:
        return np.full(adata.n_obs, "")
    # The separator occurs in no name, so ("a b", "c") differs from ("a", "b c").
    columns = [adata.obs[key].astype(str) for key in label_keys]
    return np.array(["\x1f".join(names) for names in zip(*columns)])


def needs_common_genes(generated: ad.AnnData, real: ad.AnnData) -> bool:
    """Whether there are no genes beyond the generated ones, or the generated counts in them are unknown."""
    return generated.n_vars >= real.n_vars or "library_size" not in generated.obs


def real_cells(
    adata: ad.AnnData,
    genes: pd.Index,
    values: str = "counts",
    layer: str | None = None,
    label_keys: Sequence[str] = (),
    within_genes: bool = False,
) -> CellArrays:
    """Arrays of real cells. The library size is over all their genes, or over the judged ones with `within_genes`."""
    judged = adata[:, genes]
    library_size = _library_size(judged if within_genes else adata, layer, values, "real")
    return _arrays(judged, layer, library_size, values, label_keys)


def generated_cells(
    adata: ad.AnnData,
    values: str = "counts",
    label_keys: Sequence[str] = (),
    within_genes: bool = False,
    genes: pd.Index | None = None,
) -> CellArrays:
    """As [`real_cells`]. The library size is `obs["library_size"]`, or else the sum over the genes."""
    library_size = _library_size(adata, None, values, "generated")
    if values == "counts" and "library_size" in adata.obs:
        sizes = adata.obs["library_size"].to_numpy(dtype=np.float64)
        is_size = np.isfinite(sizes) & ((sizes > 0) | (library_size == 0) & (sizes == 0))
        if not is_size.all():
            wrong = f"Generated cell {adata.obs_names[~is_size][0]!r} has a library size of {sizes[~is_size][0]:g}"
            raise ValueError(f"{wrong}: give total counts in obs['library_size'], or remove the column.")
        library_size = library_size if within_genes else sizes
    has_labels = all(key in adata.obs for key in label_keys)
    judged = adata if genes is None else adata[:, genes]
    return _arrays(judged, None, library_size, values, label_keys if has_labels else ())


def _library_size(adata: ad.AnnData, layer: str | None, values: str, whose: str) -> np.ndarray | None:
    """Total counts `(cells,)` of a valid matrix; `None` for log values."""
    matrix = find_matrix(adata.X, adata.layers, layer, f"The data of {whose} cells")
    numbers = np.asarray(matrix.data if hasattr(matrix, "toarray") else matrix)
    if not np.isfinite(numbers).all() or (numbers < 0).any():
        raise ValueError(f"Some values of the {whose} cells are NaN, infinite or negative: remove or replace them.")
    if values == "counts" and (numbers != np.rint(numbers)).any():
        raise ValueError(f"The {whose} cells have values that are not integer counts: give counts, or --values log.")
    return total_counts(matrix, values)


def _arrays(
    adata: ad.AnnData, layer: str | None, library_size: np.ndarray | None, values: str, label_keys: Sequence[str]
) -> CellArrays:
    """Arrays of cells over the judged genes."""
    matrix = adata.X if layer is None else adata.layers[layer]
    matrix = np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix, dtype=np.float32)
    labels = combined_labels(adata, label_keys)
    types = combined_labels(adata, label_keys[:1]) if label_keys else None
    return CellArrays(matrix, to_expression(matrix, library_size, values), library_size, labels, types)
