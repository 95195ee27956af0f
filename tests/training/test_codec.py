"""Stage one: the codec that `train` fits."""

import copy
import re
import time

import numpy as np
import pytest
import torch
from accelerate import PartialState
from scipy import sparse
from tiny import tiny_config

from wbdit_diffusers import ProgramCodec, ScRNAProcessor
from wbdit_diffusers.data import CellDataset, encode_cells
from wbdit_diffusers.training import codec as module
from wbdit_diffusers.training.codec import find_program_axes, fit_program_codec, fit_programs, refit_decoder


CPU = torch.device("cpu")
ENDLESS = 10_000_000  # steps


@pytest.fixture(scope="module", autouse=True)
def accelerate_state():
    PartialState()  # Accelerate's logger asks for it


@pytest.fixture
def never_enough(monkeypatch):
    """Only the clock or the number of steps ends a fit."""
    monkeypatch.setattr(module, "PATIENCE", ENDLESS)
    monkeypatch.setattr(module, "STOP_TOLERANCES", {"nb_mixture": 1e6, "quantile_hurdle": 1e6})


@pytest.fixture(scope="module")
def dataset(pbmc) -> CellDataset:
    processor = ScRNAProcessor(label_keys=["cell_type"], num_genes=100).fit(pbmc)
    return CellDataset(pbmc, processor)


@pytest.fixture
def searched(dataset, tmp_path, caplog, monkeypatch):
    """Fits a codec, and returns it with the losses of the log by number of programs."""

    def fit(min_programs: int = 16, gain: float = 0.01, **changes) -> tuple[ProgramCodec, dict[int, float]]:
        monkeypatch.setattr(module, "MIN_PROGRAMS", min_programs)
        monkeypatch.setattr(module, "MIN_GAINS", {"nb_mixture": gain})
        config = tiny_config(tmp_path, **{"num_programs": None, "codec_hidden_size": 32, **changes})
        caplog.clear()
        with caplog.at_level("INFO", logger="wbdit_diffusers"):
            codec = fit_program_codec(config, dataset, CPU)
        losses = re.findall(r"validation loss ([\d.]+) nats per cell \((\d+) programs", caplog.text)
        return codec, {int(programs): float(loss) for loss, programs in losses}

    return fit


def negative_log_likelihood(dataset: CellDataset, codec: ProgramCodec, programs: torch.Tensor) -> float:
    counts, library_size = dataset.cells(slice(None))
    with torch.no_grad():
        return -codec.decode_programs(programs, library_size).log_prob(counts).mean().item()


@pytest.mark.parametrize("gain", [0.02, 0.05])
def test_programs_are_doubled_for_as_long_as_the_gain_is_worth_it(searched, gain):
    codec, losses = searched(min_programs=1, max_programs=64, gain=gain, codec_max_steps=200)
    chosen = codec.config.num_programs
    assert list(losses) == [2**i for i in range(len(losses))] and 2 <= len(losses) < 7
    assert list(losses)[-1] == 2 * chosen  # one too many was tried
    for programs in losses:
        if programs < chosen:
            assert losses[2 * programs] <= (1 - gain) * losses[programs]
    assert losses[2 * chosen] > (1 - gain) * losses[chosen]


@pytest.mark.parametrize("changes, tried", [({"max_programs": 3}, [1, 2]), ({"num_programs": 200}, [100])])
def test_the_search_ends_at_max_programs_and_the_number_of_genes(changes, tried, searched):
    codec, losses = searched(min_programs=1, gain=0, codec_max_steps=5, **changes)
    assert list(losses) == tried and codec.config.num_programs == tried[-1]


def test_refitting_makes_the_final_programs_say_more_of_their_cells(dataset, tmp_path):
    config = tiny_config(tmp_path, codec_max_steps=200, decoder_steps=100)
    codec, _ = fit_programs(config, dataset, 8, CPU, deadline=np.inf)
    programs = encode_cells(dataset, codec)[:, :-1]
    encoder = [parameter.clone() for parameter in codec.encoder.parameters()]
    before = negative_log_likelihood(dataset, codec, programs)
    refit_decoder(config, dataset, codec, programs)
    assert negative_log_likelihood(dataset, codec, programs) < 0.99 * before
    assert all(torch.equal(old, new) for old, new in zip(encoder, codec.encoder.parameters()))


