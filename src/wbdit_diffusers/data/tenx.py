"""Cells as Cell Ranger and STARsolo write them: an .h5 file, or a folder with a matrix.mtx."""

import warnings
from pathlib import Path

import anndata as ad
from scipy import sparse


def is_10x(path: Path) -> bool:
    """Whether a file or folder has the layout of 10x Genomics; one that is damaged has none."""
    if path.is_dir():
        return any((path / name).is_file() for name in ("matrix.mtx", "matrix.mtx.gz"))
    import h5py

    try:
        with h5py.File(path) as file:
            # Cell Ranger 3 has one group "matrix", earlier ones one for each genome; an AnnData has "obs" and "var".
            return any("barcodes" in group for group in file.values() if isinstance(group, h5py.Group))
    except (OSError, KeyError, RuntimeError):  # no HDF5, or a damaged one: whoever reads it says so
        return False


def read_10x(path: Path) -> ad.AnnData:
    """
    Reads an .h5 file, or a folder with matrix.mtx, through Scanpy: gene expression only, genes by symbol. Symbols that
    occur more than once are made unique as Scanpy does, `-1`, `-2`, …; `var["gene_ids"]` tells such genes apart.

    Raises:
        FileNotFoundError: If a file of the folder is missing.
        ValueError: If the files can't be read.
    """
    import scanpy as sc

    if path.is_dir():
        _check_folder(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Variable names are not unique")  # what is done about it comes below
            cells = sc.read_10x_mtx(path) if path.is_dir() else sc.read_10x_h5(path)
            cells.var_names_make_unique()
    except Exception as error:
        raise ValueError(f"{path} cannot be read as cells of 10x Genomics: {error}") from error
    cells.X = sparse.csr_matrix(cells.X)
    return cells


def _check_folder(path: Path):
    """Scanpy reads two layouts: genes.tsv and no file compressed, or features.tsv.gz and all of them compressed."""
    legacy = (path / "genes.tsv").is_file()
    names = ("matrix.mtx", "genes.tsv", "barcodes.tsv") if legacy else ("features.tsv", "barcodes.tsv", "matrix.mtx")
    for name in names:
        expected = path / (name if legacy else f"{name}.gz")
        if expected.is_file():
            continue
        if not legacy and (path / name).is_file():
            raise FileNotFoundError(f"{path} has {name} and no {expected.name}: compress it with gzip.")
        if legacy and (path / f"{name}.gz").is_file():
            raise FileNotFoundError(f"{path} has genes.tsv and {name}.gz: uncompress it with gunzip.")
        raise FileNotFoundError(f"{path} has no {expected.name}, which belongs to the other files of 10x Genomics.")
