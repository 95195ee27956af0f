import copy

import numpy as np
import pytest
import torch
from conftest import make_program_codec
from scipy import sparse, stats
from sklearn.decomposition import PCA

from wbdit_diffusers import ProgramCodec, ScRNAProcessor
from wbdit_diffusers.data import CellDataset
from wbdit_diffusers.processing import log_normalize


@pytest.fixture(scope="module")
def processor(pbmc) -> ScRNAProcessor:
    return ScRNAProcessor(num_genes=100).fit(pbmc)


@pytest.fixture(scope="module")
def cells(processor, pbmc) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts of 100 of 765 genes, and library sizes over all of them."""
    counts, library_size = CellDataset(pbmc, processor).cells(slice(None))
    assert (counts.sum(1) < library_size).all()
    return counts, library_size


@pytest.fixture
def few(cells) -> tuple[torch.Tensor, torch.Tensor]:
    return cells[0][:5], cells[1][:5]


@pytest.fixture
def codec(processor, pbmc) -> ProgramCodec:
    return make_program_codec(processor, pbmc)


# ==================== Fitting ====================


@torch.no_grad()
def test_encoder_sees_all_other_genes_in_one_bin(codec, few, processor, pbmc):
    first = pbmc[:5]
    counts = first[:, processor.var_names].X.toarray()
    total = first.X.toarray().sum(1, keepdims=True)
    bins = np.log1p(np.hstack([counts, total - counts.sum(1, keepdims=True)]) / total * 1e4)
    expected = codec.to_mean(codec.encoder(torch.from_numpy(bins)))
    torch.testing.assert_close(codec.posterior(*few)[0], expected)


@torch.no_grad()
def test_loss_is_the_likelihood_of_the_mixture(codec, cells):
    """SciPy gives the same from the heads' outputs, including the bin of all other genes."""
    counts, library_size = cells[0][:20], cells[1][:20]
    heads = codec.heads
    heads["log_theta"].bias.copy_(torch.linspace(-2, 5, 101))
    heads["log_theta"].weight.mul_(0.1)
    rng = torch.Generator().manual_seed(0)
    of_genes = {name: value.normal_(generator=rng) for name, value in codec.gene_parameters.items()}
    programs = codec.posterior(counts, library_size)[0]
    rates = (torch.softmax(heads["log_rates"](programs), dim=1) * library_size[:, None]).numpy()
    theta = heads["log_theta"](programs).exp().numpy()
    weight = torch.sigmoid(of_genes["outlier_logits"]).numpy()
    outlier_theta = of_genes["outlier_log_theta"].exp().numpy()
    outlier_rates = rates * of_genes["outlier_log_ratio"].exp().numpy()
    bins = torch.cat([counts, library_size[:, None] - counts.sum(1, keepdim=True)], dim=1).numpy()
    probability = (1 - weight) * stats.nbinom.pmf(bins, theta, theta / (theta + rates))
    probability += weight * stats.nbinom.pmf(bins, outlier_theta, outlier_theta / (outlier_theta + outlier_rates))
    loss = codec.decoder_loss(programs, counts, library_size)
    np.testing.assert_allclose(loss, -np.log(probability).sum(1), rtol=1e-4)


@torch.no_grad()
def test_divergence_is_that_of_the_posterior_from_the_normal_distribution(codec, few):
    mean, log_variance = codec.posterior(*few)
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1)).sum(1)
    torch.testing.assert_close(codec(*few)[1], expected)


@torch.no_grad()
def test_a_fit_starts_at_the_mean_of_each_gene(processor, pbmc):
    codec = ProgramCodec(num_genes=100)
    matrix, library_size = processor.select(pbmc)
    codec.fit_statistics(matrix, library_size)
    start = codec.decode_programs(torch.zeros(1, 16), torch.ones(1))
    shares = np.asarray(matrix.sum(0)).ravel() / library_size.sum()
    np.testing.assert_allclose(start.mean()[0], shares, rtol=0.1)


def test_a_fit_can_start_where_rounding_leaves_fewer_counts_than_the_genes_have(pbmc):
    """Single precision rounds sums of large counts, so the bin of other genes may seem to have less than none."""
    counts = pbmc.X.toarray()
    counts[:, 0] = 99 * counts.sum(axis=1) + 1
    matrix = sparse.csr_matrix(counts)
    codec = ProgramCodec(num_genes=matrix.shape[1])
    codec.fit_statistics(matrix, counts.sum(axis=1) * np.float32(1 - 1e-6))
    assert all(parameter.isfinite().all() for parameter in codec.parameters())


def test_dispersions_start_above_the_moments_of_each_gene():
    """Outliers, which have their own component, contribute to the moments."""
    rng = np.random.default_rng(0)
    theta = np.array([0.5, 1.0, 5.0])
    counts = rng.negative_binomial(theta, theta / (theta + 4.0), size=(20_000, 3)).astype(np.float32)
    codec = ProgramCodec(num_genes=3)
    codec.fit_statistics(sparse.csr_matrix(counts), np.full(20_000, 100.0))
    np.testing.assert_allclose(codec.heads["log_theta"].bias.exp()[:-1].detach(), np.e * theta, rtol=0.15)


