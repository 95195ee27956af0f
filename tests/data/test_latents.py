"""Cells in memory, their latents, and the order in which they are trained on."""

import numpy as np
import pytest
import torch
from conftest import make_expression_codec, make_program_codec

from wbdit_diffusers import ScRNAProcessor
from wbdit_diffusers.data import AnnDataSource, CellDataset, encode_cells
from wbdit_diffusers.data import latents as module
from wbdit_diffusers.data.latents import CellOrder, encode_source


CODECS = {"program": make_program_codec, "expression": make_expression_codec}


@pytest.fixture(scope="module")
def processor(pbmc) -> ScRNAProcessor:
    return ScRNAProcessor(label_keys=["cell_type"], num_genes=100).fit(pbmc)


@pytest.fixture(scope="module")
def dataset(pbmc, processor) -> CellDataset:
    return CellDataset(pbmc, processor)


@pytest.mark.parametrize("indices", [slice(None), slice(10, 20), [5, 0, 5], np.array([3, 699])])
def test_cells_are_the_modelled_genes_and_the_total_over_all(dataset, processor, pbmc, indices):
    values, library_size = dataset.cells(indices)
    assert values.dtype == library_size.dtype == torch.float32
    cells = pbmc[indices]
    np.testing.assert_array_equal(values, cells[:, processor.var_names].X.toarray())
    np.testing.assert_allclose(library_size, np.asarray(cells.X.sum(1)).ravel())
    assert len(dataset) == 700 and torch.equal(dataset.class_labels, processor.encode_labels(pbmc))


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr("wbdit_diffusers.data.cells.CHUNK_SIZE", 64)


@pytest.mark.parametrize("name", CODECS)
def test_all_cells_are_encoded_in_order(name, dataset, processor, pbmc, small_groups, tmp_path):
    """In batches of any size, from groups, and into a file that is then read again."""
    codec = CODECS[name](processor, pbmc)
    latents = encode_cells(dataset, codec)
    assert latents.shape == (700, codec.num_features) and not latents.requires_grad
    torch.testing.assert_close(latents, codec.encode(*dataset.cells(slice(None))).detach())
    torch.testing.assert_close(encode_cells(dataset, codec, batch_size=64), latents)
    path = tmp_path / "latents.npy"
    torch.testing.assert_close(encode_source(pbmc, processor, codec, path), latents)
    written = path.read_bytes()
    mapped = encode_source(pbmc, processor, codec, path)
    mapped[0] = 0  # changes the memory of this process only
    assert path.read_bytes() == written and [file.name for file in tmp_path.iterdir()] == ["latents.npy"]


def test_a_sample_of_the_cells_is_read_if_they_do_not_fit_in_memory(pbmc, processor, small_groups, monkeypatch):
    source = AnnDataSource(pbmc)
    assert len(module.sample_cells(source, processor, seed=0)) == 700
    monkeypatch.setattr(module, "MAX_CELLS_IN_MEMORY", 200)
    sample, other = (module.sample_cells(source, processor, seed) for seed in (0, 1))
    assert 200 <= len(sample) <= 256 and sample.class_labels.shape == (len(sample), 1)
    assert not np.array_equal(sample.library_size, other.library_size)
    totals = np.asarray(pbmc.X.sum(axis=1)).ravel()
    rows = np.concatenate([np.arange(64 * i, 64 * i + 64) for i in module.choose_groups(source.group_sizes, 200, 0)])
    rows = rows[rows < 700]
    np.testing.assert_allclose(sample.library_size, totals[rows])
    assert torch.equal(sample.class_labels, processor.encode_labels(pbmc)[rows])


# ==================== The order ====================


def test_each_epoch_has_every_cell_once_and_an_order_of_its_own():
    order = CellOrder(1000, seed=3)
    epochs = [order[1000 * i : 1000 * (i + 1)] for i in range(3)]
    assert all(sorted(epoch) == list(range(1000)) for epoch in epochs)
    assert (epochs[0] != epochs[1]).mean() > 0.9 and (epochs[0] != CellOrder(1000, seed=4)[0:1000]).mean() > 0.9
    np.testing.assert_array_equal(epochs[1], np.random.default_rng([3, 1, 0]).permutation(1000))
    assert len(order[5:5]) == 0


def test_batches_are_slices_of_one_sequence():
    """So they do not depend on the batch size, on the number of processes, or on what was read before."""
    whole = CellOrder(100, seed=0)[0:1000]
    for size in (7, 64, 333):
        order = CellOrder(100, seed=0)
        parts = [order[start : min(start + size, 1000)] for start in range(0, 1000, size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(CellOrder(100, seed=0)[640:704], whole[640:704])
