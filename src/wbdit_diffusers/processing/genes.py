"""Which genes are modelled, and how those of other cells are aligned to them."""

import anndata as ad
import numpy as np
import pandas as pd
from diffusers.utils import logging
from scipy import sparse

from .matrix import iter_matrix
from .normalize import to_expression


logger = logging.get_logger(__name__)


def check_names(adata: ad.AnnData):
    """Raises a `ValueError` if there are no cells or genes, or if a gene's name occurs twice."""
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise ValueError(f"`adata` is empty: {adata.n_obs} cells × {adata.n_vars} genes.")
    if not adata.var_names.is_unique:
        name = adata.var_names[adata.var_names.duplicated()][0]
        raise ValueError(f"The gene name {name!r} occurs more than once: call `adata.var_names_make_unique()`.")


def choose_genes(
    adata: ad.AnnData,
    num_genes: int | None,
    min_cells: int,
    cells_per_gene: np.ndarray,
    library_size: np.ndarray,
    layer: str | None,
    values: str,
) -> np.ndarray:
    """
    The most variable genes by Scanpy's `highly_variable_genes(flavor="seurat")`.

    Args:
        adata (`AnnData`): Training cells.
        num_genes (`int`, *optional*): How many genes; `None` for all that enough cells express.
        min_cells (`int`): Cells that must express a gene; at most all of them.
        cells_per_gene (`np.ndarray` of shape `(genes,)`): How many cells express each gene.
        library_size (`np.ndarray` of shape `(cells,)`): Total counts.
        layer (`str`, *optional*): Layer that holds the matrix.
        values (`str`): What it holds: `"counts"` or `"log"`.

    Returns:
        `np.ndarray`: positions of the genes, in the order of `adata`.

    Raises:
        ValueError: If no gene is expressed in `min_cells` cells.
    """
    expressed = np.flatnonzero(cells_per_gene >= min(min_cells, adata.n_obs))
    if len(expressed) == 0:
        raise ValueError(f"No gene is expressed in {min_cells} cells: lower `min_cells`.")
    if num_genes is None or len(expressed) <= num_genes:
        return expressed
    import scanpy as sc

    matrices = []
    for start, matrix in iter_matrix(adata, layer, integer=False):
        expression = to_expression(matrix[:, expressed], library_size[start : start + matrix.shape[0]], values)
        matrices.append(sparse.csr_matrix(expression))
    log_normalised = ad.AnnData(sparse.vstack(matrices, format="csr"))
    variable = sc.pp.highly_variable_genes(log_normalised, n_top_genes=num_genes, flavor="seurat", inplace=False)
    return expressed[variable["highly_variable"].to_numpy()]


def align_genes(adata: ad.AnnData, var_names: pd.Index) -> sparse.csr_matrix:
    """
    Where the genes of an AnnData stand among the modelled ones.

    Args:
        adata (`AnnData`): Cells; their genes may be more, fewer, and in another order.
        var_names (`pd.Index`): The modelled genes.

    Returns:
        `scipy.sparse.csr_matrix` of shape `(genes of adata, modelled genes)`: 1 where they are the same. The product
        of the cells with it has the modelled genes in order; those that `adata` lacks are zero, and a warning names
        them.

    Raises:
        ValueError: If no gene is in common.
    """
    positions = adata.var_names.get_indexer(var_names)
    missing = var_names[positions < 0]
    if len(missing) == len(var_names):
        raise ValueError(
            f"None of the {len(missing)} genes of this model ({', '.join(missing[:3])}, …) is in `adata.var_names`"
            f" ({', '.join(adata.var_names[:3])}, …): set `adata.var_names` to the same kind of gene name."
        )
    if len(missing):
        logger.warning(
            f"{len(missing)} of the {len(var_names)} modelled genes are missing from `adata` and are taken as zero:"
            f" {', '.join(missing[:10])}{', …' if len(missing) > 10 else ''}."
        )
    present = positions >= 0
    return sparse.csr_matrix(
        (np.ones(present.sum(), dtype=np.float32), (positions[present], np.flatnonzero(present))),
        shape=(adata.n_vars, len(var_names)),
    )
