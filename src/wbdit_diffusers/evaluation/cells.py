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
    """
    Arrays of the judged cells. Indexing with positions or a mask selects cells.

    Args:
        matrix (`np.ndarray` of shape `(cells, genes)`): Counts or log values of the judged genes, as measured.
        expression (`np.ndarray` of shape `(cells, genes)`): The same on the log scale, see [`to_expression`].
        library_size (`np.ndarray` of shape `(cells,)`, *optional*): Total counts over all genes; none for log values.
        labels (`np.ndarray` of shape `(cells,)`, *optional*): All label keys of a cell, combined; `""` by default.
        types (`np.ndarray` of shape `(cells,)`, *optional*): The first label key alone, e.g. the cell type.
    """

    matrix: np.ndarray
    expression: np.ndarray
    library_size: np.ndarray | None = None
    labels: np.ndarray | None = None
    types: np.ndarray | None = None

    def __post_init__(self):
        self.labels = np.full(len(self), "") if self.labels is None else self.labels

    def __len__(self) -> int:
        return len(self.matrix)

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
    """
    Arrays of real cells with all their genes. Their library size is the sum over these, regardless of their `obs`. It
    is the sum over the judged `genes` with `within_genes`. `label_keys` are columns of `obs`, the cell type first.
    [`evaluate_cells`] describes `values` and `layer`. Raises a `ValueError` if genes or columns are missing.
    """
    missing = genes.difference(adata.var_names)
    if len(missing):
        which = f"{len(missing)} generated genes are not among the genes of the real cells, e.g. {missing[0]!r}"
        raise ValueError(f"{which}: rename or remove them.")
    adata = adata[:, genes] if within_genes else adata
    library_size = _library_size(find_matrix(adata.X, adata.layers, layer, "The real cells"), values, "real")
    judged = adata[:, genes]
    return _arrays(judged, judged.X if layer is None else judged.layers[layer], library_size, values, label_keys)


def generated_cells(
    adata: ad.AnnData, values: str = "counts", label_keys: Sequence[str] = (), within_genes: bool = False
) -> CellArrays:
    """
    Arrays of generated cells, as [`real_cells`]. Their library size is `obs["library_size"]`, or else the sum over
    their genes. Cells without one of the label columns have no labels.
    """
    total = _library_size(find_matrix(adata.X, {}, None, "The generated file"), values, "generated")
    if total is not None and not within_genes and "library_size" in adata.obs:
        sizes = adata.obs["library_size"].to_numpy(dtype=np.float64)
        is_valid = np.isfinite(sizes) & ((sizes > 0) | ((sizes == 0) & (total == 0)))
        if not is_valid.all():
            raise ValueError("obs['library_size'] of generated cells is NaN, infinite, negative or zero: correct it.")
        total = sizes
    has_labels = all(key in adata.obs for key in label_keys)
    return _arrays(adata, adata.X, total, values, label_keys if has_labels else ())


def _library_size(matrix, values: str, whose: str) -> np.ndarray | None:
    """Total counts `(cells,)` of a valid matrix; `None` for log values."""
    numbers = np.asarray(matrix.data if hasattr(matrix, "toarray") else matrix)
    if not np.isfinite(numbers).all() or (numbers < 0).any():
        raise ValueError(f"The {whose} cells have NaN, infinite or negative values: remove or replace them.")
    if values == "counts" and (numbers != np.rint(numbers)).any():
        raise ValueError(f"The {whose} cells have values that are not integer counts: give counts, or --values log.")
    return total_counts(matrix, values)


def _arrays(
    adata: ad.AnnData, matrix, library_size: np.ndarray | None, values: str, label_keys: Sequence[str]
) -> CellArrays:
    """Arrays of cells over the judged genes."""
    matrix = np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix, dtype=np.float32)
    labels = combined_labels(adata, label_keys)
    types = adata.obs[label_keys[0]].astype(str).to_numpy(dtype=str) if len(label_keys) else None
    return CellArrays(matrix, to_expression(matrix, library_size, values), library_size, labels, types)
