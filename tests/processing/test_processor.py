import json

import anndata as ad
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import sparse

from wbdit_diffusers import ScRNAProcessor


LABEL_KEYS = ["cell_type", "phase"]


@pytest.fixture(scope="module")
def processor(pbmc) -> ScRNAProcessor:
    return ScRNAProcessor(label_keys=LABEL_KEYS, num_genes=200).fit(pbmc)


def test_select_gives_the_modelled_genes_and_the_total_over_all(processor, pbmc):
    matrix, library_size = processor.select(pbmc)
    assert sparse.isspmatrix_csr(matrix) and matrix.shape == (700, 200)
    np.testing.assert_array_equal(matrix.toarray(), pbmc[:, processor.var_names].X.toarray())
    np.testing.assert_allclose(library_size, np.asarray(pbmc.X.sum(1)).ravel())


def test_to_anndata_gives_the_same_cells_back(processor, pbmc):
    matrix, library_size = processor.select(pbmc)
    cells = processor.to_anndata(matrix, processor.encode_labels(pbmc), torch.from_numpy(library_size))
    assert sparse.isspmatrix_csr(cells.X)
    np.testing.assert_array_equal(cells.X.toarray(), pbmc[:, processor.var_names].X.toarray())
    assert list(cells.var_names) == list(processor.var_names)
    assert list(cells.obs) == [*LABEL_KEYS, "library_size", "generated"]
    for key in LABEL_KEYS:
        assert list(cells.obs[key]) == list(pbmc.obs[key].astype(str))
    np.testing.assert_allclose(cells.obs["library_size"], library_size)
    assert cells.obs_names.is_unique and cells.obs["generated"].all()


def test_to_anndata_of_a_part_of_the_cells(processor, pbmc):
    """Parts have every category, so that they can be one AnnData."""
    matrix, _ = processor.select(pbmc)
    part = processor.to_anndata(matrix[10:12], processor.encode_labels(pbmc)[10:12], obs_names=["a", "b"])
    assert list(part.obs_names) == ["a", "b"]
    assert list(part.obs["cell_type"].cat.categories) == processor.config.categories[0]
    assert list(part.obs) == [*LABEL_KEYS, "generated"]
    assert list(processor.to_anndata(matrix[:2]).obs) == ["generated"]


def test_log_values_are_taken_as_they_are(pbmc):
    log_values = ad.AnnData(
        sparse.csr_matrix(np.log2(pbmc.X.toarray() / np.linspace(0.5, 5, pbmc.n_vars) + 1)), obs=pbmc.obs, var=pbmc.var
    )
    processor = ScRNAProcessor(values="log", label_keys=["cell_type"]).fit(log_values)
    assert len(processor.var_names) == 765
    matrix, _ = processor.select(log_values)
    assert (matrix != log_values.X).nnz == 0
    cells = processor.to_anndata(matrix, processor.encode_labels(log_values))
    assert list(cells.obs) == ["cell_type", "generated"]


def test_log_data_of_the_paper_s_kind(shared_data):
    adata = ad.read_h5ad(shared_data("hnscc_puram_chetah_subset_log"))
    with pytest.raises(ValueError, match="values='log'"):
        ScRNAProcessor().fit(adata)
    processor = ScRNAProcessor(values="log", num_genes=2000).fit(adata)
    assert processor.select(adata)[0].shape == (180, 2000)


# ==================== Saving ====================


def test_save_and_load(processor, pbmc, tmp_path):
    processor.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded = ScRNAProcessor.from_pretrained(tmp_path)
    assert list(loaded.var_names) == list(processor.var_names)
    assert loaded.label_keys == LABEL_KEYS and loaded.condition_sizes == processor.condition_sizes
    matrix, library_size = loaded.select(pbmc)
    assert (matrix != processor.select(pbmc)[0]).nnz == 0
    np.testing.assert_array_equal(library_size, processor.select(pbmc)[1])
    given = processor.encode_conditions({"phase": "G1"}, 10)
    uniform = torch.linspace(0, 0.99, 10)
    completed = processor.complete_labels(given, uniform)
    assert torch.equal(loaded.complete_labels(given, uniform), completed)
    sizes = processor.sample_library_size(completed, uniform)
    assert torch.equal(loaded.sample_library_size(completed, uniform), sizes)


def test_load_from_a_pipeline_s_subfolder(processor, tmp_path):
    processor.save_pretrained(tmp_path / "processor")
    loaded = ScRNAProcessor.from_pretrained(tmp_path, subfolder="processor")
    assert list(loaded.var_names) == list(processor.var_names)


def test_what_was_saved_names_its_class_and_version(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "ScRNAProcessor" and config["var_names"] == list(processor.var_names)


def test_a_damaged_file_is_named(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(OSError, match="truncated.*download it again"):
        ScRNAProcessor.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(OSError, match="is missing"):
        ScRNAProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("name, message", [("library_size_quantiles", "holds NaN"), ("other", "not a ScRNAProcessor")])
def test_a_table_without_its_numbers_is_refused(processor, tmp_path, name, message):
    """NaN would end in the library sizes of generated cells."""
    processor.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    tables = load_file(weights)
    tables[name] = torch.full_like(tables.pop("library_size_quantiles"), torch.nan)
    save_file(tables, weights)
    with pytest.raises(OSError, match=message):
        ScRNAProcessor.from_pretrained(tmp_path)


# ==================== Bad input ====================


def test_a_processor_that_is_not_fitted_says_so(tmp_path):
    with pytest.raises(ValueError, match="not fitted.*processor.fit"):
        ScRNAProcessor().save_pretrained(tmp_path)


def test_unknown_values_are_named():
    with pytest.raises(ValueError, match="'counts' or 'log', not 'raw'"):
        ScRNAProcessor(values="raw")
