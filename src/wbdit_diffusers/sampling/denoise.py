"""The reverse process of one batch of cells, from any latents and along any timesteps."""

import inspect
from collections.abc import Callable, Iterable

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .noise import NoiseBatch


def denoise(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    scheduler: SchedulerMixin,
    noise: NoiseBatch,
    latents: torch.Tensor,
    timesteps: Iterable[torch.Tensor],
    on_step_end: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    Takes one batch along the reverse process. Call `scheduler.set_timesteps` before each batch, since multistep
    solvers remember the last one. Latents stay float32, as half precision would round many small steps away.

    Args:
        predict (`Callable`): `predict(latents, timestep)`, the quantity that the scheduler's `prediction_type` names.
        noise ([`NoiseBatch`]): Random numbers of the batch, for schedulers that add noise.
        latents (`torch.Tensor` of shape `(cells, num_features)`):
            Noisy latents at the first timestep: scaled Gaussian noise, or cells with noise up to that timestep.
        timesteps (`Iterable[torch.Tensor]`): All of `scheduler.timesteps`, or the last ones.
        on_step_end (`Callable`, *optional*): `on_step_end(step, timestep, latents)` returns the next latents.

    Raises a `ValueError` if a denoised latent is NaN or infinite.
    """
    accepts_generator = "generator" in inspect.signature(scheduler.step).parameters
    step_kwargs = {"generator": noise.generators} if accepts_generator else {}
    for i, t in enumerate(timesteps):
        model_output = predict(scheduler.scale_model_input(latents, t), t)  # (cells, num_features)
        # The scheduler draws its noise for whole blocks of cells.
        blocks = scheduler.step(noise.put(model_output), t, noise.put(latents), **step_kwargs, return_dict=False)[0]
        latents = noise.take(blocks)
        if on_step_end is not None:
            latents = on_step_end(i, t, latents)
    if not torch.isfinite(latents).all():
        raise ValueError(
            f"Denoising gave NaN or infinite latents with {type(scheduler).__name__}: lower `guidance_scale`, use"
            " float32, take another scheduler, or train the model again."
        )
    return latents
