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
    latents: torch.Tensor | None = None,
    on_step_end: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    Takes one batch through the reverse process. Latents are float32 throughout, whatever the network computes in: in
    half precision many small steps would be rounded away.

    Args:
        predict (`Callable`): `predict(latents, timestep)`, what the scheduler's `prediction_type` says.
        scheduler ([`SchedulerMixin`]): Any of Diffusers'.
        noise ([`NoiseBatch`]): The batch's random numbers.
        num_features (`int`): Values per cell.
        num_inference_steps (`int`): Denoising steps.
        device (`torch.device`): Where the latents are.
        latents (`torch.Tensor` of shape `(cells, num_features)`, *optional*): The initial noise, instead of drawn one.
        on_step_end (`Callable`, *optional*):
            `on_step_end(step, timestep, latents)` returns the latents to go on with.

    Returns:
        `torch.Tensor` of shape `(cells, num_features)`.

    Raises:
        ValueError: If a latent is not finite; the message names the step and what made it so.
    """
    scheduler.set_timesteps(num_inference_steps, device=device)  # multistep solvers remember the last batch
    accepts_generator = "generator" in inspect.signature(scheduler.step).parameters
    step_kwargs = {"generator": noise.generators} if accepts_generator else {}

    # The scheduler works on whole blocks, for which it draws its noise; the denoiser on the batch's own cells.
    blocks = noise.normal(num_features, device)  # (blocks, cells per block, num_features)
    if latents is not None:
        blocks = noise.put(blocks, latents)
    blocks = blocks * scheduler.init_noise_sigma
    finite: dict[str, list[torch.Tensor]] = {"denoiser": [], "scheduler": [], "callback_on_step_end": []}
    for i, t in enumerate(scheduler.timesteps):
        model_output = predict(noise.take(scheduler.scale_model_input(blocks, t)), t)  # (cells, num_features)
        finite["denoiser"].append(torch.isfinite(model_output).all())
        model_output = noise.put(torch.zeros_like(blocks), model_output)
        blocks = scheduler.step(model_output, t, blocks, **step_kwargs, return_dict=False)[0]
        cells = noise.take(blocks)
        finite["scheduler"].append(torch.isfinite(cells).all())
        if on_step_end is not None:
            cells = on_step_end(i, t, cells)
            finite["callback_on_step_end"].append(torch.isfinite(cells).all())
            blocks = noise.put(blocks, cells)
    _check_finite(finite, scheduler)
    return noise.take(blocks)


def _check_finite(finite: dict[str, list[torch.Tensor]], scheduler: SchedulerMixin):
    """Raises on the first step whose numbers are not finite. Looked at once at the end: a GPU waits for each look."""
    wrong = {source: (~torch.stack(steps)).nonzero() for source, steps in finite.items() if steps}
    failures = [(int(steps[0]), order, source) for order, (source, steps) in enumerate(wrong.items()) if len(steps)]
    if failures:
        step, _, source = min(failures)
        mend = {
            "denoiser": "lower `guidance_scale`, take float32 instead of half precision, or train the model anew",
            "scheduler": "take another number of steps or another scheduler",
            "callback_on_step_end": "return finite latents",
        }[source]
        raise ValueError(
            f"Step {step + 1} of {len(scheduler.timesteps)} (timestep {scheduler.timesteps[step]:g},"
            f" {type(scheduler).__name__}) gave NaN or infinite latents, and it was the {source}: {mend}."
        )
