import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from scipy import sparse

from wbdit_diffusers import ScRNAProcessor


LABEL_KEYS = ["cell_type", "phase"]


@pytest.fixture(scope="module")
def processor(pbmc) -> ScRNAProcessor:
    return ScRNAProcessor(label_keys=LABEL_KEYS, num_genes=200).fit(pbmc)


def with_value(adata: ad.AnnData, value: float) -> ad.AnnData:
    """A copy whose third cell holds a wrong value."""
    adata = adata.copy()
    adata.X[2, 0] = value
    adata.X = sparse.csr_matrix(adata.X)
    return adata


# ==================== fit ====================


def test_fit_chooses_variable_genes_in_the_order_of_the_data(processor, pbmc):
    assert len(processor.var_names) == 200
    assert processor.num_features == 201  # and the library size
    positions = pbmc.var_names.get_indexer(processor.var_names)
    assert (np.diff(positions) > 0).all()
    normalised = pbmc.copy()
    sc.pp.normalize_total(normalised, target_sum=1e4)
    sc.pp.log1p(normalised)
    sc.pp.highly_variable_genes(normalised, n_top_genes=200, flavor="seurat")
    assert set(processor.var_names) == set(pbmc.var_names[normalised.var["highly_variable"]])


def test_fit_leaves_out_genes_that_no_training_cell_expresses(pbmc):
    adata = pbmc.copy()
    adata.X[:, :5] = 0
    processor = ScRNAProcessor(num_genes=None).fit(adata)
    assert list(processor.var_names) == list(pbmc.var_names[5:])


def test_fit_sees_labels(processor, pbmc):
    assert processor.condition_sizes == (10, 3)
    assert processor.config.categories[0] == sorted(pbmc.obs["cell_type"].unique())
    frequencies = pbmc.obs.groupby(LABEL_KEYS, observed=True).size()
    assert len(processor.label_combinations) == len(frequencies)
    assert processor.label_frequencies.sum() == pytest.approx(1)


# ==================== preprocess, postprocess ====================


def test_preprocess_standardises_log_cp10k_and_library_size(processor, pbmc):
    features = processor.preprocess(pbmc)
    assert features.shape == (700, 201)
    torch.testing.assert_close(features.mean(0), torch.zeros(201), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.var(0, unbiased=False), torch.ones(201), atol=1e-3, rtol=0)

    normalised = pbmc.copy()
    sc.pp.normalize_total(normalised, target_sum=1e4)
    sc.pp.log1p(normalised)
    expression, library_size = processor.decode(features)
    expected = torch.from_numpy(normalised[:, processor.var_names].X.toarray())
    torch.testing.assert_close(expression, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(library_size.numpy(), np.asarray(pbmc.X.sum(1)).ravel(), atol=0.1, rtol=1e-4)


def test_postprocess_gives_the_same_cells_back(processor, pbmc):
    cells = processor.postprocess(processor.preprocess(pbmc), processor.encode_labels(pbmc))
    assert sparse.isspmatrix_csr(cells.X)
    np.testing.assert_array_equal(cells.X.toarray(), pbmc[:, processor.var_names].X.toarray())
    for key in LABEL_KEYS:
        assert list(cells.obs[key]) == list(pbmc.obs[key].astype(str))


@pytest.mark.parametrize("form", ["csc", "dense", "layer", "backed", "int64", "several chunks"])
def test_every_form_of_the_matrix_is_the_same(form, processor, pbmc, pbmc_path, monkeypatch):
    expected, layer, adata = processor.preprocess(pbmc), None, pbmc.copy()
    if form == "csc":
        adata.X = sparse.csc_matrix(adata.X)
    elif form == "dense":
        adata.X = adata.X.toarray()
    elif form == "int64":
        adata.X = adata.X.astype(np.int64)
    elif form == "layer":
        layer = "counts"
        adata.layers["counts"] = adata.X.copy()
        adata.X = np.full(adata.shape, np.nan)
    elif form == "backed":
        adata = ad.read_h5ad(pbmc_path, backed="r")
    elif form == "several chunks":
        monkeypatch.setattr("wbdit_diffusers.processing_scrna.CHUNK_SIZE", 300)
    again = ScRNAProcessor(label_keys=LABEL_KEYS, num_genes=200, layer=layer).fit(adata)
    assert list(again.var_names) == list(processor.var_names)
    torch.testing.assert_close(again.preprocess(adata), expected, atol=1e-4, rtol=1e-4)


def test_genes_are_aligned_by_name(processor, pbmc):
    shuffled = pbmc[:, np.random.default_rng(0).permutation(pbmc.n_vars)].copy()
    torch.testing.assert_close(processor.preprocess(shuffled), processor.preprocess(pbmc))


def test_missing_genes_are_named(processor, pbmc, monkeypatch):
    gone = processor.var_names[[3, 7]]
    messages = []
    monkeypatch.setattr("wbdit_diffusers.processing_scrna.logger.warning", messages.append)
    features = processor.preprocess(pbmc[:, ~pbmc.var_names.isin(gone)].copy())
    assert "2 of the 200 modelled genes" in messages[0] and gone[0] in messages[0] and gone[1] in messages[0]
    expression, _ = processor.decode(features)
    assert expression[:, [3, 7]].abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"None of the 200 genes.*adata.var_names"):
        processor.preprocess(ad.AnnData(pbmc.X, var=pd.DataFrame(index=[f"ENSG{i}" for i in range(pbmc.n_vars)])))


