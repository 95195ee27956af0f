import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from scipy import sparse

from wbdit_diffusers import ScRNAProcessor
from wbdit_diffusers.processing.genes import align_genes


@pytest.fixture(scope="module")
def processor(pbmc) -> ScRNAProcessor:
    return ScRNAProcessor(num_genes=200).fit(pbmc)


def test_the_most_variable_genes_are_chosen_in_the_order_of_the_data(processor, pbmc):
    assert len(processor.var_names) == 200
    positions = pbmc.var_names.get_indexer(processor.var_names)
    assert (np.diff(positions) > 0).all()
    normalised = pbmc.copy()
    sc.pp.normalize_total(normalised, target_sum=1e4)
    sc.pp.log1p(normalised)
    sc.pp.highly_variable_genes(normalised, n_top_genes=200, flavor="seurat")
    assert set(processor.var_names) == set(pbmc.var_names[normalised.var["highly_variable"]])


def test_log_values_are_not_normalised_to_choose_genes(processor, pbmc):
    normalised = pbmc.copy()
    sc.pp.normalize_total(normalised, target_sum=1e4)
    sc.pp.log1p(normalised)
    again = ScRNAProcessor(num_genes=200, values="log").fit(normalised)
    assert list(again.var_names) == list(processor.var_names)


def test_genes_of_many_cells_are_chosen_from_a_sample(processor, pbmc, monkeypatch):
    monkeypatch.setattr("wbdit_diffusers.data.cells.CHUNK_SIZE", 50)
    monkeypatch.setattr("wbdit_diffusers.data.cells.MAX_CELLS_IN_MEMORY", 350)
    again = ScRNAProcessor(num_genes=200).fit(pbmc)
    assert len(again.var_names) == 200 and again.var_names.isin(processor.var_names).sum() in range(120, 200)
    for name in ("library_size_quantiles", "label_frequencies"):  # of all cells
        assert torch.equal(getattr(again, name), getattr(processor, name))


def test_threads_are_left_alone(pbmc):
    """Numba, which Scanpy's choice of genes runs, sets the threads of all OpenMP, PyTorch's too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ScRNAProcessor(num_genes=200).fit(pbmc)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_genes_that_too_few_training_cells_express_are_left_out(pbmc):
    adata = pbmc.copy()
    dense = adata.X.toarray()
    dense[:, :5] = 0
    dense[:3, 0], dense[:2, 1] = 1, 1  # in three cells, and in two
    adata.X = sparse.csr_matrix(dense)
    chosen = {}
    for min_cells in (2, 3, 4):
        processor = ScRNAProcessor(num_genes=None, min_cells=min_cells).fit(adata)
        chosen[min_cells] = list(processor.var_names)
        assert chosen[min_cells] == list(pbmc.var_names[(dense > 0).sum(0) >= min_cells])
    assert chosen[2][:2] == list(pbmc.var_names[:2]) and chosen[3][:2] == list(pbmc.var_names[[0, 5]])
    assert ScRNAProcessor(num_genes=None).config.min_cells == 3
    two = ScRNAProcessor(num_genes=None).fit(adata[:2].copy())  # which can't express a gene in three
    assert list(two.var_names) == list(pbmc.var_names[(dense[:2] > 0).all(0)])
    with pytest.raises(ValueError, match="No gene is expressed in 3 cells: lower `min_cells`"):
        ScRNAProcessor().fit(ad.AnnData(sparse.eye_array(10, format="csr", dtype=np.float32)))


def test_genes_are_aligned_by_name(processor, pbmc):
    shuffled = pbmc[:, np.random.default_rng(0).permutation(pbmc.n_vars)].copy()
    matrix, library_size = processor.select(shuffled)
    expected, expected_size = processor.select(pbmc)
    assert (matrix != expected).nnz == 0
    np.testing.assert_array_equal(library_size, expected_size)
    np.testing.assert_array_equal(matrix.toarray(), pbmc[:, processor.var_names].X.toarray())


def test_missing_genes_are_named(processor, pbmc, monkeypatch):
    gone = processor.var_names[[3, 7]]
    messages = []
    monkeypatch.setattr("wbdit_diffusers.processing.genes.logger.warning", messages.append)
    matrix, _ = processor.select(pbmc[:, ~pbmc.var_names.isin(gone)].copy())
    assert "2 of the 200 modelled genes" in messages[0] and gone[0] in messages[0] and gone[1] in messages[0]
    assert len(messages) == 1 and matrix.shape == (700, 200) and matrix[:, [3, 7]].nnz == 0
    left = np.delete(np.arange(200), [3, 7])
    assert (matrix[:, left] != processor.select(pbmc)[0][:, left]).nnz == 0
    processor.select(pbmc)
    assert len(messages) == 1
    with pytest.raises(ValueError, match=r"200 of the 200 genes of this model.*adata.var_names"):
        processor.select(ad.AnnData(pbmc.X, var=pd.DataFrame(index=[f"ENSG{i}" for i in range(pbmc.n_vars)])))


def test_bad_names_are_named(pbmc, processor):
    duplicated = pbmc.copy()
    duplicated.var_names = ["A", *duplicated.var_names[1:-1], "A"]
    for read in (ScRNAProcessor().fit, processor.select):
        with pytest.raises(ValueError, match=r"'A' occurs more than once.*var_names_make_unique"):
            read(duplicated)
        with pytest.raises(ValueError, match=r"is empty: 0 cells × 765 genes"):
            read(pbmc[:0])
        with pytest.raises(ValueError, match=r"is empty: 700 cells × 0 genes"):
            read(pbmc[:, :0])


def test_cells_that_are_all_alike_are_refused(pbmc):
    alike = ad.AnnData(np.ones((50, 100), dtype=np.float32))
    with pytest.raises(ValueError, match="All cells are alike in every gene"):
        ScRNAProcessor(num_genes=20).fit(alike)


def test_few_common_genes_are_refused(processor, pbmc):
    """Names of another kind or species agree by chance alone. A panel of the genes is another matter."""
    few = pbmc[:, ~pbmc.var_names.isin(processor.var_names[:199])].copy()
    with pytest.raises(ValueError, match="199 of the 200 genes of this model"):
        processor.select(few)
    panel = pbmc[:, ~pbmc.var_names.isin(processor.var_names[:150])].copy()
    assert (processor.select(panel)[0][:, :150] != 0).nnz == 0


def test_a_panel_of_few_genes_is_not_taken_for_another_kind_of_name():
    modelled = pd.Index([f"gene_{i}" for i in range(20_000)])
    assert (align_genes(modelled[:50], modelled) == np.arange(50)).all()
    with pytest.raises(ValueError, match="set it to the same kind of gene name"):
        align_genes(pd.Index([*modelled[:10], *(f"ENSG{i}" for i in range(300))]), modelled)
