"""The same cells in every form that a file may have."""

from pathlib import Path

import anndata as ad
import numpy as np
from scipy import io, sparse


def in_form(cells: ad.AnnData, form: str) -> tuple[ad.AnnData, str | None]:
    """A copy with its matrix in another form, and the layer that holds it."""
    cells = cells.copy()
    if form == "csc":
        cells.X = sparse.csc_matrix(cells.X)
    elif form == "dense":
        cells.X = cells.X.toarray()
    elif form == "int64":
        cells.X = cells.X.astype(np.int64)
    elif form == "layer":
        cells.layers["counts"], cells.X = cells.X.copy(), np.full(cells.shape, np.nan)
    elif form == "stored zeros":  # a stored zero does not express a gene
        indptr = np.arange(cells.n_obs + 1) * cells.n_vars
        indices = np.tile(np.arange(cells.n_vars), cells.n_obs)
        cells.X = sparse.csr_matrix((cells.X.toarray().ravel(), indices, indptr))
    return cells, "counts" if form == "layer" else None


def write_mtx(folder: Path, matrix: np.ndarray, texts: dict[str, list[str]]):
    """A folder of 10x Genomics: genes × cells, and the lines of the files of text."""
    folder.mkdir(parents=True)
    io.mmwrite(folder / "matrix.mtx", sparse.coo_matrix(matrix.T))
    for name, lines in texts.items():
        (folder / name).write_text("\n".join(lines) + "\n")
