"""Cells from files, split, and batched for training; public datasets."""

from .io import drop_empty_cells, load_pbmc, read_cells
from .latents import CellDataset, CellOrder, Latents, encode_cells, encode_source
from .preparation import PrepareConfig, prepare
from .prepared import PreparedCells
from .source import AnnDataSource, CellSource
from .split import CellSplit
from .writer import write_cells


__all__ = [
    "AnnDataSource",
    "CellDataset",
    "CellOrder",
    "CellSource",
    "CellSplit",
    "Latents",
    "PrepareConfig",
    "PreparedCells",
    "drop_empty_cells",
    "encode_cells",
    "encode_source",
    "load_pbmc",
    "prepare",
    "read_cells",
    "write_cells",
]
