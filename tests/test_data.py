import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from wbdit_diffusers import ScRNAProcessor
from wbdit_diffusers.data import CellDataset, read_cells, split_cells


def test_split_is_stratified_and_reproducible(pbmc):
    train, test = split_cells(pbmc, 0.2, label_key="cell_type", seed=0)
    assert sorted([*train, *test]) == list(range(700))
    real = pbmc.obs["cell_type"].value_counts()
    held_out = pbmc.obs["cell_type"].iloc[test].value_counts()
    assert ((held_out - 0.2 * real).abs() <= 1).all()
    again = split_cells(pbmc, 0.2, label_key="cell_type", seed=0)
    np.testing.assert_array_equal(test, again[1])
    assert set(split_cells(pbmc, 0.2, label_key="cell_type", seed=1)[1]) != set(test)
    assert len(split_cells(pbmc, 0.5)[1]) == 350


def test_a_single_cell_of_a_label_is_trained_on(pbmc):
    adata = pbmc[:50].copy()
    adata.obs["label"] = ["rare"] + ["common"] * 49
    train, _ = split_cells(adata, 0.2, label_key="label")
    assert 0 in train


def test_split_names_what_is_wrong(pbmc):
    with pytest.raises(ValueError, match="no column 'louvain'"):
        split_cells(pbmc, label_key="louvain")
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_cells(pbmc, test_fraction=1.0)
    with pytest.raises(ValueError, match="1 cells are too few"):
        split_cells(pbmc[:1])


def test_dataset_batches_are_what_preprocess_makes(pbmc):
    processor = ScRNAProcessor(label_keys=["cell_type"], num_genes=100).fit(pbmc)
    dataset = CellDataset(pbmc, processor)
    assert len(dataset) == 700
    loader = DataLoader(dataset, batch_size=300, collate_fn=CellDataset.collate)
    batches = list(loader)
    assert [len(batch["latents"]) for batch in batches] == [300, 300, 100]
    torch.testing.assert_close(torch.cat([batch["latents"] for batch in batches]), processor.preprocess(pbmc))
    labels = torch.cat([batch["class_labels"] for batch in batches])
    assert (labels == processor.encode_labels(pbmc)).all()


def test_read_cells_names_the_file(pbmc_path, tmp_path):
    assert read_cells(pbmc_path).shape == (700, 765)
    with pytest.raises(FileNotFoundError, match="no file .*absent.h5ad"):
        read_cells(tmp_path / "absent.h5ad")
    (tmp_path / "text.h5ad").write_text("no cells")
    with pytest.raises(ValueError, match="text.h5ad cannot be read as an .h5ad file"):
        read_cells(tmp_path / "text.h5ad")
