"""Cells as training examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import anndata as ad
import numpy as np
import torch
from torch.utils.data import Dataset


if TYPE_CHECKING:  # which reads cells through this folder
    from ..processing.processor import ScRNAProcessor


class Encoder(Protocol):
    """The part of a codec that a dataset needs."""

    num_features: int
    device: torch.device

    def encode(self, matrix: torch.Tensor, library_size: torch.Tensor) -> torch.Tensor: ...


class CellDataset(Dataset):
    """
    Cells as the denoiser sees them. The modelled genes stay sparse in memory; each batch is made dense as it is read:
    give the DataLoader `collate_fn=CellDataset.collate`.

    Args:
        adata (`AnnData`): Cells.
        processor ([`ScRNAProcessor`]): Fitted on the training cells.
        with_labels (`bool`, defaults to `True`): Whether batches hold labels. Cells without them can only be encoded.
    """

    def __init__(self, adata: ad.AnnData, processor: ScRNAProcessor, with_labels: bool = True):
        self.matrix, self.library_size = processor.select(adata)
        self.is_of_counts = processor.has_library_size  # given or recovered; else of log values
        self.class_labels = processor.encode_labels(adata) if with_labels else None
        self.condition_sizes = processor.condition_sizes if with_labels else ()
        self.codec: Encoder | None = None
        self.latents: torch.Tensor | None = None  # (cells, num_features), where they are kept

    def __len__(self) -> int:
        return self.matrix.shape[0]

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
        return {"latents": latents, "class_labels": self.class_labels[indices]}

    @staticmethod
    def collate(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`__getitems__` has made the batch already."""
        return batch


@torch.no_grad()
def encode_cells(dataset: CellDataset, codec: Encoder, batch_size: int = 1024) -> torch.Tensor:
    """The latents of all cells of a dataset, `(cells, num_features)` on the CPU."""
    batches = []
    for start in range(0, len(dataset), batch_size):
        values, library_size = dataset.cells(slice(start, start + batch_size))
        batches.append(codec.encode(values.to(codec.device), library_size.to(codec.device)).cpu())
    return torch.cat(batches)
