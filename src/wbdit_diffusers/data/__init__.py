"""Cells from files, split, and as arrays for training."""

from ..configs import PrepareConfig
from .cells import AnnDataSource, BackedSource, CellSource
from .latents import CellDataset, encode_cells
from .prepare import prepare
from .prepared import PreparedCells
from .read import load_pbmc, read_cells
from .split import CellSplit
from .write import write_cells


__all__ = ["AnnDataSource", "BackedSource", "CellDataset", "CellSource", "CellSplit", "PrepareConfig"]
__all__ += ["PreparedCells", "encode_cells", "load_pbmc", "prepare", "read_cells", "write_cells"]
