import logging

import numpy as np
import pytest
from scipy import sparse

from wbdit_diffusers.data import drop_empty_cells, load_pbmc, read_cells


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