def test_programs_are_read_along_axes_that_change_no_cell(dataset, tmp_path):
    """Only how it is described: uncorrelated, ordered programs that raise few genes by much."""
    config = tiny_config(tmp_path, codec_max_steps=200, decoder_steps=20)
    codec, _ = fit_programs(config, dataset, 6, CPU, deadline=np.inf)
    cells = dataset.cells(slice(None))
    with torch.no_grad():
        codec.standardize_latents(codec.encode(*cells))
        latents = codec.encode(*cells)
        log_rates = latents[:, :-1] @ codec.loadings.T
        before = codec.decode(latents).mean()
        find_program_axes(codec, latents[:, :-1])
        assert torch.equal(codec.encode(*cells), latents) and torch.equal(codec.decode(latents).mean(), before)
    activities = codec.activities(latents)
    torch.testing.assert_close(activities @ codec.loadings.T, log_rates, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(activities.T.cov(), torch.eye(6), atol=0.02, rtol=0)
    explained = codec.weighted_loadings.square().sum(0)
    assert (explained.diff() < 1e-4).all()
    skewness = activities.pow(3).mean(0)
    points = torch.where(skewness.abs() > 0.75, skewness, codec.weighted_loadings.pow(3).sum(0))
    assert (points > 0).all() and (skewness > 0.75).any()  # some programs are a few cells'


def test_independent_programs_are_found(dataset):
    """Whatever axes the fit had: of two independent programs that are mixed, each comes back alone."""
    torch.manual_seed(0)
    sources = torch.distributions.Laplace(0.0, 1.0).sample((len(dataset), 2))
    codec = ProgramCodec(100, 2, hidden_size=4)
    codec.fit_statistics(dataset.matrix, dataset.library_size)
    mixing = torch.tensor([[1.0, 0.6], [-0.4, 1.0]])
    find_program_axes(codec, sources @ mixing.T)
    small, large = (codec.program_axes @ mixing).abs().sort(dim=0).values  # of each source in both programs
    assert (small < 0.15 * large).all() and set((codec.program_axes @ mixing).abs().argmax(0).tolist()) == {0, 1}


def test_few_cells_and_flat_programs_keep_their_axes(dataset):
    codec = ProgramCodec(100, 8, hidden_size=4)
    find_program_axes(codec, torch.randn(15, 8))
    find_program_axes(codec, torch.randn(len(dataset), 8) * torch.arange(8))  # the first is always 0
    assert torch.equal(codec.program_axes, torch.eye(8))


def test_a_gene_that_fills_few_cells_keeps_its_mean_and_stays_out_of_the_others(pbmc, tmp_path):
    """As haemoglobin does: much in a few red blood cells, and a molecule in some of the others."""
    rng, cells = np.random.default_rng(0), pbmc.copy()
    counts, library_size = cells.X.toarray(), np.asarray(cells.X.sum(axis=1)).ravel()
    filled = rng.choice(cells.n_obs, 14, replace=False)
    counts[:, 0] = rng.poisson(0.03, cells.n_obs)
    counts[filled, 0] = rng.poisson(0.5 * library_size[filled])
    cells.X = sparse.csr_matrix(counts)
    processor = ScRNAProcessor(label_keys=["cell_type"], num_genes=100).fit(cells)
    dataset = CellDataset(cells, processor)
    codec = fit_program_codec(tiny_config(tmp_path, codec_max_steps=200, decoder_steps=100), dataset, CPU)
    latents = encode_cells(dataset, codec)
    with torch.no_grad():
        decoded = codec.decode(latents, torch.from_numpy(dataset.library_size).float(), dataset.class_labels)
        means = decoded.mean().mean(0).numpy()
        drawn = decoded.icdf(torch.rand(latents.shape[0], decoded.num_values, dtype=torch.double)).numpy()
    real = dataset.matrix.toarray()
    np.testing.assert_allclose(means, real.mean(0), rtol=0.1)
    gene = list(processor.var_names).index(cells.var_names[0])
    assert abs((drawn[:, gene] > 0).mean() - (real[:, gene] > 0).mean()) < 0.03


def test_labels_get_effects_in_the_second_fit_and_a_prior_holds_them(dataset, tmp_path):
    """Cells of a label are then described better; the more precise the prior, the smaller the effects."""
    config = tiny_config(tmp_path, decoder_steps=0)
    codec = fit_program_codec(config, dataset, CPU)
    assert codec.config.condition_sizes == dataset.condition_sizes
    assert not codec.label_effects["log_rates"].weight.any()
    programs = encode_cells(dataset, codec)[:, :8] * codec.latents_std[:8] + codec.latents_mean[:8]
    sizes, losses = [], []
    for precision in (1.0, 100.0, 1e7):
        fitted = copy.deepcopy(codec)
        config = tiny_config(tmp_path, decoder_steps=150, label_prior_precision=precision)
        refit_decoder(config, dataset, fitted, programs)
        sizes.append(fitted.label_effects["log_rates"].weight.std().item())
        with torch.no_grad():
            losses.append(fitted.decoder_loss(programs, *dataset.cells(slice(None)), dataset.class_labels).mean())
    assert sizes[0] > 1.5 * sizes[1] > 15 * sizes[2] and losses[0] < losses[1] < losses[2]


def test_a_diverged_fit_is_refused(dataset, tmp_path):
    config = tiny_config(tmp_path)
    config.codec_learning_rate = 1e30  # above what a configuration lets pass
    with pytest.raises(ValueError, match="Gene programs.*Lower --codec_learning_rate"):
        fit_programs(config, dataset, 8, CPU)


@pytest.mark.parametrize("decoder_steps", [0, ENDLESS])
def test_stage_one_ends_at_its_deadline(decoder_steps, dataset, tmp_path, never_enough):
    config = tiny_config(tmp_path, codec_max_steps=ENDLESS, decoder_steps=decoder_steps)
    start = time.monotonic()
    fit_program_codec(config, dataset, CPU, deadline=start + 1)
    assert 1 <= time.monotonic() - start < 20


def test_the_decoder_s_learning_rate_falls_with_its_time(dataset, tmp_path, monkeypatch, caplog):
    """Along the cosine to its end, for any number of steps."""
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    config = tiny_config(tmp_path, decoder_steps=10_000_000)
    codec, _ = fit_programs(tiny_config(tmp_path, codec_max_steps=1), dataset, 4, CPU)
    programs = encode_cells(dataset, codec)[:, :4]
    rates.clear()
    refit_decoder(config, dataset, codec, programs, deadline=time.monotonic() + 1)
    assert rates[0] == pytest.approx(3e-3, rel=1e-3) and all(np.diff(rates) <= 0) and rates[-1] < 1e-3
    assert "of 10000000 steps. Raise --max_train_minutes" in caplog.text
    rates.clear()
    refit_decoder(tiny_config(tmp_path, decoder_steps=4), dataset, codec, programs)
    np.testing.assert_allclose(rates, 3e-3 * (1 + np.cos(np.pi * np.arange(4) / 4)) / 2)


def test_patience_ends_a_fit_that_does_not_improve(dataset, tmp_path, caplog, never_enough, monkeypatch):
    monkeypatch.setattr(module, "DISPERSION_LEARNING_RATE", 1e-12)
    monkeypatch.setattr(module, "PATIENCE", 150)
    frozen = {"codec_learning_rate": 1e-12, "program_prior_precision": 0}
    config = tiny_config(tmp_path, **frozen, codec_max_steps=ENDLESS)
    with caplog.at_level("INFO"):
        fit_programs(config, dataset, 4, CPU, deadline=time.monotonic() + 200)
    # The first of 630 training cells' losses, one every 63 steps, is the best, and two later ones are within patience.
    assert f"{4 * 63} steps" in caplog.text
