import numpy as np
import pytest
import torch
from conftest import make_autoencoder
from scipy import sparse, stats

from wbdit_diffusers import CountAutoencoder, ScRNAProcessor


@pytest.fixture(scope="module")
def processor(pbmc) -> ScRNAProcessor:
    return ScRNAProcessor(num_genes=100).fit(pbmc)


@pytest.fixture(scope="module")
def counts(processor, pbmc) -> torch.Tensor:
    return processor.counts(*processor.select(pbmc))


@pytest.fixture
def autoencoder(processor, pbmc) -> CountAutoencoder:
    return make_autoencoder(processor, pbmc)


def test_counts_hold_all_other_genes_in_one_bin(counts, pbmc):
    assert counts.shape == (700, 101)
    np.testing.assert_allclose(counts.sum(1), np.asarray(pbmc.X.sum(1)).ravel())


@torch.no_grad()
def test_loss_is_the_zero_inflated_negative_binomial_likelihood(autoencoder, counts):
    autoencoder.dispersion.bias.copy_(torch.linspace(-2, 5, 101))
    autoencoder.dispersion.weight.mul_(0.1)
    autoencoder.zero_inflation.bias.copy_(torch.linspace(-4, 3, 101).flip(0))
    autoencoder.zero_inflation.weight.normal_(std=0.1)
    counts = counts[:20]
    programs = autoencoder.programs(counts)
    proportions = torch.softmax(autoencoder.decoder(programs), dim=1)
    rates = (proportions * counts.sum(1, keepdim=True)).numpy()
    theta = autoencoder.dispersion(programs).exp().numpy()
    missed = torch.sigmoid(autoencoder.zero_inflation(programs)).numpy()
    probability = (1 - missed) * stats.nbinom.pmf(counts.numpy(), theta, theta / (theta + rates))
    probability += missed * (counts.numpy() == 0)
    log_likelihood = np.log(probability[:, :-1]).sum(1)
    loss = autoencoder.negative_log_likelihood(counts, programs)
    np.testing.assert_allclose(loss.numpy(), -log_likelihood, rtol=1e-4)


@torch.no_grad()
def test_divergence_is_that_of_the_posterior_from_the_normal_distribution(autoencoder, counts):
    mean, log_variance = autoencoder.posterior(counts[:5])
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1)).sum(1)
    torch.testing.assert_close(autoencoder(counts[:5])[1], expected)


@torch.no_grad()
def test_likelihood_is_of_programs_drawn_from_the_posterior(autoencoder, counts):
    counts = counts[:5]
    draws = torch.stack([autoencoder(counts)[0] for _ in range(20)])
    assert (draws.std(0) > 0).all()
    autoencoder.to_log_variance.weight.zero_()
    autoencoder.to_log_variance.bias.fill_(-100)  # the smallest variance, e^-8
    certain = autoencoder.negative_log_likelihood(counts, autoencoder.programs(counts))
    assert (torch.stack([autoencoder(counts)[0] for _ in range(20)]).std(0) < draws.std(0)).all()
    torch.testing.assert_close(autoencoder(counts)[0], certain, rtol=0.05, atol=1)


def test_a_few_steps_raise_the_likelihood(autoencoder, counts):
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = sum(autoencoder(counts)).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < losses[0] - 1


def test_decoder_starts_at_the_mean_rates(processor, pbmc):
    autoencoder = CountAutoencoder(num_genes=100)
    matrix, library_size = processor.select(pbmc)
    autoencoder.fit_statistics(matrix, library_size)
    shares = autoencoder.log_proportions(torch.zeros(1, 32)).exp()[0, :-1].detach().numpy()
    np.testing.assert_allclose(shares, np.asarray(matrix.sum(0)).ravel() / library_size.sum(), rtol=0.1)


