"""The reverse process of one batch of cells, for any pipeline that denoises them."""

import inspect
from collections.abc import Callable

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .noise import NoiseBatch


def denoise(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    scheduler: SchedulerMixin,
    noise: NoiseBatch,
    num_features: int,
    num_inference_steps: int,
    device: torch.device,
    dtype: torch.dtype,
    latents: torch.Tensor | None = None,
    on_step_end: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    Takes one batch through the reverse process.

    Args:
        predict (`Callable`): `predict(latents, timestep)`, what the scheduler's `prediction_type` says.
        scheduler ([`SchedulerMixin`]): Any of Diffusers'.
        noise ([`NoiseBatch`]): The batch's random numbers.
        num_features (`int`): Values per cell.
        num_inference_steps (`int`): Denoising steps.
        device (`torch.device`): Where the latents are.
        dtype (`torch.dtype`): Their type.
        latents (`torch.Tensor` of shape `(cells, num_features)`, *optional*): The initial noise, instead of drawn one.
        on_step_end (`Callable`, *optional*):
            `on_step_end(step, timestep, latents)` returns the latents to go on with.

    Returns:
        `torch.Tensor` of shape `(cells, num_features)`.
    """
    scheduler.set_timesteps(num_inference_steps, device=device)  # multistep solvers remember the last batch
    accepts_generator = "generator" in inspect.signature(scheduler.step).parameters
    step_kwargs = {"generator": noise.generators} if accepts_generator else {}

    # The scheduler works on whole blocks, for which it draws its noise; the denoiser on the batch's own cells.
    blocks = noise.normal(num_features, device, dtype)  # (blocks, cells per block, num_features)
    if latents is not None:
        blocks = noise.put(blocks, latents)
    blocks = blocks * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        model_output = predict(noise.take(scheduler.scale_model_input(blocks, t)), t)  # (cells, num_features)
        model_output = noise.put(torch.zeros_like(blocks), model_output)
        blocks = scheduler.step(model_output, t, blocks, **step_kwargs, return_dict=False)[0].to(dtype)
        if on_step_end is not None:
            blocks = noise.put(blocks, on_step_end(i, t, noise.take(blocks)))
    return noise.take(blocks)
