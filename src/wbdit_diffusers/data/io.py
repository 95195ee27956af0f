"""Cells from files."""

from pathlib import Path

import anndata as ad
import numpy as np
from diffusers.utils import logging
from scipy import sparse

from .generated import is_generated, read_generated
from .prepared import PreparedCells, is_prepared, read_metadata
from .tenx import is_10x, read_10x


logger = logging.get_logger(__name__)


def read_cells(path: str | Path, split: str | None = None) -> ad.AnnData:
    """
    Reads an .h5ad or .zarr file, a folder that `wbdit prepare` or, as parquet files, `wbdit generate` wrote, or cells
    of 10x Genomics (an .h5 file or a folder with matrix.mtx, see [`read_10x`]), into memory.

    Args:
        path (`str` or `Path`): The file or folder; a prepared folder may be on the Hub, `hf://datasets/me/cells`.
        split (`str`, *optional*): `"train"` or `"test"` of a prepared folder; both, one after the other, by default.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it can't be read as an AnnData, or has no splits.
    """
    if is_prepared(path):
        splits = list(read_metadata(path)["splits"]) if split is None else [split]
        parts = [PreparedCells(path, name) for name in splits]
        cells = ad.concat([part.read() for part in parts])
        cells.var = parts[0].var
        return cells
    if split is not None:
        raise ValueError(f"{path} has no splits: only a folder of `wbdit prepare` has.")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}: give the path of an .h5ad file.")
    if is_10x(path):
        return read_10x(path)
    if is_generated(path):
        return read_generated(path)
    try:
        return ad.read_zarr(path) if path.suffix == ".zarr" else ad.read_h5ad(path)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as an .h5ad file: {error}") from error


def drop_empty_cells(adata: ad.AnnData, layer: str | None = None) -> ad.AnnData:
    """Leaves out cells in which nothing was measured, with a warning: they have no proportions to learn from."""
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        raise ValueError(f"The data have no matrix in X, only layers {list(adata.layers)}: name one (`--layer`).")
    empty = np.asarray((matrix != 0).sum(axis=1)).ravel() == 0
    if not empty.any() or empty.all():  # all: left to ScRNAProcessor, which raises
        return adata
    logger.warning(f"{empty.sum()} of {adata.n_obs} cells are empty and left out: {adata.obs_names[empty][0]}, ….")
    return adata[~empty].copy()


def load_pbmc() -> ad.AnnData:
    """
    700 PBMCs × 765 genes of 10x Genomics with integer counts, `cell_type` and `phase`; they come with Scanpy.

    Its `pbmc68k_reduced` holds log1p(count / n_counts × 10,000) in `raw`, from which the counts follow.
    """
    import scanpy as sc

    reduced = sc.datasets.pbmc68k_reduced()
    counts = np.rint(np.expm1(reduced.raw.X.toarray()) * reduced.obs["n_counts"].to_numpy()[:, None] / 1e4)
    return ad.AnnData(
        sparse.csr_matrix(counts.astype(np.float32)),
        obs=reduced.obs[["bulk_labels", "phase"]].rename(columns={"bulk_labels": "cell_type"}),
        var=reduced.raw.var[[]],
    )
