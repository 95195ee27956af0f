"""Cells from files and into files."""

from collections.abc import Iterable
from pathlib import Path

import anndata as ad
import numpy as np
from diffusers.utils import logging
from scipy import sparse


logger = logging.get_logger(__name__)


def read_cells(path: str | Path) -> ad.AnnData:
    """
    Reads an .h5ad file.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it can't be read as an AnnData.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}: give the path of an .h5ad file.")
    try:
        return ad.read_h5ad(path)
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


def write_cells(path: str | Path, batches: Iterable[ad.AnnData]) -> tuple[int, int]:
    """
    Writes batches of cells to one .h5ad file, each as it comes: only one is in memory at a time.

    Args:
        path (`str` or `Path`): The .h5ad file.
        batches (`Iterable[AnnData]`): Cells with the same genes, `obs` columns and categories, `X` and layers in
            CSR, `obsm` in arrays; as [`ScRNAGenerationPipeline.stream`] yields them.

    Returns:
        `tuple[int, int]`: number of cells and of genes.
    """
    import h5py

    batches = iter(batches)
    batch = next(batches, None)  # what was asked for is checked here, before a file is touched
    if batch is None:
        raise ValueError("There are no cells to write.")
    partial = Path(f"{path}.partial")
    growing = {"maxshape": (None,), "chunks": True}

    def growable(matrix):
        matrix = matrix.copy()
        matrix.indptr = matrix.indptr.astype(np.int64)  # the file may grow beyond 2³¹ values
        return matrix

    layers = {name: growable(layer) for name, layer in batch.layers.items()}
    with h5py.File(partial, "w") as file:
        ad.io.write_elem(file, "/", ad.AnnData(growable(batch.X), layers=layers, var=batch.var, uns=batch.uns))
        for name, matrix in batch.varm.items():
            ad.io.write_elem(file["varm"], name, matrix)
        for name, matrix in batch.obsm.items():
            shape = {"maxshape": (None, *matrix.shape[1:])}
            ad.io.write_elem(file["obsm"], name, matrix, dataset_kwargs=growing | shape)
        del file["obs"]
        ad.io.write_elem(file, "obs", batch.obs, dataset_kwargs=growing)
        obs = file["obs"]
        num_cells = batch.n_obs
        for batch in batches:
            ad.io.sparse_dataset(file["X"], should_cache_indptr=False).append(batch.X)
            for name, layer in batch.layers.items():
                ad.io.sparse_dataset(file["layers"][name], should_cache_indptr=False).append(layer)
            for name, matrix in batch.obsm.items():
                _append(file["obsm"][name], matrix)
            _append(obs[obs.attrs["_index"]], batch.obs_names.to_numpy(dtype=object))
            for key, column in batch.obs.items():
                if isinstance(obs[key], h5py.Group):
                    _append(obs[key]["codes"], column.cat.codes.to_numpy())
                else:
                    _append(obs[key], column.to_numpy())
            num_cells += batch.n_obs
    partial.replace(path)
    return num_cells, batch.n_vars


def _append(dataset, values: np.ndarray):
    """To an HDF5 dataset, along its first dimension."""
    dataset.resize(len(dataset) + len(values), axis=0)
    dataset[-len(values) :] = values


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
