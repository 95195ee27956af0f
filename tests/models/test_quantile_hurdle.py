import numpy as np
import pytest
import torch
from scipy import sparse, stats

from wbdit_diffusers.models import LIKELIHOODS, ProgramCodec


Hurdle = LIKELIHOODS["quantile_hurdle"]


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def values() -> np.ndarray:
    """400 cells × 6 genes of log2(TPM / 10 + 1): skewed, bimodal, rare, in every cell, constant, and in one cell."""
    rng = np.random.default_rng(0)
    tpm = np.zeros((400, 6))
    tpm[:, 0] = rng.lognormal(0, 1, 400) * (rng.random(400) < 0.5)
    tpm[:, 1] = np.where(rng.random(400) < 0.5, rng.lognormal(0, 0.3, 400), rng.lognormal(6, 0.3, 400))
    tpm[:15, 2] = rng.lognormal(3, 1, 15)
    tpm[:, 3] = rng.lognormal(5, 0.5, 400)
    tpm[:, 4] = 20 * (rng.random(400) < 0.3)
    tpm[7, 5] = 12.34
    return np.log2(np.round(tpm, 1) / 10 + 1).astype(np.float32)


@pytest.fixture
def measured(values) -> dict[str, torch.Tensor]:
    return Hurdle.initial_values(sparse.csr_matrix(values))


def as_measured(measured: dict[str, torch.Tensor], num_cells: int, **changes: torch.Tensor):
    """Cells in which each gene is distributed as over all training cells."""
    heads = {name: measured[name].expand(num_cells, -1) for name in Hurdle.HEADS}
    return Hurdle(**{**measured, **heads, **changes})


def test_genes_start_as_they_are_in_the_training_cells(values, measured):
    drawn = as_measured(measured, 4000).icdf(uniform(4000, 6)).numpy()
    np.testing.assert_allclose((drawn > 0).mean(0), (values > 0).mean(0), atol=0.03)
    for gene in (0, 1, 3):
        assert stats.ks_2samp(values[values[:, gene] > 0, gene], drawn[drawn[:, gene] > 0, gene]).statistic < 0.08


def test_drawn_values_are_rounded_as_the_file_is(values, measured):
    drawn = as_measured(measured, 200).icdf(uniform(200, 6)).numpy()
    occurring = drawn <= values.max()
    assert occurring.mean() > 0.98 and np.isin(drawn[occurring], values).all()
    exact = as_measured(measured, 200, levels=torch.zeros(0)).icdf(uniform(200, 6)).numpy()
    assert (exact != drawn).any() and np.abs(exact - drawn).max() < 0.5


def test_unique_values_are_not_rounded():
    unique = sparse.csr_matrix(uniform(50, 10).numpy())
    assert len(Hurdle.initial_values(unique)["levels"]) == 0


@pytest.fixture
def distribution(measured):
    """Three cells with shifted, narrower genes that are more or less often zero."""
    return as_measured(
        measured,
        3,
        scores=uniform(3, 6, seed=1).float() * 2 - 1,
        zero_logits=uniform(3, 6, seed=2).float() * 4 - 2,
        log_std=torch.linspace(-1, 0.2, 6),
        levels=torch.zeros(0),
    )


def test_density_and_zeros_add_up_to_one(distribution):
    grid = torch.linspace(1e-4, 40, 400_001)
    for gene in (0, 1, 3):
        mask = torch.arange(6) == gene
        x = torch.zeros(len(grid), 6)
        x[:, gene] = grid
        one_cell = Hurdle(
            *(values[:1].expand(len(grid), -1) for values in (distribution.scores, distribution.zero_logits)),
            distribution.log_std,
            distribution.quantiles,
        )
        density = one_cell.log_prob(x, gene_mask=mask).exp()
        zero = distribution.log_prob(torch.zeros(3, 6), gene_mask=mask)[0].exp()
        assert torch.trapezoid(density, grid) + zero == pytest.approx(1, abs=0.03)
        assert zero == pytest.approx(torch.sigmoid(distribution.zero_logits[0, gene]).item(), rel=1e-4)


def test_mean_is_that_of_the_draws(distribution):
    num_draws = 4000
    u = (torch.arange(num_draws).double() + 0.5) / num_draws
    draws = torch.stack([distribution.icdf(one.expand(3, 6)) for one in u])
    torch.testing.assert_close(distribution.mean(), draws.mean(0), rtol=0.03, atol=0.03)
    assert (draws.diff(dim=0) >= 0).all()


def test_gradients_reach_all_that_is_fitted(values, measured):
    parameters = {name: measured[name].clone().requires_grad_() for name in ("scores", "zero_logits", "log_std")}
    heads = {name: parameters[name].expand(50, -1) for name in Hurdle.HEADS}
    Hurdle(**{**measured, **heads, "log_std": parameters["log_std"]}).log_prob(
        torch.from_numpy(values[:50])
    ).sum().backward()
    assert all(torch.isfinite(value.grad).all() and value.grad.abs().max() > 0 for value in parameters.values())


def test_nothing_is_negative_or_infinite(distribution):
    far = Hurdle(distribution.scores * 50, distribution.zero_logits, distribution.log_std, distribution.quantiles)
    values = far.icdf(uniform(3, 6, seed=4))
    assert torch.isfinite(values).all() and (values >= 0).all() and torch.isfinite(far.mean()).all()
    assert torch.isfinite(far.log_prob(torch.full((3, 6), 80.0))).all()


@torch.no_grad()
def test_programs_of_log_values_start_at_principal_components():
    """The first program separates two kinds of cells before the fit."""
    rng = np.random.default_rng(0)
    kind = np.repeat([0.0, 1.0], 150)[:, None]
    rate = np.where(np.arange(40) < 20, 0.2 + 0.6 * kind, 0.8 - 0.6 * kind)
    values = sparse.csr_matrix((rng.random((300, 40)) < rate) * rng.lognormal(0.5 + kind, 0.4, (300, 40)))
    codec = ProgramCodec(num_genes=40, num_programs=3, hidden_size=16, likelihood="quantile_hurdle")
    codec.fit_statistics(values, None)
    x = torch.from_numpy(values.toarray()).float()
    flat = codec.decoder_loss(torch.zeros(300, 3), x, None).mean()
    codec.start_programs(values, None, precision=30.0)
    programs = codec.posterior(x, None)[0]
    assert np.abs(np.corrcoef(programs[:, 0], kind[:, 0])[0, 1]) > 0.9
    assert codec.decoder_loss(programs, x, None).mean() < flat - 3  # nats


def test_start_of_genes_whose_values_hardly_vary():
    """In single precision, rounding errors can make the variance of equal values negative."""
    rng = np.random.default_rng(0)
    values = sparse.csr_matrix((rng.random((500, 60)) < 0.5) * np.linspace(5, 8, 60), dtype=np.float32)
    programs = rng.normal(size=(500, 2))
    slopes = Hurdle.initial_slopes(values, None, programs, Hurdle.initial_values(values), precision=30.0)
    assert all(torch.isfinite(slope).all() for slope in slopes.values())
    assert slopes["scores"].abs().max() < 0.1