def test_log_values_are_taken_as_they_are(pbmc):
    log_values = ad.AnnData(sparse.csr_matrix(np.log2(pbmc.X.toarray() / 3 + 1)), obs=pbmc.obs, var=pbmc.var)
    processor = ScRNAProcessor(values="log", label_keys=["cell_type"]).fit(log_values)
    assert processor.num_features == 765
    cells = processor.postprocess(processor.preprocess(log_values), processor.encode_labels(log_values))
    np.testing.assert_allclose(cells.X.toarray(), log_values.X.toarray(), atol=1e-4)
    assert list(cells.obs) == ["cell_type"]


def test_the_paper_s_recipe_changes_no_value(pbmc):
    processor = ScRNAProcessor(standardize=False, model_library_size=False).fit(pbmc)
    assert processor.num_features == 765
    features = processor.preprocess(pbmc)
    expression, library_size = processor.decode(features - 0.5)
    assert library_size is None
    torch.testing.assert_close(expression, (features - 0.5).clamp(min=0))
    # Counts then need a library size: drawn from the training cells'.
    drawn = processor.sample_library_size(torch.zeros(5000, 0, dtype=torch.long), torch.rand(5000))
    real = np.asarray(pbmc.X.sum(1)).ravel()
    np.testing.assert_allclose(np.quantile(drawn, [0.1, 0.5, 0.9]), np.quantile(real, [0.1, 0.5, 0.9]), rtol=0.06)
    assert real.min() * 0.99 <= drawn.min() and drawn.max() <= real.max() * 1.01


def test_drawn_library_sizes_are_those_of_the_cell_type(pbmc):
    processor = ScRNAProcessor(label_keys=["cell_type"], model_library_size=False).fit(pbmc)
    uniform = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    for name in ("Dendritic", "CD19+ B"):
        labels = processor.encode_names({"cell_type": name}, 2000)
        real = np.asarray(pbmc[pbmc.obs["cell_type"] == name].X.sum(1)).ravel()
        assert np.median(processor.sample_library_size(labels, uniform)) == pytest.approx(np.median(real), rel=0.05)


def test_a_generated_library_size_stays_in_the_range_of_real_ones(processor, pbmc):
    features = torch.zeros(2, 201)
    features[:, -1] = torch.tensor([-100.0, 100.0])
    _, library_size = processor.decode(features)
    real = np.asarray(pbmc.X.sum(1)).ravel()
    np.testing.assert_allclose(library_size, [real.min(), real.max()], rtol=1e-4)


# ==================== Labels to generate ====================


def test_free_labels_are_drawn_from_the_training_frequencies(processor, pbmc):
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    labels = processor.complete_labels(processor.encode_names({}, 20_000), uniform)
    names = np.array(processor.config.categories[0])[labels[:, 0]]
    drawn = pd.Series(names).value_counts(normalize=True)
    real = pbmc.obs["cell_type"].value_counts(normalize=True)
    assert (drawn - real).abs().max() < 0.01


def test_free_labels_agree_with_given_ones(processor, pbmc):
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    given = processor.encode_names({"cell_type": "CD19+ B"}, 20_000)
    labels = processor.complete_labels(given, uniform)
    assert (labels[:, 0] == given[:, 0]).all()
    drawn = pd.Series(np.array(processor.config.categories[1])[labels[:, 1]]).value_counts(normalize=True)
    real = pbmc.obs["phase"][pbmc.obs["cell_type"] == "CD19+ B"].value_counts(normalize=True)
    assert (drawn - real).abs().max() < 0.02


def test_unseen_combinations_of_seen_labels_are_allowed(pbmc):
    adata = pbmc[~((pbmc.obs["cell_type"] == "CD34+") & (pbmc.obs["phase"] == "G1"))].copy()
    processor = ScRNAProcessor(label_keys=LABEL_KEYS).fit(adata)
    given = processor.encode_names({"cell_type": "CD34+", "phase": "G1"}, 3)
    uniform = torch.tensor([0.0, 0.5, 0.999])
    assert (processor.complete_labels(given, uniform) == given).all()
    assert torch.isfinite(processor.sample_library_size(given, uniform)).all()