# ==================== Cells to latents and back ====================


@torch.no_grad()
def test_programs_start_at_principal_components(processor, pbmc, cells):
    dataset = CellDataset(pbmc, processor)
    codec = ProgramCodec(num_genes=100, num_programs=5, hidden_size=12)
    codec.fit_statistics(dataset.matrix, dataset.library_size)
    flat = codec.decoder_loss(torch.zeros(len(dataset), 5), *cells).mean()
    codec.start_programs(dataset.matrix, dataset.library_size, precision=30.0)
    programs = codec.posterior(*cells)[0]
    components = PCA(5).fit_transform(log_normalize(dataset.matrix, dataset.library_size).toarray())
    correlation = np.corrcoef(programs.T, components.T)[:5, 5:]
    np.testing.assert_allclose(np.abs(correlation), np.eye(5), atol=1e-3)
    torch.testing.assert_close(programs.T.cov(), torch.eye(5), atol=0.01, rtol=0)
    assert codec.decoder_loss(programs, *cells).mean() < flat - 5  # nats


@pytest.mark.parametrize("num_cells, hidden_size", [(3, 256), (700, 6)])
@torch.no_grad()
def test_programs_that_cells_or_units_are_too_few_for_start_at_random(processor, pbmc, num_cells, hidden_size):
    dataset = CellDataset(pbmc[:num_cells], processor)
    codec = ProgramCodec(num_genes=100, num_programs=8, hidden_size=hidden_size)
    before = codec.to_mean.weight.clone()
    codec.start_programs(dataset.matrix, dataset.library_size, precision=30.0)
    number = min(num_cells - 1, hidden_size // 2)
    assert torch.equal(codec.to_mean.weight[number:], before[number:])
    assert torch.isfinite(codec.posterior(*dataset.cells(slice(None)))[0]).all()


@torch.no_grad()
def test_latents_are_standardised_and_hold_the_library_size(codec, cells):
    counts, library_size = cells
    latents = codec.encode(counts, library_size)
    assert latents.shape == (700, 7) and codec.num_features == 7 and codec.models_library_size
    torch.testing.assert_close(latents.mean(0), torch.zeros(7), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(0), torch.ones(7), atol=1e-3, rtol=0)
    decoded = codec.decode(latents)
    torch.testing.assert_close(decoded.library_size, library_size, rtol=1e-3, atol=0.1)
    expected = codec.decode_programs(codec.posterior(counts, library_size)[0], library_size)
    torch.testing.assert_close(decoded.mean(), expected.mean(), rtol=2e-3, atol=1e-6)
    assert decoded.mean().shape == (700, 100)


@torch.no_grad()
def test_a_generated_library_size_stays_in_the_range_of_real_ones(codec, cells):
    library_size = cells[1]
    extreme = codec.encode(*cells)[:2]
    extreme[:, -1] = torch.tensor([-50.0, 50.0])
    low_high = torch.stack([library_size.min(), library_size.max()])
    torch.testing.assert_close(codec.decode(extreme).library_size, low_high, rtol=1e-3, atol=0.1)


@torch.no_grad()
def test_a_given_library_size_changes_the_depth_alone(codec, few):
    latents = codec.encode(*few)
    decoded, deeper = codec.decode(latents), codec.decode(latents, library_size=2 * codec.decode(latents).library_size)
    torch.testing.assert_close(deeper.mean(), 2 * decoded.mean())
    torch.testing.assert_close(deeper.expression(), decoded.expression())


@torch.no_grad()
def test_labels_add_their_effects(pbmc):
    """Each label key adds to every head. Unknown or missing labels add nothing."""
    processor = ScRNAProcessor(num_genes=100, label_keys=["cell_type", "phase"]).fit(pbmc)
    codec = make_program_codec(processor, pbmc)
    num_types, num_phases = processor.condition_sizes
    programs, library_size = torch.randn(3, 6), torch.full((3,), 1000.0)
    plain = codec.decode_programs(programs, library_size)
    labels = torch.tensor([[num_types - 1, 0], [-1, num_phases - 1], [-1, -1]])
    labelled = codec.decode_programs(programs, library_size, labels)
    effects = codec.label_effects["log_theta"].weight
    expected = torch.stack([effects[num_types - 1] + effects[num_types], effects[-1], torch.zeros(101)])
    torch.testing.assert_close(labelled.log_theta - plain.log_theta, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(labelled.log_proportions[2], plain.log_proportions[2])
    rates = codec.label_effects["log_rates"].weight[[num_types - 1, num_types]].sum(0)
    expected = torch.log_softmax(codec.heads["log_rates"](programs[:1]) + rates, dim=1)
    torch.testing.assert_close(labelled.log_proportions[:1], expected)


@torch.no_grad()
def test_bfloat16_gives_about_what_float32_gives(codec, cells):
    loaded, latents = copy.deepcopy(codec).to(torch.bfloat16), codec.encode(*cells)
    assert (loaded.encode(*cells) - latents).abs().max() < 0.15
    expected = codec.decode(latents, cells[1]).expression()
    output = loaded.decode(latents, cells[1]).expression()
    assert output.dtype == torch.float32  # the likelihood is computed in float32
    assert (output - expected).norm() / expected.norm() < 0.02
