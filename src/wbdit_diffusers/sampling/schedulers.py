"""The noise schedule of training, solvers of the reverse process, and conversions between what networks predict."""

from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin


SCHEDULERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}

# Steps of equal size in the log of the noise. Equal steps in time leave few for the end, where cells of one type get
# their spread (lab/experiments.md).
OPTIONS = {
    "dpmsolver++": {"use_exponential_sigmas": True, "solver_order": 2},
    "unipc": {"use_exponential_sigmas": True, "solver_order": 3},
}


def make_scheduler(name: str, config: dict) -> SchedulerMixin:
    """
    A solver by its name in `SCHEDULERS`, with the noise schedule of another scheduler, as `pipe.scheduler.config`, and
    our `OPTIONS`. In 12 steps, this UniPC is as near to the exact solution as DPM-Solver++ in 20.
    """
    return SCHEDULERS[name].from_config(config, **OPTIONS.get(name, {}))


def training_scheduler(prediction_type: str) -> DDPMScheduler:
    """
    The noise schedule of arXiv 2411.06785: 1,000 steps, β linear from 1e-4 to 0.02.

    Samples are never clipped, since expression is not an image in [-1, 1]. Spacing "trailing" makes the first step of
    any solver start at pure noise, regardless of the number of steps.
    """
    return DDPMScheduler(prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing")


def signal_and_noise(
    schedule: Any, timestep: torch.Tensor | float | int, latents: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The scales `a = sqrt(ᾱ_t)` and `s = sqrt(1 - ᾱ_t)` of `noisy = a · clean + s · noise`, for timesteps `(cells,)` or
    one for all cells: `(cells or 1, 1)` each, in float32. `schedule` is a scheduler, or a denoiser that stores `ᾱ`.
    """
    timestep = torch.as_tensor(timestep, device=latents.device).reshape(-1).long()
    alphas_cumprod = schedule.alphas_cumprod.to(latents.device)[timestep].float()[:, None]
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def to_clean(
    model_output: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor | float | int, scheduler: SchedulerMixin
) -> torch.Tensor:
    """The clean latents that a prediction stands for: `a x - s v`, `(x - s ε) / a`, or the prediction itself."""
    a, s = signal_and_noise(scheduler, timestep, noisy)
    return {
        "v_prediction": lambda: a * noisy - s * model_output,
        "epsilon": lambda: (noisy - s * model_output) / a,
        "sample": lambda: model_output,
    }[scheduler.config.prediction_type]()


def from_clean(
    clean: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor | float | int, scheduler: SchedulerMixin
) -> torch.Tensor:
    """The prediction that stands for clean latents, the inverse of [`to_clean`]."""
    a, s = signal_and_noise(scheduler, timestep, noisy)
    return {
        "v_prediction": lambda: (a * noisy - clean) / s,
        "epsilon": lambda: (noisy - a * clean) / s,
        "sample": lambda: clean,
    }[scheduler.config.prediction_type]()
