"""The modelled genes: how they are chosen, and how the genes of other cells are aligned to them."""

import anndata as ad
import numpy as np
import pandas as pd
import torch
from diffusers.utils import logging
from scipy import sparse

from ..data.cells import CellSource, check_unique


logger = logging.get_logger(__name__)

# A fraction and a number of modelled genes. Below both, names are of another kind or species; a panel has few genes.
MIN_COMMON_FRACTION, MIN_COMMON_GENES = 0.01, 10


def check_names(source: CellSource):
    """Raises a `ValueError` if there are no cells or genes, or if a gene has no name of its own."""
    num_cells, var_names = int(source.group_sizes.sum()), source.var_names
    if num_cells == 0 or len(var_names) == 0:
        raise ValueError(f"`adata` is empty: {num_cells} cells × {len(var_names)} genes.")
    check_unique(var_names, "gene")


def choose_genes(
    expression: list[sparse.csr_matrix], num_genes: int | None, min_cells: int, cells_per_gene: np.ndarray
) -> np.ndarray:
    """Sorted positions of the most variable genes (`None`: all) that at least `min_cells` cells express."""
    expressed = np.flatnonzero(cells_per_gene >= min_cells)
    if len(expressed) == 0:
        raise ValueError(f"No gene is expressed in {min_cells} cells: lower `min_cells`.")
    if num_genes is None or len(expressed) <= num_genes:
        return expressed
    parts = []
    while expression:  # frees memory
        parts.append(expression.pop(0)[:, expressed])
    return expressed[most_variable(sparse.vstack(parts, format="csr"), num_genes)]


def most_variable(expression: sparse.csr_matrix, num_genes: int) -> np.ndarray:
    """Sorted positions of the `num_genes` most variable genes in log values `(cells, genes)`, as Scanpy finds them."""
    import scanpy as sc  # slow to import

    check_variation(expression)
    num_threads = torch.get_num_threads()
    table = sc.pp.highly_variable_genes(ad.AnnData(expression), n_top_genes=num_genes, flavor="seurat", inplace=False)
    torch.set_num_threads(num_threads)  # Numba changes them for all of OpenMP
    return np.flatnonzero(table["highly_variable"])


def check_variation(matrix: sparse.csr_matrix):
    """Raises a `ValueError` if all cells are alike."""
    from sklearn.utils.sparsefuncs import mean_variance_axis  # slow to import

    if mean_variance_axis(matrix, axis=0)[1].max() == 0:
        raise ValueError("All cells are alike in every gene: there is nothing to learn.")


def align_genes(var_names: pd.Index, modelled: pd.Index) -> np.ndarray:
    """Positions of the cells' genes among the modelled ones, -1 for others. Missing ones are named in a warning."""
    missing = modelled[~modelled.isin(var_names)]
    if len(modelled) - len(missing) <= min(MIN_COMMON_FRACTION * len(modelled), MIN_COMMON_GENES):
        raise ValueError(
            f"{len(missing)} of the {len(modelled)} genes of this model ({', '.join(missing[:3])}, …) are not in"
            f" `adata.var_names` ({', '.join(var_names[:3])}, …): set it to the same kind of gene name."
        )
    if len(missing):
        logger.warning(
            f"{len(missing)} of the {len(modelled)} modelled genes are missing from `adata`:"
            f" {', '.join(missing[:10])}{', …' if len(missing) > 10 else ''}."
        )
    return modelled.get_indexer(var_names)
