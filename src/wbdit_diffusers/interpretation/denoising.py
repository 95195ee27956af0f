"""Measurements of denoising: explained variance of programs, and stability of the type."""

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from sklearn.linear_model import LogisticRegression
from torch import nn

from ..pipelines import ScRNAGenerationPipeline
from ..sampling import CellNoise, denoise, signal_and_noise, to_clean


TIMESTEPS = list(range(99, 1000, 100))
RENOISING_STEPS = 50  # of DDIM, from pure noise


def add_noise(latents: torch.Tensor, timestep: int, scheduler: SchedulerMixin, seed: int) -> torch.Tensor:
    """Latents with noise up to a timestep."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    a, s = signal_and_noise(scheduler, timestep, latents)
    return a * latents + s * noise


@torch.no_grad()
def measure_explained_variance(
    denoisers: dict[str, nn.Module],
    pipe: ScRNAGenerationPipeline,
    latents: torch.Tensor,
    class_labels: torch.Tensor | None,
    seed: int = 0,
) -> list[dict]:
    """The fraction of each program's variance that each denoiser predicts, by timestep. At pure noise it is 0."""

    def guess(denoiser: nn.Module, noisy: torch.Tensor, timestep: int) -> torch.Tensor:
        """The programs that a denoiser expects in clean cells, `(cells, programs)`."""
        output = denoiser(noisy, timestep, class_labels, return_dict=False)[0]
        return pipe.codec.activities(to_clean(output, noisy, timestep, pipe.scheduler))

    truth, last = pipe.codec.activities(latents), pipe.scheduler.config.num_train_timesteps - 1
    prior = guess(denoisers["closed_form"], torch.zeros_like(latents), last)
    scale = (truth - prior).square().mean(0)  # (programs,)
    rows = []
    for timestep in TIMESTEPS:
        noisy = add_noise(latents, timestep, pipe.scheduler, seed)
        guesses = {name: guess(denoiser, noisy, timestep) for name, denoiser in denoisers.items()}
        explained = {name: 1 - (truth - own).square().mean(0) / scale for name, own in guesses.items()}
        network, closed_form = guesses["network"], guesses["closed_form"]
        difference = (network - closed_form).square().sum() / (network - prior).square().sum()
        row = {"timestep": timestep, **{name: values.tolist() for name, values in explained.items()}}
        row |= {f"{name}_mean": values.mean().item() for name, values in explained.items()}
        rows.append(row | {"agreement": 1 - difference.item()})
    return rows


@torch.no_grad()
def renoise(
    denoiser: nn.Module, scheduler: SchedulerMixin, latents: torch.Tensor, timestep: int, seed: int
) -> torch.Tensor:
    """Adds noise to latents up to a timestep, and denoises them by DDIM without labels."""
    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(RENOISING_STEPS)
    noisy = add_noise(latents, timestep, scheduler, seed)
    cell_noise = CellNoise(torch.Generator().manual_seed(seed)).batch(0, len(latents))
    timesteps = ddim.timesteps[ddim.timesteps <= timestep]
    return denoise(lambda x, t: denoiser(x, t, return_dict=False)[0], ddim, cell_noise, noisy, timesteps)


def measure_type_stability(
    denoisers: dict[str, nn.Module],
    pipe: ScRNAGenerationPipeline,
    latents: torch.Tensor,
    train_latents: torch.Tensor,
    train_types: np.ndarray,
    seed: int = 0,
) -> list[dict]:
    """Which cells change their type, and the correlation of each program, if noise is added and removed again."""
    before = pipe.codec.activities(latents).cpu().numpy()
    has_types = len(np.unique(train_types)) > 1
    if has_types:
        classifier = LogisticRegression(max_iter=2000).fit(train_latents.cpu().numpy(), train_types)
        types = classifier.predict(latents.cpu().numpy())
        chance = float((types != np.random.default_rng(seed).permutation(types)).mean())
    rows = []
    for timestep in TIMESTEPS:
        for name, denoiser in denoisers.items():
            again = renoise(denoiser, pipe.scheduler, latents, timestep, seed)
            after = pipe.codec.activities(again).cpu().numpy()
            correlation = [float(np.corrcoef(*pair)[0, 1]) for pair in zip(before.T, after.T)]
            row = {"timestep": timestep, "denoiser": name, "correlation": correlation}
            row["correlation_mean"] = float(np.mean(correlation))
            if has_types:
                row |= {"changed": float((classifier.predict(again.cpu().numpy()) != types).mean()), "chance": chance}
            rows.append(row)
    return rows
