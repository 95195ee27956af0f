"""log1p(CP10k), as in Scanpy: the only normalisation here. The total is over *all* genes."""

import numpy as np
import torch
from scipy import sparse


TARGET_SUM = 1e4  # "CP10k": counts per 10,000
VALUES = ("counts", "log")


def log_normalize(counts, library_size):
    """`log1p(counts / library_size * 10,000)` of a CSR matrix, array or tensor. The library size is over all genes."""
    if torch.is_tensor(counts):
        return torch.log1p(counts * (TARGET_SUM / torch.as_tensor(library_size, device=counts.device))[:, None])
    # A cell without counts keeps its zeros.
    scale = (TARGET_SUM / np.where(library_size > 0, library_size, 1)).astype(np.float32)
    if sparse.issparse(counts):
        expression = sparse.csr_matrix(sparse.diags_array(scale) @ counts.astype(np.float32))
        expression.data = np.log1p(expression.data)
        return expression
    return np.log1p(np.asarray(counts, dtype=np.float32) * scale[:, None])


def to_expression(matrix, library_size, values: str):
    """Values on the log scale, on which cells are modelled and judged: counts by [`log_normalize`], or log values."""
    return matrix if values == "log" else log_normalize(matrix, library_size)


def total_counts(matrix, values: str) -> np.ndarray | None:
    """Library size of each cell `(cells,)`, float64, over all genes of a matrix; `None` for log values."""
    return np.asarray(matrix.sum(axis=1), dtype=np.float64).ravel() if values == "counts" else None
