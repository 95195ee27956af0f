import numpy as np
import pytest
import torch
from conftest import make_expression_codec, make_program_codec
from torch.utils.data import DataLoader

from wbdit_diffusers import ScRNAProcessor
from wbdit_diffusers.data import CellDataset, encode_cells


CODECS = {"program": make_program_codec, "expression": make_expression_codec}


@pytest.fixture(scope="module")
def processor(pbmc) -> ScRNAProcessor:
    return ScRNAProcessor(label_keys=["cell_type"], num_genes=100).fit(pbmc)


@pytest.fixture
def dataset(pbmc, processor) -> CellDataset:
    return CellDataset(pbmc, processor)


@pytest.mark.parametrize("indices", [slice(None), slice(10, 20), [5, 0, 5], np.array([3, 699])])
def test_cells_are_the_modelled_genes_and_the_total_over_all(dataset, processor, pbmc, indices):
    values, library_size = dataset.cells(indices)
    assert values.dtype == library_size.dtype == torch.float32
    cells = pbmc[indices]
    np.testing.assert_array_equal(values, cells[:, processor.var_names].X.toarray())
    np.testing.assert_allclose(library_size, np.asarray(cells.X.sum(1)).ravel())
    assert len(dataset) == 700


@pytest.mark.parametrize("name", ["program", "expression"])
def test_batches_are_what_the_codec_makes(dataset, processor, pbmc, name):
    """A program codec's latents are kept in memory; an expression codec's, one more than the genes, are not."""
    codec = CODECS[name](processor, pbmc)
    dataset.encode(codec)
    assert (dataset.latents is not None) == (name == "program")
    loader = DataLoader(dataset, batch_size=300, collate_fn=CellDataset.collate)
    batches = list(loader)
    assert [len(batch["latents"]) for batch in batches] == [300, 300, 100]
    latents = torch.cat([batch["latents"] for batch in batches])
    assert not latents.requires_grad
    torch.testing.assert_close(latents, codec.encode(*dataset.cells(slice(None))).detach())
    labels = torch.cat([batch["class_labels"] for batch in batches])
    assert torch.equal(labels, processor.encode_labels(pbmc))


@pytest.mark.parametrize("name", ["program", "expression"])
def test_all_cells_are_encoded_in_order_whatever_the_batch_size(dataset, processor, pbmc, name):
    codec = CODECS[name](processor, pbmc)
    latents = encode_cells(dataset, codec)
    assert latents.shape == (700, codec.num_features) and not latents.requires_grad
    torch.testing.assert_close(encode_cells(dataset, codec, batch_size=64), latents)
    torch.testing.assert_close(codec.encode(*dataset.cells([699])).detach(), latents[699:])


def test_another_codec_replaces_the_latents(dataset, processor, pbmc):
    dataset.encode(make_program_codec(processor, pbmc))
    assert dataset.__getitems__([0, 1])["latents"].shape == (2, 7)
    dataset.encode(make_expression_codec(processor, pbmc))
    assert dataset.__getitems__([0, 1])["latents"].shape == (2, 101)


def test_a_dataset_without_latents_says_so(dataset):
    with pytest.raises(ValueError, match=r"no latents yet: call `dataset.encode\(codec\)`"):
        next(iter(DataLoader(dataset, batch_size=3, collate_fn=CellDataset.collate)))
