"""Cells in memory, their latents, and the endless order in which a training reads them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import torch

from ..files import write_whole
from .cells import MAX_CELLS_IN_MEMORY, CellSource, choose_groups


if TYPE_CHECKING:  # they import data/
    from ..models import ExpressionCodec, ProgramCodec
    from ..processing.processor import ScRNAProcessor

MAX_VALUES_IN_MEMORY = 2**28  # of the modelled genes, zeros included. CSR takes about a tenth of the bytes.


class CellDataset:
    """The modelled genes of cells, or of some groups of a source, sparse and in memory."""

    def __init__(
        self,
        cells: ad.AnnData | CellSource,
        processor: ScRNAProcessor,
        with_labels: bool = True,
        groups: list[int] | None = None,
    ):
        self.matrix, self.library_size = processor.select(cells, groups)  # (cells, genes) and (cells,)
        self.is_counts = processor.is_counts
        self.class_labels = processor.encode_labels(cells) if with_labels else None  # (cells, num_label_keys)
        if groups is not None and self.class_labels is not None:
            by_group = self.class_labels.split(processor.source(cells).group_sizes.tolist())
            self.class_labels = torch.cat([by_group[group] for group in groups])
        self.condition_sizes = processor.condition_sizes if with_labels else ()

    def __len__(self) -> int:
        return self.matrix.shape[0]

    def cells(self, indices: np.ndarray | list[int] | slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns dense values `(batch, genes)` and library sizes `(batch,)` of some cells, both float32."""
        values = torch.from_numpy(self.matrix[indices].toarray().astype(np.float32))
        return values, torch.from_numpy(self.library_size[indices].astype(np.float32))


@dataclass
class Latents:
    """The cells of a training as the denoiser sees them."""

    values: torch.Tensor  # (cells, num_features), in memory or mapped from a file
    class_labels: torch.Tensor  # int64, (cells, num_label_keys)
    condition_sizes: tuple[int, ...]  # number of categories of each label key

    def __len__(self) -> int:
        return len(self.values)

    def batch(self, indices: np.ndarray, device: torch.device) -> dict[str, torch.Tensor]:
        """Returns `latents` `(batch, num_features)` and `class_labels` `(batch, num_label_keys)` of some cells."""
        cells = {"latents": self.values[indices], "class_labels": self.class_labels[indices]}
        return {name: values.to(device, non_blocking=True) for name, values in cells.items()}


def sample_cells(cells: ad.AnnData | CellSource, processor: ScRNAProcessor, seed: int) -> CellDataset:
    """Reads all cells, or random groups of them if they do not fit in memory."""
    source = processor.source(cells)
    max_cells = min(MAX_CELLS_IN_MEMORY, MAX_VALUES_IN_MEMORY // len(processor.var_names))
    return CellDataset(source, processor, groups=choose_groups(source.group_sizes, max_cells, seed))


@torch.no_grad()
def encode_cells(dataset: CellDataset, codec: ProgramCodec | ExpressionCodec, batch_size: int = 1024) -> torch.Tensor:
    """Latents `(cells, num_features)` of all cells, on the CPU. `batch_size` cells are dense at the same time."""
    batches = []
    for start in range(0, len(dataset), batch_size):
        values, library_size = dataset.cells(slice(start, start + batch_size))
        batches.append(codec.encode(values.to(codec.device), library_size.to(codec.device)).cpu())
    return torch.cat(batches)


def encode_source(
    cells: ad.AnnData | CellSource, processor: ScRNAProcessor, codec: ProgramCodec | ExpressionCodec, path: Path
) -> torch.Tensor:
    """Encodes cells group by group into a .npy file, from which the latents are mapped. One that exists is read."""
    source = processor.source(cells)

    def write(partial: Path):
        shape, start = (int(source.group_sizes.sum()), codec.num_features), 0
        latents = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
        for group, size in enumerate(source.group_sizes):
            dataset = CellDataset(source, processor, with_labels=False, groups=[group])
            latents[start : start + size] = encode_cells(dataset, codec).numpy()
            start += size
        latents.flush()

    if not path.is_file():
        write_whole(path, write)
    return torch.from_numpy(np.load(path, mmap_mode="c"))  # PyTorch warns of arrays that are read-only


class CellOrder:
    """An endless sequence of cells, in a new order in each epoch. A resumed run needs only its position."""

    def __init__(self, num_cells: int, seed: int = 0):
        self.num_cells = num_cells
        self._epoch = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng([seed, epoch, 0]).permutation(num_cells)
        )

    def __getitem__(self, positions: slice) -> np.ndarray:
        """The indices of the cells at some positions of the sequence."""
        parts, position = [np.zeros(0, dtype=np.int64)], positions.start
        while position < positions.stop:
            epoch, offset = divmod(position, self.num_cells)
            parts.append(self._epoch(epoch)[offset:][: positions.stop - position])
            position += len(parts[-1])
        return np.concatenate(parts)
