"""Cells as checked CSR pieces, whatever form the AnnData has them in."""

from collections.abc import Iterator

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse


CHUNK_SIZE = 4096  # cells read at once, so that a backed file is never whole in memory


def iter_matrix(
    adata: ad.AnnData, layer: str | None = None, integer: bool = True
) -> Iterator[tuple[int, sparse.csr_matrix]]:
    """
    Reads an AnnData piece by piece.

    Args:
        adata (`AnnData`): Cells; CSR, CSC, dense or backed.
        layer (`str`, *optional*): Layer that holds the matrix; `X` by default.
        integer (`bool`, defaults to `True`): Whether the values must be integer counts.

    Yields:
        `tuple`: number of the piece's first cell, and the piece, `(at most CHUNK_SIZE, genes)`, without stored zeros.

    Raises:
        ValueError: If there is no such layer, or a value can't be modelled: NaN, infinite, negative, not integer
            though it must be; or if a cell is empty. The message names the first cell at fault.
    """
    if layer is not None and layer not in adata.layers:
        raise ValueError(f"`adata` has no layer {layer!r}; it has {list(adata.layers)}. Give one, or None for X.")
    name = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    for start in range(0, adata.n_obs, CHUNK_SIZE):
        rows = slice(start, start + CHUNK_SIZE)
        # Slicing the AnnData, not the matrix, works alike for dense, CSR, CSC and backed ones.
        chunk = adata[rows]
        matrix = sparse.csr_matrix(chunk.X if layer is None else chunk.layers[layer])
        _check_values(matrix, name, adata.obs_names[rows], integer)
        matrix.eliminate_zeros()
        yield start, matrix


def _check_values(matrix: sparse.csr_matrix, name: str, obs_names: pd.Index, integer: bool):
    values = matrix.data

    def at(wrong: np.ndarray) -> str:
        row = np.searchsorted(matrix.indptr, np.flatnonzero(wrong)[0], side="right") - 1
        return f"{name} holds {values[wrong][0]:g} (cell {obs_names[row]!r})"

    if not np.isfinite(values).all():
        raise ValueError(f"{at(~np.isfinite(values))}: remove or replace NaN and infinite values.")
    if (values < 0).any():
        mend = "centred or scaled values can't be modelled; give counts, or log1p values with values='log'"
        raise ValueError(f"{at(values < 0)}, but expression is never negative: {mend}.")
    if integer:
        fractional = values != np.rint(values)
        if fractional.any():
            raise ValueError(
                f"{at(fractional)}, which is no integer count. If these are log-normalised values, pass values='log';"
                " if the counts are in a layer, name it with `layer`."
            )
    empty = np.asarray(matrix.sum(axis=1)).ravel() == 0
    if empty.any():
        raise ValueError(
            f"{empty.sum()} cells of {name} have no counts at all (the first is {obs_names[empty][0]!r}): remove them"
            " with `sc.pp.filter_cells(adata, min_counts=1)`."
        )
