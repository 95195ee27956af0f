import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import torch
from conftest import make_expression_codec
from scipy import sparse

from wbdit_diffusers import ExpressionCodec, ScRNAProcessor
from wbdit_diffusers.data import CellDataset


@pytest.fixture(scope="module")
def processor(pbmc) -> ScRNAProcessor:
    return ScRNAProcessor(num_genes=200).fit(pbmc)


@pytest.fixture(scope="module")
def cells(processor, pbmc) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts of 200 of 765 genes, and library sizes over all of them."""
    return CellDataset(pbmc, processor).cells(slice(None))


@pytest.fixture(scope="module")
def log_cp10k(processor, pbmc) -> torch.Tensor:
    """Scanpy's, over all genes."""
    normalised = pbmc.copy()
    sc.pp.normalize_total(normalised, target_sum=1e4)
    sc.pp.log1p(normalised)
    return torch.from_numpy(normalised[:, processor.var_names].X.toarray())


@pytest.fixture
def codec(processor, pbmc) -> ExpressionCodec:
    return make_expression_codec(processor, pbmc)


def test_latents_are_standardised_log_cp10k_and_library_size(codec, cells, log_cp10k):
    latents = codec.encode(*cells)
    assert latents.shape == (700, 201) and codec.num_features == 201 and codec.models_library_size
    torch.testing.assert_close(latents.mean(0), torch.zeros(201), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.var(0, unbiased=False), torch.ones(201), atol=1e-3, rtol=0)
    features = torch.cat([log_cp10k, cells[1].log()[:, None]], dim=1)
    expected = (features - features.mean(0)) / features.std(0, unbiased=False)
    torch.testing.assert_close(latents, expected, atol=1e-3, rtol=1e-3)


def test_round_trip_gives_the_same_counts_back(codec, cells, log_cp10k):
    decoded = codec.decode(codec.encode(*cells))
    torch.testing.assert_close(decoded.expression(), log_cp10k, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decoded.library_size, cells[1], atol=0.1, rtol=1e-4)
    assert torch.equal(decoded.icdf(torch.rand(700, 200)), cells[0])
    torch.testing.assert_close(decoded.mean(), cells[0], atol=0.01, rtol=1e-3)


def test_a_gene_that_is_the_same_in_all_cells_is_not_scaled():
    codec = ExpressionCodec(num_genes=2, values="log")
    matrix = np.array([[0.5, 1.0], [0.5, 3.0]], dtype=np.float32)
    codec.fit_statistics(sparse.csr_matrix(matrix), matrix.sum(1))
    latents = codec.encode(torch.from_numpy(matrix), None)
    torch.testing.assert_close(latents, torch.tensor([[0.0, -1.0], [0.0, 1.0]]))


def test_log_values_are_taken_as_they_are(pbmc):
    log_values = ad.AnnData(
        sparse.csr_matrix(np.log2(pbmc.X.toarray() / np.linspace(0.5, 5, pbmc.n_vars) + 1)), obs=pbmc.obs, var=pbmc.var
    )
    processor = ScRNAProcessor(values="log").fit(log_values)
    codec = make_expression_codec(processor, log_values)
    assert codec.num_features == 765 and not codec.models_library_size
    latents = codec.encode(*CellDataset(log_values, processor).cells(slice(None)))
    torch.testing.assert_close(latents.var(0, unbiased=False), torch.ones(765), atol=1e-3, rtol=0)
    decoded = codec.decode(latents)
    assert decoded.library_size is None
    for values in (decoded.mean(), decoded.expression(), decoded.icdf(torch.rand(700, 765))):
        np.testing.assert_allclose(values, log_values.X.toarray(), atol=1e-4)


def test_the_paper_s_recipe_changes_no_value(processor, pbmc, cells, log_cp10k):
    codec = make_expression_codec(processor, pbmc, standardize=False, model_library_size=False)
    assert codec.num_features == 200 and not codec.models_library_size
    latents = codec.encode(*cells)
    torch.testing.assert_close(latents, log_cp10k, atol=1e-5, rtol=1e-5)
    decoded = codec.decode(latents - 0.5)
    assert decoded.library_size is None
    assert torch.equal(decoded.expression(), (latents - 0.5).clamp(min=0))
    # Counts then need a library size from elsewhere.
    assert torch.equal(codec.decode(latents, cells[1]).icdf(torch.rand(700, 200)), cells[0])


def test_a_generated_library_size_stays_in_the_range_of_real_ones(codec, cells):
    latents = torch.zeros(2, 201)
    latents[:, -1] = torch.tensor([-100.0, 100.0])
    library_size = codec.decode(latents).library_size
    np.testing.assert_allclose(library_size, [cells[1].min(), cells[1].max()], rtol=1e-4)


def test_there_is_no_likelihood(codec, cells):
    with pytest.raises(ValueError, match="ExpressionCodec has no likelihood.*Use ProgramCodec"):
        codec.decode(codec.encode(*cells)).log_prob(cells[0])