def test_dispersions_start_at_the_moments_of_each_gene():
    rng = np.random.default_rng(0)
    theta = np.array([0.3, 1.0, 5.0])
    counts = rng.negative_binomial(theta, theta / (theta + 4.0), size=(20_000, 3)).astype(np.float32)
    autoencoder = CountAutoencoder(num_genes=3)
    autoencoder.fit_statistics(sparse.csr_matrix(counts), np.full(20_000, 100.0))
    np.testing.assert_allclose(autoencoder.dispersion.bias.exp()[:-1].detach(), theta, rtol=0.15)


def test_latents_are_standardised_and_hold_the_library_size(autoencoder, counts):
    latents = autoencoder.encode(counts)
    assert latents.shape == (700, 7) and autoencoder.num_features == 7
    torch.testing.assert_close(latents.mean(0), torch.zeros(7), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(0), torch.ones(7), atol=1e-3, rtol=0)
    proportions, theta, detection, library_size = autoencoder.decode(latents)
    assert detection.shape == theta.shape == proportions.shape == (700, 100) and (theta > 0).all()
    assert ((detection > 0) & (detection <= 1)).all()
    torch.testing.assert_close(library_size, counts.sum(1), rtol=1e-3, atol=0.1)
    expected = torch.softmax(autoencoder.decoder(autoencoder.programs(counts)), dim=1)[:, :-1]
    torch.testing.assert_close(proportions, expected, rtol=1e-3, atol=1e-6)
    extreme = latents[:2].clone()
    extreme[:, -1] = torch.tensor([-50.0, 50.0])
    low_high = torch.stack([counts.sum(1).min(), counts.sum(1).max()])
    torch.testing.assert_close(autoencoder.decode(extreme)[3], low_high, rtol=1e-3, atol=0.1)


@pytest.mark.parametrize("theta, detection", [(2.0, 0.7), (0.1, 1.0), (500.0, 0.99)])
def test_samples_are_zero_inflated_negative_binomial(autoencoder, theta, detection):
    """Against SciPy's distribution, at rates from far below one to the tens of thousands of read counts."""
    rates = torch.tensor([1e-3, 0.05, 1.0, 20.0, 5e4])
    uniform = torch.rand(20_000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shape = (20_000, 5)
    counts = autoencoder.sample(
        (rates / 1e6).expand(shape),
        torch.full(shape, theta),
        torch.full(shape, detection),
        torch.full((20_000,), 1e6),
        uniform,
    ).toarray()
    assert (counts == np.rint(counts)).all() and (counts >= 0).all()
    for gene, rate in enumerate(rates.tolist()):
        p = theta / (theta + rate)
        expected_mean = detection * rate
        deviation = np.sqrt(detection * (rate + rate**2 / theta + rate**2) - expected_mean**2)
        assert abs(counts[:, gene].mean() - expected_mean) < 5 * deviation / np.sqrt(20_000)
        for k in (0, int(rate), int(3 * rate) + 1):
            probability = 1 - detection + detection * stats.nbinom.cdf(k, theta, p)
            share = (counts[:, gene] <= k).mean()
            assert abs(share - probability) < 5 * np.sqrt(probability * (1 - probability) / 20_000) + 1e-9


def test_a_cell_s_counts_depend_on_its_own_random_numbers_alone(autoencoder):
    proportions, theta, detection = torch.rand(3, 100) / 50, torch.rand(3, 100) * 5 + 0.5, torch.rand(3, 100)
    library_size, uniform = torch.tensor([1000.0, 2000.0, 3000.0]), torch.rand(3, 100, dtype=torch.float64)
    arguments = (proportions, theta, detection, library_size, uniform)
    together = autoencoder.sample(*arguments).toarray()
    alone = autoencoder.sample(*(argument[1:2] for argument in arguments)).toarray()
    np.testing.assert_array_equal(together[1:2], alone)
    others = autoencoder.sample(*arguments[:-1], torch.rand(3, 100, dtype=torch.float64)).toarray()
    assert (others != together).any()


def test_save_and_load(autoencoder, counts, tmp_path):
    autoencoder.save_pretrained(tmp_path)
    loaded = CountAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(counts), autoencoder.encode(counts))
    assert torch.equal(loaded.log_library_size_range, autoencoder.log_library_size_range)
