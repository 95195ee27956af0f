"""The parts of benchmarks/codec.py that need no fitted codec; the command itself takes minutes."""

import codec as benchmark
import numpy as np
import torch

from wbdit_diffusers.data import CellDataset, encode_cells


def test_nats_per_cell_are_the_mean_over_all_parts(pbmc, program_pipe, monkeypatch):
    dataset = CellDataset(pbmc[:50], program_pipe.processor)
    counts, library_size = dataset.cells(slice(None))
    with torch.no_grad():
        latents = encode_cells(dataset, program_pipe.codec)
        distribution = program_pipe.codec.decode(latents, library_size, dataset.class_labels)
        expected = -distribution.log_prob(counts).mean().item()
    monkeypatch.setattr(benchmark, "CELLS_AT_ONCE", 20)  # the last part is a smaller one
    np.testing.assert_allclose(benchmark.nats_per_cell(program_pipe.codec, dataset), expected, rtol=1e-5)


def test_cells_are_drawn_with_their_labels_and_library_sizes(pbmc, program_pipe, monkeypatch):
    processor, codec = program_pipe.processor, program_pipe.codec
    dataset = CellDataset(pbmc[:50], processor)
    monkeypatch.setattr(benchmark, "CELLS_AT_ONCE", 20)
    latents = encode_cells(dataset, codec)
    cells = benchmark.draw_cells(codec, processor, latents, dataset.class_labels, seed=0)
    assert cells.obs["cell_type"].tolist() == pbmc.obs["cell_type"][:50].astype(str).tolist()
    np.testing.assert_allclose(cells.obs["library_size"], dataset.library_size, rtol=0.3)  # what was drawn
    with torch.no_grad():
        expected = codec.decode(latents, class_labels=dataset.class_labels).mean().sum().item()
    np.testing.assert_allclose(cells.X.sum(), expected, rtol=0.05)
    again = benchmark.draw_cells(codec, processor, latents, dataset.class_labels, seed=0)
    other = benchmark.draw_cells(codec, processor, latents, dataset.class_labels, seed=1)
    assert (cells.X != again.X).nnz == 0 and (cells.X != other.X).nnz > 0
