import numpy as np
import pytest
import torch
from scipy import stats

from wbdit_diffusers.models import LIKELIHOODS


Mixture = LIKELIHOODS["nb_mixture"]


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def parameters() -> dict[str, torch.Tensor]:
    """20 cells × 29 genes and the bin of all others: from nearly Poisson to mostly zero, with various outliers."""
    return {
        "log_rates": torch.log(uniform(20, 30, seed=1) ** 4 / 20),
        "log_theta": torch.linspace(-2, 5, 30).double() + uniform(20, 30, seed=2),
        "outlier_logits": torch.linspace(1, -5, 30).double() + uniform(30, seed=3),
        "outlier_log_ratio": 3
        * torch.linspace(-1, 1, 30).double()[torch.randperm(30, generator=torch.Generator().manual_seed(0))],
        "outlier_log_theta": torch.linspace(2, -2, 30).double()[
            torch.randperm(30, generator=torch.Generator().manual_seed(1))
        ],
        "library_size": 50 + 5000 * uniform(20, seed=4),
    }


@pytest.fixture
def distribution(parameters):
    return Mixture(**parameters)


@pytest.fixture
def counts(distribution) -> torch.Tensor:
    counts = distribution.icdf(uniform(20, 30, seed=5)).double()
    assert 0.1 < (counts == 0).double().mean() < 0.8 and counts.max() > 100  # both parts of the likelihood
    return counts


def scipy_parts(distribution) -> list[tuple[np.ndarray, stats.rv_discrete]]:
    """Weight and SciPy distribution of each component."""
    rates = distribution.log_proportions.exp() * distribution.library_size[:, None]
    weight = torch.sigmoid(distribution.outlier_logits)
    theta, outlier_theta = distribution.log_theta.exp(), distribution.outlier_log_theta.exp()
    outlier_rates = rates * distribution.outlier_log_ratio.exp()
    return [
        ((1 - weight).numpy(), stats.nbinom(theta.numpy(), (theta / (theta + rates)).numpy())),
        (
            weight.numpy(),
            stats.nbinom(outlier_theta.numpy(), (outlier_theta / (outlier_theta + outlier_rates)).numpy()),
        ),
    ]


def scipy_log_pmf(distribution, counts: torch.Tensor) -> np.ndarray:
    """Of each gene in each cell."""
    return np.log(sum(weight * part.pmf(counts.numpy()) for weight, part in scipy_parts(distribution)))


# ==================== Mixture of negative binomials ====================


def test_log_prob_is_scipy_s(distribution, counts):
    expected = scipy_log_pmf(distribution, counts)
    log_prob = distribution.log_prob(counts)
    assert log_prob.shape == (20,)
    np.testing.assert_allclose(log_prob, expected.sum(1), rtol=1e-6)
    np.testing.assert_allclose(distribution.log_prob(counts[:, :-1]), expected[:, :-1].sum(1), rtol=1e-6)


def test_log_prob_of_a_mask_is_that_of_its_genes(distribution, counts):
    counts, mask = counts[:, :-1], torch.arange(29) % 3 == 0
    expected = scipy_log_pmf(distribution, torch.nn.functional.pad(counts, (0, 1)))[:, :-1][:, mask.numpy()].sum(1)
    np.testing.assert_allclose(distribution.log_prob(counts, mask), expected, rtol=1e-6)
    unmeasured = torch.where(mask, counts, torch.nan)  # what is not known must not matter
    torch.testing.assert_close(distribution.log_prob(unmeasured, mask), distribution.log_prob(counts, mask))
    both = distribution.log_prob(counts, mask) + distribution.log_prob(counts, ~mask)
    torch.testing.assert_close(both, distribution.log_prob(counts))
    assert (distribution.log_prob(counts, torch.zeros(29, dtype=torch.bool)) == 0).all()


@pytest.mark.parametrize("gene_mask", [None, torch.arange(30) % 3 == 0])
def test_log_prob_is_differentiable(parameters, counts, gene_mask):
    inputs = [(values[:1] if len(values) == 20 else values).clone().requires_grad_() for values in parameters.values()]
    assert torch.autograd.gradcheck(lambda *values: Mixture(*values).log_prob(counts[:1], gene_mask), inputs)


def test_icdf_is_the_inverse_of_the_mixture_s_distribution(distribution):
    share = uniform(20, 30, seed=6)
    counts = distribution.icdf(share)
    assert counts.dtype == torch.float32

    def cdf(k: np.ndarray) -> np.ndarray:
        return sum(weight * part.cdf(k) for weight, part in scipy_parts(distribution))

    assert (cdf(counts.numpy()) >= share.numpy() - 1e-9).all()
    assert (cdf(counts.numpy() - 1) < share.numpy() + 1e-9).all()
    without_others = distribution.icdf(share[:, :-1])
    assert torch.equal(without_others, counts[:, :-1])
    # More of the distribution lies below a larger count, and the ends are finite.
    ends = [distribution.icdf(torch.full((20, 30), end).double()) for end in (0.0, 0.9, 0.99, 1 - 2**-53)]
    assert ends[0].max() == 0 and torch.isfinite(ends[-1]).all()
    assert all((low <= high).all() for low, high in zip(ends, ends[1:])) and (ends[0] < ends[-1]).any()


def test_a_cell_s_counts_depend_on_its_own_random_numbers_alone(parameters):
    draws = uniform(20, 30, seed=7)
    together = Mixture(**parameters).icdf(draws)
    of_cell = {name: values[4:5] if len(values) == 20 else values for name, values in parameters.items()}
    assert torch.equal(together[4:5], Mixture(**of_cell).icdf(draws[4:5]))
    draws[4] = uniform(30, seed=8)
    others = Mixture(**parameters).icdf(draws)
    assert (others[4] != together[4]).any()
    others[4] = together[4]
    assert torch.equal(others, together)


def test_mean_and_expression(distribution):
    mean = sum(weight * part.mean() for weight, part in scipy_parts(distribution))[:, :-1]
    np.testing.assert_allclose(distribution.mean(), mean, rtol=1e-6)
    expected = np.log1p(mean / distribution.library_size.numpy()[:, None] * 1e4)
    np.testing.assert_allclose(distribution.expression(), expected, rtol=1e-6)


def test_heads_hold_the_other_genes_and_stay_within_limits():
    heads = {name: torch.zeros(2, 4) for name in Mixture.HEADS}
    heads |= {name: torch.zeros(4) for name in Mixture.GENE_PARAMETERS}
    heads["log_rates"][:, -1] = np.log(7.0)  # all other genes together: seven tenths of the library
    heads["log_theta"] = torch.tensor([[-100.0, 0, 100, 0], [0, 0, 0, 0]])
    heads["outlier_log_theta"] = torch.tensor([-100.0, 0, 100, 0])
    distribution = Mixture(**heads, library_size=torch.tensor([10.0, 1000.0]))
    assert distribution.num_values == 4
    torch.testing.assert_close(distribution.mean(), torch.tensor([[1.0], [100.0]]).expand(2, 3))
    assert torch.isfinite(distribution.log_prob(torch.tensor([[0.0, 1, 9], [3, 0, 800]]))).all()
    assert torch.isfinite(distribution.icdf(torch.full((2, 4), 0.999).double())).all()
