"""Cells as training examples: in memory, or read from disk as they are needed."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections import OrderedDict
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import anndata as ad
import numpy as np
import torch
from scipy import sparse
from torch.utils.data import Dataset

from .cells import CellSource, as_source
from .order import WINDOW_SIZE, CellOrder, choose_groups


if TYPE_CHECKING:  # which reads cells through this folder
    from ..processing.processor import ScRNAProcessor

MAX_CELLS_IN_MEMORY = 100_000
MAX_VALUES_IN_MEMORY = 2**28  # of the modelled genes, zeros included: CSR takes about a tenth of the bytes


class Encoder(Protocol):
    """The part of a codec that a dataset needs."""

    num_features: int
    device: torch.device

    def encode(self, matrix: torch.Tensor, library_size: torch.Tensor) -> torch.Tensor: ...

    def state_dict(self) -> dict[str, torch.Tensor]: ...


class CellDataset(Dataset):
    """
    Cells as the denoiser sees them. The modelled genes stay sparse in memory; each batch is made dense as it is read:
    give the DataLoader `collate_fn=CellDataset.collate`.

    Args:
        cells (`AnnData` or [`CellSource`]): Cells.
        processor ([`ScRNAProcessor`]): Fitted on the training cells.
        with_labels (`bool`, defaults to `True`): Whether batches hold labels. Cells without them can only be encoded.
        groups (`list[int]`, *optional*): Which groups of the source; all by default.
    """

    def __init__(
        self,
        cells: ad.AnnData | CellSource,
        processor: ScRNAProcessor,
        with_labels: bool = True,
        groups: list[int] | None = None,
    ):
        self.matrix, self.library_size = processor.select(cells, groups)
        self.is_of_counts = processor.has_library_size  # given or recovered; else of log values
        self.class_labels = processor.encode_labels(cells) if with_labels else None
        if groups is not None and self.class_labels is not None:
            self.class_labels = self.class_labels[_rows(as_source(cells).group_sizes, groups)]
        self.condition_sizes = processor.condition_sizes if with_labels else ()
        self.codec: Encoder | None = None
        self.latents: torch.Tensor | None = None  # (cells, num_features), where they are kept

    def __len__(self) -> int:
        return self.matrix.shape[0]

    def order(self, seed: int) -> CellOrder:
        """In which order to train on the cells."""
        return CellOrder(np.array([len(self)]), seed)

    def sample(self, seed: int) -> CellDataset:
        """As many cells as stage one needs: all of those in memory."""
        return self

    def cells(self, indices: np.ndarray | list[int] | slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Some cells as a codec sees them: values `(batch, genes)` and library sizes `(batch,)`, both float32."""
        values = torch.from_numpy(self.matrix[indices].toarray().astype(np.float32))
        return values, torch.from_numpy(self.library_size[indices].astype(np.float32))

    def encode(self, codec: Encoder):
        """
        From now on, batches hold the latents of this codec. Where these are fewer than the genes they are computed
        once and kept; else each batch is encoded as it is read.
        """
        self.codec, self.latents = codec, None
        if codec.num_features < self.matrix.shape[1]:
            self.latents = encode_cells(self, codec)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """A whole batch at once: `latents` (batch, num_features) and `class_labels` (batch, num_label_keys)."""
        if self.class_labels is None:
            raise ValueError("The cells were read without labels, so that nothing can be trained on them.")
        if self.codec is None:
            raise ValueError("The cells have no latents yet: call `dataset.encode(codec)`.")
        if self.latents is not None:
            latents = self.latents[indices]
        else:
            with torch.no_grad():
                latents = self.codec.encode(*self.cells(indices))
        return {"latents": latents, "class_labels": self.class_labels[indices].long()}

    @staticmethod
    def collate(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`__getitems__` has made the batch already."""
        return batch


class StreamedCellDataset(CellDataset):
    """
    The same for more cells than fit in memory: their values are read when a batch needs them, and latents of few
    features are computed once and mapped from a file.

    Args:
        source ([`CellSource`]): Cells.
        processor ([`ScRNAProcessor`]): Fitted on the training cells.
        folder (`Path`): Where latents are kept. The file is named after codec and cells: what is there is used again,
            if the source has a `fingerprint`.
    """

    def __init__(self, source: CellSource, processor: ScRNAProcessor, folder: Path):
        self.source, self.processor, self.folder = source, processor, folder
        self.is_of_counts = processor.has_library_size
        self.class_labels = processor.encode_labels(source).to(torch.int32)
        self.condition_sizes = processor.condition_sizes
        self.codec: Encoder | None = None
        self.latents: torch.Tensor | None = None
        self._starts = np.concatenate([[0], np.cumsum(source.group_sizes)])
        self._groups: OrderedDict[int, tuple[sparse.csr_matrix, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def order(self, seed: int) -> CellOrder:
        # Numbers are read from anywhere; values of cells in groups.
        window_size = WINDOW_SIZE if self.latents is None else 2**20
        return CellOrder(self.source.group_sizes, seed, window_size)

    def sample(self, seed: int) -> CellDataset:
        """A random part of the groups, in memory."""
        groups = choose_groups(self.source.group_sizes, max_cells(self.processor), seed)
        return CellDataset(self.source, self.processor, groups=groups)

    def cells(self, indices: np.ndarray | list[int] | slice) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(indices, slice):
            indices = np.arange(*indices.indices(len(self)))
        cells = np.asarray(indices)
        group_of_cell = np.searchsorted(self._starts, cells, side="right") - 1
        values = np.empty((len(cells), len(self.processor.var_names)), dtype=np.float32)
        library_size = np.empty(len(cells), dtype=np.float32)
        for group in np.unique(group_of_cell):
            matrix, totals = self._group(int(group))
            rows = np.flatnonzero(group_of_cell == group)
            positions = cells[rows] - self._starts[group]
            values[rows] = matrix[positions].toarray()
            library_size[rows] = totals[positions]
        return torch.from_numpy(values), torch.from_numpy(library_size)

    def _group(self, group: int) -> tuple[sparse.csr_matrix, np.ndarray]:
        """The modelled genes of a group. As many groups are kept as two windows of the order have."""
        if group not in self._groups:
            self._groups[group] = self.processor.select(self.source, [group])
            while sum(len(totals) for _, totals in self._groups.values()) > 2 * WINDOW_SIZE:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        return self._groups[group]

    def encode(self, codec: Encoder):
        self.codec, self.latents = codec, None
        if codec.num_features >= len(self.processor.var_names):
            return
        path = self.folder / f"latents-{self._key(codec)}.npy"
        # Of cells that can't be told from others, nothing is used again.
        if not path.is_file() or not hasattr(self.source, "fingerprint"):
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            shape = (len(self), codec.num_features)
            latents = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
            for group, start in enumerate(self._starts[:-1]):
                cells = _Cells(*self.processor.select(self.source, [group]))
                latents[start : self._starts[group + 1]] = encode_cells(cells, codec).numpy()
            latents.flush()
            del latents
            partial.replace(path)
        self.latents = torch.from_numpy(np.load(path, mmap_mode="r+"))

    def _key(self, codec: Encoder) -> str:
        """Names codec and cells."""
        digest = hashlib.sha256(f"{self.source.name} {getattr(self.source, 'fingerprint', '')} {len(self)}".encode())
        for name, tensor in sorted(codec.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class _Cells(CellDataset):
    """A group that was read already."""

    def __init__(self, matrix: sparse.csr_matrix, library_size: np.ndarray):
        self.matrix, self.library_size = matrix, library_size


def make_dataset(cells: ad.AnnData | CellSource, processor: ScRNAProcessor, folder: Path) -> CellDataset:
    """
    A [`CellDataset`] in memory, or a [`StreamedCellDataset`] of more cells than that.

    Args:
        cells (`AnnData` or [`CellSource`]): Cells. Those of an AnnData in memory stay in memory.
        processor ([`ScRNAProcessor`]): Fitted on the training cells.
        folder (`Path`): Where a streamed dataset keeps its latents.
    """
    if isinstance(cells, ad.AnnData) and not cells.isbacked:
        return CellDataset(cells, processor)
    source = as_source(cells, processor.config.layer)
    if int(source.group_sizes.sum()) <= max_cells(processor):
        return CellDataset(source, processor)
    return StreamedCellDataset(source, processor, folder)


def max_cells(processor: ScRNAProcessor) -> int:
    """How many cells are kept in memory, with the modelled genes alone."""
    return min(MAX_CELLS_IN_MEMORY, MAX_VALUES_IN_MEMORY // len(processor.var_names))


@torch.no_grad()
def encode_cells(dataset: CellDataset, codec: Encoder, batch_size: int = 1024) -> torch.Tensor:
    """The latents of all cells of a dataset, `(cells, num_features)` on the CPU."""
    batches = []
    for start in range(0, len(dataset), batch_size):
        values, library_size = dataset.cells(slice(start, start + batch_size))
        batches.append(codec.encode(values.to(codec.device), library_size.to(codec.device)).cpu())
    return torch.cat(batches)


def prefetch(batches: Iterable, depth: int = 32) -> Generator:
    """
    The same batches, of which a thread has the next ones ready: reading does not wait for training, nor the other way.

    Args:
        batches (`Iterable`): Batches; may be endless. Its errors are raised here.
        depth (`int`, defaults to 32): How many to have ready.
    """
    ready: queue.Queue = queue.Queue(depth)
    is_over = threading.Event()

    def put(item: tuple) -> bool:
        while not is_over.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def read():
        try:
            for batch in batches:
                if not put((batch, None)):
                    return
            put((None, StopIteration()))
        except Exception as error:
            put((None, error))

    thread = threading.Thread(target=read, daemon=True, name="prefetch")
    thread.start()
    try:
        while True:
            batch, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield batch
    finally:
        is_over.set()
        thread.join()


def _rows(group_sizes: np.ndarray, groups: list[int]) -> np.ndarray:
    """The numbers of the cells of some groups."""
    starts = np.cumsum(group_sizes) - group_sizes
    return np.concatenate([np.arange(starts[group], starts[group] + group_sizes[group]) for group in groups])
