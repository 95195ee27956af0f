import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    UniPCMultistepScheduler,
)

from wbdit_diffusers.sampling import CellNoise, denoise, make_scheduler, signal_and_noise, training_scheduler


ANY_SCHEDULER = [
    DDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    EulerAncestralDiscreteScheduler,
]
CPU = torch.device("cpu")

# A Gaussian whose denoiser is known exactly
MEAN = torch.tensor([2.0, -1.0, 0.0, 0.5])
FACTOR = torch.tensor([[1.0, 0.3, 0, 0], [0, 0.8, -0.4, 0], [0, 0, 0.5, 0.2], [0, 0, 0, 0.3]])
COVARIANCE = FACTOR @ FACTOR.T


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stochastic_scheduler(scheduler_class, prediction_type="v_prediction"):
    kwargs = {"algorithm_type": "sde-dpmsolver++"} if scheduler_class is DPMSolverMultistepScheduler else {}
    return scheduler_class.from_config(training_scheduler(prediction_type).config, **kwargs)


def exact_denoiser(prediction_type: str):
    """The prediction of least squared error for cells of the Gaussian above."""
    alphas_cumprod = training_scheduler(prediction_type).alphas_cumprod

    def predict(latents, timestep):
        signal, noise = alphas_cumprod[int(timestep)].sqrt(), (1 - alphas_cumprod[int(timestep)]).sqrt()
        covariance = signal**2 * COVARIANCE + noise**2 * torch.eye(4)  # of the noisy cells
        sample = MEAN + (latents - signal * MEAN) @ torch.linalg.solve(covariance, signal * COVARIANCE)
        epsilon = (latents - signal * sample) / noise
        return {"sample": sample, "epsilon": epsilon, "v_prediction": signal * epsilon - noise * sample}[
            prediction_type
        ]

    return predict


def sample(scheduler, generator, num_cells=150, batch_size=None, num_inference_steps=5, latents=None, **kwargs):
    """Cells of the Gaussian, batch by batch."""
    noise, batch_size = CellNoise(generator), batch_size or num_cells
    predict, batches = exact_denoiser(scheduler.config.prediction_type), []
    for start in range(0, num_cells, batch_size):
        batch = noise.batch(start, min(start + batch_size, num_cells))
        scheduler.set_timesteps(num_inference_steps)
        initial = batch.normal(4, CPU) if latents is None else latents
        initial = initial * scheduler.init_noise_sigma
        batches.append(denoise(predict, scheduler, batch, initial, scheduler.timesteps, **kwargs))
    return torch.cat(batches)


# ==================== What is sampled ====================


@pytest.mark.parametrize(
    "solver, num_inference_steps, prediction_type",
    [
        ("ddpm", 1000, "v_prediction"),
        ("dpmsolver++", 50, "v_prediction"),
        ("dpmsolver++", 50, "epsilon"),
        ("dpmsolver++", 50, "sample"),
        ("unipc", 50, "v_prediction"),
    ],
)
def test_an_exact_denoiser_gives_the_data_s_distribution(solver, num_inference_steps, prediction_type):
    scheduler = make_scheduler(solver, training_scheduler(prediction_type).config)
    cells = sample(scheduler, seeded(), num_cells=2048, num_inference_steps=num_inference_steps)
    std = COVARIANCE.diagonal().sqrt()
    assert ((cells.mean(0) - MEAN) / std).abs().max() < 0.07
    assert ((cells.T.cov() - COVARIANCE) / (std[:, None] * std)).abs().max() < 0.07


@pytest.mark.parametrize("scheduler_class", ANY_SCHEDULER)
def test_reverse_process_is_the_scheduler_s_own(scheduler_class):
    """Against the loop written out for a block of 64 cells, with one generator."""
    cells = sample(stochastic_scheduler(scheduler_class), seeded(), num_cells=64)
    scheduler, predict = stochastic_scheduler(scheduler_class), exact_denoiser("v_prediction")
    generator = seeded(torch.randint(2**62, (1,), generator=seeded()).item())
    scheduler.set_timesteps(5)
    latents = torch.randn(1, 64, 4, generator=generator) * scheduler.init_noise_sigma
    kwargs = {} if scheduler_class is UniPCMultistepScheduler else {"generator": generator}
    for t in scheduler.timesteps:
        output = predict(scheduler.scale_model_input(latents, t)[0], t)[None]
        latents = scheduler.step(output, t, latents, **kwargs).prev_sample
    torch.testing.assert_close(cells, latents[0])


def test_on_step_end_replaces_the_latents():
    scheduler, calls = stochastic_scheduler(DDPMScheduler), []

    def on_step_end(step, timestep, latents):
        calls.append((step, int(timestep), tuple(latents.shape)))
        return latents if step < 4 else torch.full_like(latents, 3.0)

    cells = sample(scheduler, seeded(), num_cells=70, on_step_end=on_step_end)
    assert calls == [(step, timestep, (70, 4)) for step, timestep in enumerate(scheduler.timesteps.tolist())]
    assert (cells == 3).all()


def test_gradients_flow_through_the_loop():
    latents = torch.randn(5, 4, generator=seeded()).requires_grad_()
    sample(stochastic_scheduler(DDIMScheduler), seeded(), num_cells=5, latents=latents).sum().backward()
    assert torch.isfinite(latents.grad).all() and (latents.grad != 0).all()


@pytest.mark.parametrize("solver, steps", [("ddpm", 1000), ("ddim", 200), ("dpmsolver++", 50), ("unipc", 50)])
def test_denoising_starts_in_the_middle(solver, steps):
    """Cells of the Gaussian with noise up to a quarter of the timesteps become cells of the Gaussian again."""
    scheduler = make_scheduler(solver, training_scheduler("v_prediction").config)
    noise = CellNoise(seeded()).batch(0, 2048)
    clean = MEAN + noise.normal(4, CPU) @ FACTOR.T
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[3 * len(scheduler.timesteps) // 4 :]
    a, s = signal_and_noise(scheduler, timesteps[0], clean)
    noisy = a * clean + s * torch.randn(clean.shape, generator=seeded(1))
    cells = denoise(exact_denoiser("v_prediction"), scheduler, noise, noisy, timesteps)
    std = COVARIANCE.diagonal().sqrt()
    assert ((cells.mean(0) - MEAN) / std).abs().max() < 0.13
    assert ((cells.T.cov() - COVARIANCE) / (std[:, None] * std)).abs().max() < 0.13
    assert torch.corrcoef(torch.stack([cells[:, 0], clean[:, 0]]))[0, 1] > 0.3  # what the noise left of each cell


def test_nan_never_leaves_the_loop():
    def spoil(step, timestep, latents):
        return latents * torch.nan if step == 2 else latents

    with pytest.raises(ValueError, match="NaN or infinite latents with DDPMScheduler: lower `guidance_scale`"):
        sample(stochastic_scheduler(DDPMScheduler), seeded(), num_cells=5, on_step_end=spoil)
