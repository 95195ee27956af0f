"""`Cells`: what the evaluation sees of an AnnData, with one rule for library sizes."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import anndata as ad
import numpy as np
import pandas as pd

from ..processing.normalize import to_expression, total_counts


@dataclass
class Cells:
    """
    Cells as they are judged. Index it with positions or a mask.

    Args:
        matrix (`np.ndarray` of shape `(cells, genes)`): The judged genes as they were measured: counts, or log values.
        expression (`np.ndarray` of shape `(cells, genes)`):
            The same on the log scale, see [`~processing.normalize.to_expression`].
        library_size (`np.ndarray` of shape `(cells,)`, *optional*): Total counts over all genes; none of log values.
        labels (`np.ndarray` of shape `(cells,)`, *optional*): What cells are matched by: all label keys together.
        types (`np.ndarray` of shape `(cells,)`, *optional*): The first label key alone, e.g. the cell type.
    """

    matrix: np.ndarray
    expression: np.ndarray
    library_size: np.ndarray | None = None
    labels: np.ndarray | None = None
    types: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.matrix)

    def __getitem__(self, cells: np.ndarray) -> "Cells":
        arrays = (getattr(self, field.name) for field in fields(self))
        return Cells(*(None if array is None else array[cells] for array in arrays))

    def other_genes_share(self) -> np.ndarray:
        """Share of each cell's counts that lies in genes which are not judged, `(cells,)`."""
        return 1 - self.matrix.sum(axis=1) / np.maximum(self.library_size, 1)


def label_keys_of(label_key: str | Sequence[str] | None) -> list[str]:
    """One `obs` key, several or none, as a list."""
    return [] if label_key is None else [label_key] if isinstance(label_key, str) else list(label_key)


def combined_labels(adata: ad.AnnData, label_keys: Sequence[str]) -> np.ndarray:
    """All label keys of each cell in one name, `(cells,)`; without label keys all cells have the same one."""
    for key in label_keys:
        if key not in adata.obs:
            raise ValueError(f"`obs` has no column {key!r} for the labels; it has {list(adata.obs)}.")
    if not label_keys:
        return np.full(adata.n_obs, "")
    # A character that no name has keeps ("a b", "c") and ("a", "b c") apart.
    columns = [adata.obs[key].astype(str) for key in label_keys]
    return np.array(["\x1f".join(names) for names in zip(*columns)])


def needs_common_genes(generated: ad.AnnData, real: ad.AnnData) -> bool:
    """
    Whether cells are compared within the generated genes alone: either there are no others, so that a cell's library
    is the sum of its row on both sides; or no `obs["library_size"]` says how many counts a cell would have in them.
    """
    return generated.n_vars >= real.n_vars or "library_size" not in generated.obs


def real_cells(
    adata: ad.AnnData,
    genes: pd.Index,
    values: str = "counts",
    layer: str | None = None,
    label_keys: Sequence[str] = (),
    within_genes: bool = False,
) -> Cells:
    """
    Real cells for judging: their library size is the sum over all of their genes, whatever their `obs` says.

    Args:
        adata (`AnnData`): Real cells, with all their genes.
        genes (`pd.Index`): The judged genes.
        values (`str`, defaults to `"counts"`): What the matrix holds: `"counts"` or `"log"`.
        layer (`str`, *optional*): The layer that holds the matrix; `X` by default.
        label_keys (`Sequence[str]`, defaults to `()`): Columns of `obs`, the cell type first.
        within_genes (`bool`, defaults to `False`): Whether the library is that of the judged genes alone.

    Returns:
        [`Cells`]
    """
    missing = genes.difference(adata.var_names)
    if len(missing):
        raise ValueError(
            f"{len(missing)} generated genes are not among the real cells', e.g. {missing[0]!r}: give the generated"
            " cells the names of the real ones, or leave these genes out."
        )
    if layer is not None and layer not in adata.layers:
        raise ValueError(f"The real cells have no layer {layer!r}; they have {list(adata.layers)}.")
    adata = adata[:, genes] if within_genes else adata
    library_size = total_counts(_checked(adata.X if layer is None else adata.layers[layer], values, "real"), values)
    judged = adata[:, genes]
    return _cells(judged, judged.X if layer is None else judged.layers[layer], library_size, values, label_keys)


def generated_cells(
    adata: ad.AnnData, values: str = "counts", label_keys: Sequence[str] = (), within_genes: bool = False
) -> Cells:
    """
    Generated cells for judging: their library size is `obs["library_size"]`, or the sum over their genes if that is
    absent. The arguments are those of [`real_cells`]; labels that are not in `obs` are left out.
    """
    library_size = total_counts(_checked(adata.X, values, "generated"), values)
    if library_size is not None and not within_genes and "library_size" in adata.obs:
        library_size = adata.obs["library_size"].to_numpy(dtype=np.float64)
    has_labels = all(key in adata.obs for key in label_keys)
    return _cells(adata, adata.X, library_size, values, label_keys if has_labels else ())


def _checked(matrix, values: str, whose: str):
    """The matrix. Raises a `ValueError` if there is none, or if it does not hold what `values` says."""
    if matrix is None:
        raise ValueError(f"The {whose} cells have no matrix in X, so that there is nothing to compare.")
    numbers = np.asarray(matrix.data if hasattr(matrix, "toarray") else matrix)
    if numbers.dtype.kind not in "iufb" or not np.isfinite(numbers).all():
        raise ValueError(f"The {whose} cells hold NaN or infinite values, or no numbers: remove or replace them.")
    if (numbers < 0).any():
        raise ValueError(f"The {whose} cells hold negative values: expression is never negative.")
    if values == "counts" and (numbers != np.rint(numbers)).any():
        raise ValueError(
            f"The {whose} cells hold values that are no integer counts: give counts, or say --values log."
        )
    return matrix


def _cells(
    adata: ad.AnnData, matrix, library_size: np.ndarray | None, values: str, label_keys: Sequence[str]
) -> Cells:
    matrix = np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix, dtype=np.float32)
    labels = combined_labels(adata, label_keys) if len(label_keys) else None
    types = adata.obs[label_keys[0]].astype(str).to_numpy(dtype=str) if len(label_keys) else None
    return Cells(matrix, to_expression(matrix, library_size, values), library_size, labels, types)
