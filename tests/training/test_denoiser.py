"""Stage two: learning rate, accumulation, log and validation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from tiny import column, read_log, tiny_config, weights

from wbdit_diffusers import GaussianMixtureDenoiser, ScRNAGenerationPipeline, WhiteBoxDiTModel
from wbdit_diffusers.data.latents import Latents
from wbdit_diffusers.sampling import signal_and_noise, training_scheduler
from wbdit_diffusers.training import train
from wbdit_diffusers.training.denoiser import DenoiserTraining, diffusion_loss, learning_rate, progress_of


@pytest.fixture(scope="module")
def trained(pbmc, tmp_path_factory):
    """24 steps of 8 per epoch."""
    folder = tmp_path_factory.mktemp("trained")
    train(pbmc, tiny_config(folder, label_keys=["cell_type"], max_train_steps=24, validation_steps=4))
    return folder


# ==================== The learning rate ====================


def test_learning_rate_warms_up_to_its_highest(tmp_path):
    config = tiny_config(tmp_path, learning_rate=1e-3, lr_warmup_steps=10)
    rates = [learning_rate(config, step, step / 100) for step in range(20)]
    np.testing.assert_allclose(rates[:10], 1e-3 * np.arange(1, 11) / 10)
    assert rates[10:] == [1e-3] * 10
    assert learning_rate(tiny_config(tmp_path, learning_rate=1e-3, lr_warmup_steps=0), 0, 0.0) == 1e-3


@pytest.mark.parametrize(
    "step, seconds, expected",
    [
        (700, 0, 1.0),  # 70% of the steps are over: the decay begins
        (1000, 0, 0.01),  # never zero, or the last step would do nothing
        (5, 51, 0.5),  # by the clock, which is further
        (5, 90, 0.01),  # over time
        (850, 42, 0.5),  # what is further decides
    ],
)
def test_learning_rate_decays_by_steps_or_by_minutes(step, seconds, expected, tmp_path):
    config = tiny_config(tmp_path, learning_rate=1.0, max_train_minutes=1, lr_warmup_steps=5, lr_decay_fraction=0.3)
    assert learning_rate(config, step, progress_of(config, 1000, step, seconds)) == pytest.approx(expected)
    config.max_train_minutes = None
    assert progress_of(config, 1000, step, 1e9) == step / 1000


# ==================== The network ====================


def test_two_latents_are_a_token(pbmc, tmp_path):
    config = tiny_config(tmp_path, num_programs=8, patch_size=None, codec_max_steps=5, max_train_steps=1)
    denoiser = train(pbmc, config).denoiser
    assert (denoiser.config.patch_size, denoiser.num_tokens, denoiser.config.block_type) == (2, 5, "descent")


# ==================== The log ====================


def test_losses_are_logged_and_fall(trained):
    rows = read_log(trained)
    assert [int(row["step"]) for row in rows] == [4, 8, 12, 16, 20, 24]
    assert [int(row["epoch"]) for row in rows] == [0, 0, 1, 1, 2, 2]
    seconds = column(trained, "seconds")
    assert seconds == sorted(seconds) and seconds[0] > 0
    losses, validation_losses = column(trained, "loss"), column(trained, "validation_loss")
    assert np.isfinite(losses).all() and np.isfinite(validation_losses).all()
    assert validation_losses[-1] < validation_losses[0]


def test_a_training_ends_when_its_time_is_over(pbmc, tmp_path):
    config = tiny_config(tmp_path, codec="expression", max_train_steps=1_000_000, max_train_minutes=0.02)
    train(pbmc, config)
    last = read_log(tmp_path)[-1]
    assert 1.2 <= float(last["seconds"]) < 60 and 0 < int(last["step"]) < 1_000_000
    assert float(last["learning_rate"]) < 2e-3  # it fell with the time


def test_few_cells_are_not_passed_over_without_end(pbmc, tmp_path, caplog):
    cells = pbmc[:60]  # 48 to train on: one batch, as it is no larger than the data
    with caplog.at_level("INFO"):
        train(cells, tiny_config(tmp_path, codec="expression", max_train_steps=100, max_train_epochs=6))
    last = read_log(tmp_path)[-1]
    assert (int(last["step"]), int(last["epoch"])) == (6, 6)
    assert float(last["learning_rate"]) < 2e-3  # it fell with the passes
    assert "6 passes over the training cells end after 6 steps, before --max_train_steps 100" in caplog.text


# ==================== Gradients ====================


def test_accumulated_gradients_are_those_of_one_larger_batch(pbmc, tmp_path, monkeypatch):
    # The noise depends on the number of the batch, so here the loss has none
    def loss_without_noise(model, noise_scheduler, batch, *_):
        latents = batch["latents"]
        return F.mse_loss(model(latents, 500, return_dict=False)[0], latents.roll(1, 1))

    monkeypatch.setattr("wbdit_diffusers.training.denoiser.diffusion_loss", loss_without_noise)
    for name, batch_size, accumulation in (("large", 64, 1), ("small", 16, 4)):
        changes = {"train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        train(pbmc, tiny_config(tmp_path / name, codec="expression", max_train_steps=6, validation_steps=1, **changes))
    large, small = weights(tmp_path / "large"), weights(tmp_path / "small")
    for name in large:
        torch.testing.assert_close(small[name], large[name], atol=1e-5, rtol=1e-4, msg=name)
    np.testing.assert_allclose(column(tmp_path / "small", "loss"), column(tmp_path / "large", "loss"), rtol=1e-4)
    assert large["proj_out.weight"].abs().max() > 1e-3  # it starts at zero


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_loss_of_a_perfect_prediction_is_zero(prediction_type):
    latents = torch.randn(32, 5, generator=torch.Generator().manual_seed(1))
    scheduler = training_scheduler(prediction_type)

    def perfect(noisy_latents, timesteps, class_labels, return_dict):
        assert class_labels is None and timesteps.min() >= 1
        alpha = scheduler.alphas_cumprod[timesteps][:, None]
        noise = (noisy_latents - alpha.sqrt() * latents) / (1 - alpha).sqrt()
        answers = {"epsilon": noise, "sample": latents}
        answers["v_prediction"] = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        return (answers[prediction_type],)

    batch = {"latents": latents, "class_labels": torch.zeros(32, 0, dtype=torch.long)}
    assert diffusion_loss(perfect, scheduler, batch, torch.Generator().manual_seed(0)) < 1e-5


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_mixture_s_share_of_the_target(prediction_type):
    latents = torch.randn(300, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.5, 1.0, 2.0])
    labels = torch.arange(300)[:, None] % 2
    mixture = GaussianMixtureDenoiser.fit(latents, labels, (2,), training_scheduler("v_prediction"))
    scheduler = training_scheduler(prediction_type)
    batch = {"latents": latents, "class_labels": labels}

    def closed_form(noisy_latents, timesteps, class_labels, return_dict):
        a, s = signal_and_noise(scheduler, timesteps, noisy_latents)
        velocity = mixture(noisy_latents, timesteps, class_labels).sample
        answers = {"epsilon": s * noisy_latents + a * velocity, "v_prediction": velocity}
        return (answers.get(prediction_type, a * noisy_latents - s * velocity),)

    def loss(share: float) -> float:
        generator = torch.Generator().manual_seed(0)
        return diffusion_loss(closed_form, scheduler, batch, generator, mixture, share).item()

    of_cells = diffusion_loss(closed_form, scheduler, batch, torch.Generator().manual_seed(0)).item()
    assert loss(1.0) < 1e-9 < of_cells
    assert loss(0.3) == pytest.approx(0.7**2 * of_cells, rel=1e-4)
    assert loss(0.0) == pytest.approx(of_cells, rel=1e-4)


def test_a_network_learns_faster_from_the_mixture(pbmc, tmp_path):
    """By the loss of held-out cells, in which the mixture has no share."""
    losses = {}
    for share in (0.0, 0.3):
        config = tiny_config(tmp_path / str(share), mixture_share=share, max_train_steps=100, validation_steps=100)
        train(pbmc, config)
        losses[share] = column(tmp_path / str(share), "validation_loss")[-1]
    assert losses[0.3] < losses[0.0]


def test_ema_is_an_average_and_without_it_the_last_weights(pbmc, tmp_path):
    changes = {"codec": "expression", "max_train_steps": 6, "checkpointing_steps": 6}
    averaged = train(pbmc, tiny_config(tmp_path / "ema", **changes)).denoiser.state_dict()
    train(pbmc, tiny_config(tmp_path / "last", use_ema=False, **changes))
    last = load_file(tmp_path / "last" / "checkpoint-6" / "model.safetensors")
    unaveraged = weights(tmp_path / "last")
    assert unaveraged.keys() == last.keys()
    for name in last:
        torch.testing.assert_close(unaveraged[name], last[name], atol=1e-7, rtol=1e-6, msg=name)
    assert not torch.equal(averaged["proj_out.weight"], last["proj_out.weight"])
    assert averaged["proj_out.weight"].abs().max() < last["proj_out.weight"].abs().max()  # both began at zero


def test_compiled_blocks_train_the_same_denoiser(pbmc, tmp_path, monkeypatch):
    # Traced as always, but run by Python: no C++ compiler is needed, and no minutes.
    compiled, compile_blocks = [], WhiteBoxDiTModel.compile_repeated_blocks

    def compile_eagerly(model, **kwargs):
        compiled.append(kwargs)
        compile_blocks(model, backend="eager", **kwargs)

    monkeypatch.setattr(WhiteBoxDiTModel, "compile_repeated_blocks", compile_eagerly)
    for name, flag in (("plain", False), ("compiled", True)):
        train(pbmc, tiny_config(tmp_path / name, codec="expression", max_train_steps=3, compile=flag))
    assert compiled == [{"fullgraph": True}]
    plain, traced = weights(tmp_path / "plain"), weights(tmp_path / "compiled")
    assert plain.keys() == traced.keys()
    for name in plain:
        torch.testing.assert_close(traced[name], plain[name], atol=1e-5, rtol=1e-4, msg=name)


# ==================== Validation ====================


def test_the_validation_batch_is_a_random_sample(tmp_path, monkeypatch):
    """Files are often sorted by population: the first cells would be of one type."""
    monkeypatch.setattr("wbdit_diffusers.training.denoiser.VALIDATION_CELLS", 40)
    cells = Latents(torch.arange(200.0)[:, None], torch.zeros(200, 0, dtype=torch.long), ())

    def sample(seed: int) -> list[float]:
        config, accelerator = tiny_config(tmp_path, seed=seed), Accelerator(mixed_precision="no")
        training = DenoiserTraining(config, accelerator, cells, cells, 0.0)
        return training.validation_batch["latents"][:, 0].tolist()

    assert len(set(sample(0))) == 40 and max(sample(0)) > 100 and sample(0) == sample(0) != sample(1)


# ==================== Combinations that were not measured ====================


def taught_mean(folder, metric: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of an unseen combination that a network generates, and the true one."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.cartesian_prod(torch.arange(3), torch.arange(2)).repeat(100, 1)
    types, response = 2 * torch.eye(4)[:3] - 0.5, torch.tensor([0.0, 0.0, 0.0, 1.5])
    clean = types[labels[:, 0]] + response * labels[:, 1:] + 0.2 * torch.randn(len(labels), 4, generator=generator)
    kept = (labels != torch.tensor([2, 1])).any(1)
    latents = Latents(clean[kept], labels[kept], (3, 2))
    inputs = latents.values, latents.class_labels, (3, 2), training_scheduler("v_prediction")
    mixture = GaussianMixtureDenoiser.fit(*inputs, metric=metric)
    sizes = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "patch_size": 2}
    folder.mkdir()
    config = tiny_config(folder, max_train_steps=400, validation_steps=400, learning_rate=3e-3, **sizes)
    training = DenoiserTraining(config, Accelerator(cpu=True), latents, latents, 0.0, mixture)
    training.start_log()
    training.run()
    network, asked = training.averaged_model(), torch.tensor([[2, 1]])
    scheduler = DDIMScheduler.from_config(training_scheduler("v_prediction").config)
    scheduler.set_timesteps(30)
    noisy = torch.randn(500, 4, generator=generator)
    with torch.no_grad():
        for t in scheduler.timesteps:
            velocity = network(noisy, t, asked.expand(500, -1), return_dict=False)[0]
            noisy = scheduler.step(velocity, t, noisy).prev_sample
    return noisy.mean(0), types[2] + response


def test_the_network_learns_a_combination_that_no_cell_has(tmp_path):
    mean, truth = taught_mean(tmp_path / "taught", torch.eye(4))
    untaught, _ = taught_mean(tmp_path / "untaught", None)
    assert (mean - truth).norm() < 0.25 < 0.5 < (untaught - truth).norm()


def test_a_pipeline_keeps_its_closed_form(pbmc, tmp_path):
    cells = pbmc[~((pbmc.obs["cell_type"] == "Dendritic") & (pbmc.obs["phase"] == "G1"))]
    train(cells, tiny_config(tmp_path, label_keys=["cell_type", "phase"], max_train_steps=3))
    mixture = ScRNAGenerationPipeline.from_pretrained(tmp_path).gaussian_mixture
    processor = ScRNAGenerationPipeline.from_pretrained(tmp_path).processor
    unseen = processor.encode_conditions({"cell_type": "Dendritic", "phase": "G1"}, 1)[0]
    assert mixture.find_composed(unseen) is not None and mixture.composed_errors.isfinite().all()
    measured = processor.label_combinations.tolist()
    assert not [row for row in mixture.composed_labels.tolist() if row in measured]
