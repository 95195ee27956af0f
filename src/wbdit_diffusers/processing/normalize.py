"""log1p(CP10k): the one normalisation of this package, over the total of *all* genes, as Scanpy has it."""

import numpy as np
import torch
from scipy import sparse


TARGET_SUM = 1e4  # "CP10k": counts per 10,000
VALUES = ("counts", "log")


def log_normalize(counts, library_size):
    """
    `log1p(counts / library_size * 10,000)`.

    The library size is given, not summed up here: the total of the modelled genes alone would differ between two cells
    that agree in all of them but not in the others.

    Args:
        counts (`scipy.sparse.csr_matrix`, `np.ndarray` or `torch.Tensor` of shape `(cells, genes)`): Counts.
        library_size (`np.ndarray` or `torch.Tensor` of shape `(cells,)`):
            Total counts of each cell over all its genes, those that are not in `counts` included.

    Returns:
        The same kind of matrix: CSR or array in float32, or a tensor through which gradients flow.

    Raises:
        ValueError: If there is not one library size for each cell.
    """
    if len(library_size) != counts.shape[0]:
        raise ValueError(
            f"There are {len(library_size)} library sizes for {counts.shape[0]} cells: give one per cell."
        )
    if torch.is_tensor(counts):
        return torch.log1p(counts * (TARGET_SUM / torch.as_tensor(library_size, device=counts.device))[:, None])
    # A cell without counts has zeros, whatever they are divided by.
    scale = (TARGET_SUM / np.where(library_size > 0, library_size, 1)).astype(np.float32)
    if sparse.issparse(counts):
        expression = sparse.csr_matrix(sparse.diags_array(scale) @ counts.astype(np.float32))
        expression.data = np.log1p(expression.data)
        return expression
    return np.log1p(np.asarray(counts, dtype=np.float32) * scale[:, None])


def to_expression(matrix, library_size, values: str):
    """
    Cells on the scale on which they are modelled, judged and drawn.

    Args:
        matrix (`scipy.sparse.csr_matrix`, `np.ndarray` or `torch.Tensor` of shape `(cells, genes)`):
            Counts, or values that are on a log scale already.
        library_size (`np.ndarray` or `torch.Tensor` of shape `(cells,)`): Total counts; of no use for log values.
        values (`str`): What the matrix holds: `"counts"` become [`log_normalize`]d, `"log"` stay as they are.

    Returns:
        The same kind of matrix as `matrix`.

    Raises:
        ValueError: If `values` is neither, or counts come without library sizes.
    """
    _check(values)
    if values == "log":
        return matrix
    if library_size is None:
        raise ValueError("Counts are normalised by the library sizes of their cells: give `library_size`.")
    return log_normalize(matrix, library_size)


def total_counts(matrix, values: str) -> np.ndarray | None:
    """
    Library size of each cell, the sum of its row: `(cells,)`, float64. `None` for log values: theirs counts nothing.

    Args:
        matrix (`scipy.sparse.csr_matrix` or `np.ndarray` of shape `(cells, genes)`): All genes of the cells.
        values (`str`): What the matrix holds: `"counts"` or `"log"`.

    Raises:
        ValueError: If `values` is neither.
    """
    _check(values)
    return np.asarray(matrix.sum(axis=1), dtype=np.float64).ravel() if values == "counts" else None


def _check(values: str):
    if values not in VALUES:
        raise ValueError(f"`values` is 'counts' or 'log', not {values!r}.")
