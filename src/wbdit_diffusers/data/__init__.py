"""Cells from files, split, and batched for training; public datasets."""

from .cells import AnnDataSource, BackedSource, CellSource
from .dataset import CellDataset, encode_cells
from .io import drop_empty_cells, load_pbmc, read_cells
from .order import BatchSampler, CellOrder
from .preparation import PrepareConfig, prepare
from .prepared import PreparedCells
from .split import CellSplit
from .writer import write_cells


__all__ = [
    "AnnDataSource",
    "BackedSource",
    "BatchSampler",
    "CellDataset",
    "CellOrder",
    "CellSource",
    "CellSplit",
    "PrepareConfig",
    "PreparedCells",
    "drop_empty_cells",
    "encode_cells",
    "load_pbmc",
    "prepare",
    "read_cells",
    "write_cells",
]
