"""Cells from files of any format, into memory."""

import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
from diffusers.utils import logging
from scipy import sparse

from ..files import one_line
from .cells import find_file
from .prepared import PreparedCells, is_prepared, read_metadata


logger = logging.get_logger(__name__)


def read_cells(path: str | Path, split: str | None = None) -> ad.AnnData:
    """
    Reads cells into memory: an .h5ad or .zarr file, a folder that `wbdit prepare` or `wbdit generate` wrote as
    parquet, or cells of 10x Genomics (an .h5 file, or a folder with matrix.mtx).

    Genes of 10x Genomics are named by symbol; repeated symbols get `-1`, `-2`, …, and `var["gene_ids"]` distinguishes
    them. A prepared folder may be on the Hub, `hf://datasets/me/cells`. Its splits are `"train"` and `"test"`: both by
    default. Raises a `ValueError` if the cells can't be read.
    """
    if is_prepared(path) or split is not None:
        splits = list(read_metadata(path)["splits"]) if split is None else [split]
        parts = [PreparedCells(path, name).read() for name in splits]
        return parts[0] if len(parts) == 1 else ad.concat(parts, merge="same")
    path = find_file(path)
    try:
        if path.suffix == ".zarr":
            return ad.read_zarr(path)
        return _read_10x(path) if path.suffix == ".h5" or path.is_dir() else _read_h5ad(path)
    except Exception as error:  # many kinds, on damaged files
        raise ValueError(f"{path} cannot be read as an .h5ad, .zarr or 10x file: {one_line(error)}") from error


def _read_h5ad(path: Path) -> ad.AnnData:
    """An AnnData file, without `uns` if another version of AnnData wrote something there that this one can't read."""
    try:
        return ad.read_h5ad(path)
    except Exception:  # the rest decides whether it is an AnnData file
        with h5py.File(path) as file:
            parts = {key: ad.io.read_elem(file[key]) for key in file if key != "uns"}
        logger.warning(f"`uns` of {path} can't be read, and is left out.")
        raw, cells = parts.pop("raw", None), ad.AnnData(**parts)
        cells.raw = raw
        return cells


def _read_10x(path: Path) -> ad.AnnData:
    """Gene expression by symbol, through Scanpy."""
    import scanpy as sc

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Variable names are not unique")
        cells = sc.read_10x_mtx(path) if path.is_dir() else sc.read_10x_h5(path)
        cells.var_names_make_unique()
    cells.X = sparse.csr_matrix(cells.X)
    return cells


def load_pbmc() -> ad.AnnData:
    """700 PBMCs × 765 genes with integer counts, `cell_type` and `phase`: `pbmc68k_reduced` in Scanpy."""
    import scanpy as sc

    reduced = sc.datasets.pbmc68k_reduced()
    counts = np.rint(np.expm1(reduced.raw.X.toarray()) * reduced.obs["n_counts"].to_numpy()[:, None] / 1e4)
    return ad.AnnData(
        sparse.csr_matrix(counts.astype(np.float32)),
        obs=reduced.obs[["bulk_labels", "phase"]].rename(columns={"bulk_labels": "cell_type"}),
        var=reduced.raw.var[[]],
    )