# ==================== Saving ====================


def test_save_and_load(processor, pbmc, tmp_path):
    processor.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded = ScRNAProcessor.from_pretrained(tmp_path)
    assert list(loaded.var_names) == list(processor.var_names)
    assert loaded.condition_sizes == processor.condition_sizes
    torch.testing.assert_close(loaded.preprocess(pbmc), processor.preprocess(pbmc), rtol=0, atol=0)
    given = processor.encode_names({"phase": "G1"}, 10)
    uniform = torch.linspace(0, 0.99, 10)
    assert (loaded.complete_labels(given, uniform) == processor.complete_labels(given, uniform)).all()


def test_a_damaged_file_is_named(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(OSError, match="truncated.*download it again"):
        ScRNAProcessor.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(OSError, match="is missing"):
        ScRNAProcessor.from_pretrained(tmp_path)


# ==================== Bad input ====================


def test_bad_values_are_named_with_their_cell_and_the_mend(pbmc):
    processor = ScRNAProcessor()
    cell = pbmc.obs_names[2]
    with pytest.raises(ValueError, match=rf"holds nan \(cell '{cell}'\).*remove or replace"):
        processor.fit(with_value(pbmc, np.nan))
    with pytest.raises(ValueError, match=rf"holds -1 \(cell '{cell}'\).*never negative"):
        processor.fit(with_value(pbmc, -1))
    with pytest.raises(ValueError, match=rf"holds 0.5 \(cell '{cell}'\).*no integer count.*values='log'"):
        processor.fit(with_value(pbmc, 0.5))
    with pytest.raises(ValueError, match=r"holds nan"):
        ScRNAProcessor(values="log").fit(with_value(pbmc, np.nan))


def test_empty_data_is_named(pbmc):
    with pytest.raises(ValueError, match=r"is empty: 0 cells × 765 genes"):
        ScRNAProcessor().fit(pbmc[:0])
    zeros = pbmc.copy()
    zeros.X[4] = 0
    with pytest.raises(ValueError, match=rf"1 cells .*no counts at all.*'{pbmc.obs_names[4]}'.*filter_cells"):
        ScRNAProcessor().fit(zeros)
    zeros.X = sparse.csr_matrix(pbmc.shape, dtype=np.float32)
    with pytest.raises(ValueError, match="700 cells .*no counts at all"):
        ScRNAProcessor().fit(zeros)


def test_bad_names_are_named(pbmc, processor):
    with pytest.raises(ValueError, match=r"no column 'celltype'; it has \['cell_type', 'phase'\]"):
        ScRNAProcessor(label_keys=["celltype"]).fit(pbmc)
    with pytest.raises(ValueError, match=r"no layer 'counts'"):
        ScRNAProcessor(layer="counts").fit(pbmc)
    with pytest.raises(ValueError, match=r"list of obs keys: write \['cell_type'\]"):
        ScRNAProcessor(label_keys="cell_type")
    with pytest.raises(ValueError, match=r"'CD19 B' is not a cell_type.*Did you mean 'CD19\+ B'"):
        processor.encode_names({"cell_type": "CD19 B"}, 1)
    with pytest.raises(ValueError, match=r"'batch' is not a condition.*\['cell_type', 'phase'\]"):
        processor.encode_names({"batch": "1"}, 1)
    duplicated = pbmc.copy()
    duplicated.var_names = ["A", *duplicated.var_names[1:-1], "A"]
    with pytest.raises(ValueError, match=r"'A' occurs more than once.*var_names_make_unique"):
        ScRNAProcessor().fit(duplicated)
    missing = pbmc.copy()
    missing.obs["cell_type"] = missing.obs["cell_type"].where(missing.obs["cell_type"] != "CD34+")
    with pytest.raises(ValueError, match="missing for 13 cells"):
        ScRNAProcessor(label_keys=["cell_type"]).fit(missing)
    with pytest.raises(ValueError, match="not fitted"):
        ScRNAProcessor().preprocess(pbmc)
    with pytest.raises(ValueError, match="'counts' or 'log'"):
        ScRNAProcessor(values="raw")


def test_log_data_of_the_paper_s_kind(shared_data):
    adata = ad.read_h5ad(shared_data("hnscc_puram_chetah_subset_log"))
    with pytest.raises(ValueError, match="values='log'"):
        ScRNAProcessor().fit(adata)
    processor = ScRNAProcessor(values="log", num_genes=2000, standardize=False).fit(adata)
    assert processor.preprocess(adata).shape == (180, 2000)
