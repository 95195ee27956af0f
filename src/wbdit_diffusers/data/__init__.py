"""Cells from files, split, and batched for training; public datasets."""

from .dataset import CellDataset, encode_cells
from .io import drop_empty_cells, load_pbmc, read_cells
from .split import CellSplit
from .writer import write_cells


__all__ = ["CellDataset", "CellSplit", "drop_empty_cells", "encode_cells", "load_pbmc", "read_cells", "write_cells"]
