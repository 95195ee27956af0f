import logging

import anndata as ad
import h5py
import numpy as np
import pytest
from scipy import sparse

from wbdit_diffusers.data import drop_empty_cells, load_pbmc, read_cells, write_cells


def test_read_cells_names_the_file(pbmc_path, tmp_path):
    assert read_cells(pbmc_path).shape == (700, 765)
    with pytest.raises(FileNotFoundError, match="no file .*absent.h5ad"):
        read_cells(tmp_path / "absent.h5ad")
    (tmp_path / "text.h5ad").write_text("no cells")
    with pytest.raises(ValueError, match="text.h5ad cannot be read as an .h5ad file"):
        read_cells(tmp_path / "text.h5ad")


def test_empty_cells_are_left_out_with_a_warning(pbmc, caplog, monkeypatch):
    assert drop_empty_cells(pbmc) is pbmc
    adata = pbmc[:20].copy()
    adata.X = sparse.csr_matrix(adata.X.toarray() * (np.arange(20) != 3)[:, None])
    monkeypatch.setattr(logging.getLogger("wbdit_diffusers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        left = drop_empty_cells(adata)
    assert left.obs_names.tolist() == np.delete(adata.obs_names, 3).tolist()
    assert f"1 of 20 cells are empty and left out: {adata.obs_names[3]}" in caplog.text


def test_empty_cells_of_a_layer_are_left_out(pbmc):
    adata = pbmc[:20].copy()
    adata.layers["counts"] = sparse.csr_matrix(adata.X.toarray() * ~np.isin(np.arange(20), [0, 7])[:, None])
    assert drop_empty_cells(adata) is adata
    assert drop_empty_cells(adata, layer="counts").obs_names.tolist() == np.delete(adata.obs_names, [0, 7]).tolist()
    adata.X = None
    with pytest.raises(ValueError, match=r"no matrix in X, only layers \['counts'\]"):
        drop_empty_cells(adata)


def test_cells_that_are_all_empty_are_left_to_the_processor(pbmc):
    adata = pbmc[:3].copy()
    adata.X = sparse.csr_matrix(adata.shape, dtype=np.float32)
    assert drop_empty_cells(adata) is adata


def test_pbmc_are_integer_counts_with_labels():
    pbmc = load_pbmc()
    assert pbmc.shape == (700, 765) and list(pbmc.obs) == ["cell_type", "phase"]
    assert sparse.isspmatrix_csr(pbmc.X) and (pbmc.X.data == np.rint(pbmc.X.data)).all() and pbmc.X.min() == 0


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
