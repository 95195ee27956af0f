"""Which genes are modelled, and how those of other cells are aligned to them."""

import numpy as np
import pandas as pd
from diffusers.utils import logging
from scipy import sparse

from ..data.source import CellSource, iter_groups
from .normalize import to_expression


logger = logging.get_logger(__name__)

NUM_BINS = 20  # of mean expression, within which genes are compared


def check_names(source: CellSource):
    """Raises a `ValueError` if there are no cells or genes, or if a gene's name occurs twice."""
    num_cells, var_names = int(source.group_sizes.sum()), source.var_names
    if num_cells == 0 or len(var_names) == 0:
        raise ValueError(f"`adata` is empty: {num_cells} cells × {len(var_names)} genes.")
    if not var_names.is_unique:
        name = var_names[var_names.duplicated()][0]
        raise ValueError(f"The gene name {name!r} occurs more than once: call `adata.var_names_make_unique()`.")


def choose_genes(
    source: CellSource,
    num_genes: int | None,
    min_cells: int,
    cells_per_gene: np.ndarray,
    library_size: np.ndarray,
    values: str,
) -> np.ndarray:
    """
    The genes that Scanpy's `highly_variable_genes(flavor="seurat")` chooses, from cells that are read group by group.

    Args:
        source ([`CellSource`]): Training cells.
        num_genes (`int`, *optional*): How many genes; `None` for all that enough cells express.
        min_cells (`int`): Cells that must express a gene; at most all of them.
        cells_per_gene (`np.ndarray` of shape `(genes,)`): How many cells express each gene.
        library_size (`np.ndarray` of shape `(cells,)`): Total counts.
        values (`str`): What the matrix holds: `"counts"` or `"log"`.

    Returns:
        `np.ndarray`: positions of the genes, in the order of the cells' genes.

    Raises:
        ValueError: If no gene is expressed in `min_cells` cells.
    """
    expressed = np.flatnonzero(cells_per_gene >= min(min_cells, len(library_size)))
    if len(expressed) == 0:
        raise ValueError(f"No gene is expressed in {min_cells} cells: lower `min_cells`.")
    if num_genes is None or len(expressed) <= num_genes:
        return expressed
    mean, variance = _moments(source, library_size, values)
    dispersions = _normalised_dispersions(mean[expressed], variance[expressed])
    known = dispersions[~np.isnan(dispersions)]
    return expressed[dispersions >= np.sort(known)[-min(num_genes, len(known))]]  # NaN is not


def _moments(source: CellSource, library_size: np.ndarray, values: str) -> tuple[np.ndarray, np.ndarray]:
    """
    Mean and variance of each gene's normalised values, no longer as logarithms: `(genes,)` each. The groups' own are
    put together in the way of Chan et al. (1979), which loses no digits where means are large.
    """
    num_cells, mean, squares = 0, np.zeros(len(source.var_names)), np.zeros(len(source.var_names))
    for start, matrix, _ in iter_groups(source, integer=False):
        size = matrix.shape[0]
        expression = sparse.csr_matrix(to_expression(matrix, library_size[start : start + size], values))
        normalised = np.expm1(expression.data).astype(np.float64)
        genes = expression.indices
        group_mean = np.bincount(genes, normalised, len(mean)) / size
        deviations = np.bincount(genes, np.square(normalised - group_mean[genes]), len(mean))
        deviations += (size - np.bincount(genes, minlength=len(mean))) * group_mean**2  # the zeros'
        shift = group_mean - mean
        squares += deviations + shift**2 * (num_cells * size / (num_cells + size))
        num_cells += size
        mean += shift * (size / num_cells)
    return mean, squares / max(num_cells - 1, 1)


def _normalised_dispersions(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Seurat's: the log of variance over mean, standardised among genes of about the same mean; NaN if constant."""
    mean = np.where(mean == 0, 1e-12, mean)
    dispersion = variance / mean
    dispersion = pd.Series(np.log(np.where(dispersion == 0, np.nan, dispersion)))
    bins = dispersion.groupby(pd.cut(np.log1p(mean), bins=NUM_BINS), observed=True)
    center, scale = bins.transform("mean"), bins.transform("std")
    alone = scale.isna()  # in its bin: its dispersion is 1
    scale, center = scale.where(~alone, center), center.where(~alone, 0.0)
    return ((dispersion - center) / scale).to_numpy()


def align_genes(var_names: pd.Index, modelled: pd.Index) -> np.ndarray:
    """
    Where the genes of cells stand among the modelled ones.

    Args:
        var_names (`pd.Index`): The cells' genes; they may be more, fewer, and in another order.
        modelled (`pd.Index`): The modelled genes.

    Returns:
        `np.ndarray` of shape `(genes of the cells,)`: their places among the modelled ones, -1 for others. Modelled
        genes that the cells lack are named in a warning.

    Raises:
        ValueError: If no gene is in common.
    """
    missing = modelled[~modelled.isin(var_names)]
    if len(missing) == len(modelled):
        raise ValueError(
            f"None of the {len(missing)} genes of this model ({', '.join(missing[:3])}, …) is in `adata.var_names`"
            f" ({', '.join(var_names[:3])}, …): set `adata.var_names` to the same kind of gene name."
        )
    if len(missing):
        logger.warning(
            f"{len(missing)} of the {len(modelled)} modelled genes are missing from `adata` and are taken as zero:"
            f" {', '.join(missing[:10])}{', …' if len(missing) > 10 else ''}."
        )
    return modelled.get_indexer(var_names)
