import logging

import anndata as ad
import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from wbdit_diffusers import ScRNAProcessor
from wbdit_diffusers.data import CellDataset, drop_empty_cells, read_cells, split_cells, write_cells


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


def test_empty_cells_are_left_out_with_a_warning(pbmc, caplog):
    assert drop_empty_cells(pbmc) is pbmc
    adata = pbmc[:20].copy()
    adata.X[3] = 0
    logging.getLogger("wbdit_diffusers").propagate = True
    with caplog.at_level(logging.WARNING):
        left = drop_empty_cells(adata)
    assert left.obs_names.tolist() == np.delete(adata.obs_names, 3).tolist()
    assert f"1 of 20 cells are empty and left out: {adata.obs_names[3]}" in caplog.text


def test_written_batches_are_one_file(pbmc, tmp_path):
    pbmc = pbmc.copy()
    pbmc.obs["library_size"] = np.asarray(pbmc.X.sum(1)).ravel()
    path = tmp_path / "cells.h5ad"
    batches = [pbmc[start : start + 300].copy() for start in range(0, 700, 300)]
    for batch in batches:
        for key in ("cell_type", "phase"):
            batch.obs[key] = batch.obs[key].cat.set_categories(pbmc.obs[key].cat.categories)
        batch.uns["wbdit"] = {"seed": 1, "model_id": "me/model"}
    assert write_cells(path, iter(batches)) == (700, 765)
    cells = ad.read_h5ad(path)
    assert (cells.X != pbmc.X).nnz == 0
    with h5py.File(path) as file:
        assert file["X"]["indptr"].dtype == np.int64  # int32 ends at 2³¹ values
    assert cells.obs.equals(pbmc.obs) and cells.var_names.equals(pbmc.var_names)
    assert cells.uns["wbdit"] == {"seed": 1, "model_id": "me/model"}
    assert [file.name for file in tmp_path.iterdir()] == ["cells.h5ad"]


def test_a_failure_leaves_the_file_that_was_there(pbmc, tmp_path):
    def failing():
        yield pbmc[:10].copy()
        raise ValueError("no more")

    path = tmp_path / "cells.h5ad"
    with pytest.raises(ValueError, match="no cells to write"):
        write_cells(path, iter([]))
    pbmc[:5].write_h5ad(path)
    with pytest.raises(ValueError, match="no more"):
        write_cells(path, failing())
    assert read_cells(path).n_obs == 5
