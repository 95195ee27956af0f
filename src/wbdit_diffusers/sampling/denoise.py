"""The reverse process of one batch of cells, for any pipeline that denoises them."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .noise import NoiseBatch


@dataclass
class LabelBatch:
    """
    Labels of a batch as the denoiser takes them while sampling: each combination once, and an index for each cell.
    A batch has many cells and few combinations, whose modulations then are computed once.

    Args:
        combinations (`torch.LongTensor` of shape `(num_combinations, num_label_keys)`):
            Each combination once, and at the end the null label.
        index (`torch.LongTensor` of shape `(cells,)`): The combination of each cell.
    """

    combinations: torch.Tensor
    index: torch.Tensor

    @classmethod
    def from_class_labels(
        cls, class_labels: torch.Tensor, condition_sizes: tuple[int, ...], device: torch.device
    ) -> "LabelBatch | None":
        """From the codes of each cell `(cells, num_label_keys)`; `None` for an unconditional model."""
        if not condition_sizes:
            return None
        combinations, index = class_labels.to(device).unique(dim=0, return_inverse=True)
        null_label = torch.tensor([condition_sizes], device=device)  # one past the last category
        return cls(torch.cat([combinations, null_label]), index)


def predict_guided(
    denoiser: torch.nn.Module,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    labels: LabelBatch | None,
    guidance_scale: float,
) -> torch.Tensor:
    """
    The denoiser's prediction with classifier-free guidance (arXiv 2207.12598, equation 6 in the form of Diffusers):
    `unconditional + guidance_scale * (conditional - unconditional)`.

    Args:
        denoiser ([`WhiteBoxDiTModel`]): The network.
        latents (`torch.Tensor` of shape `(cells, num_features)`): Noisy latents.
        timestep (`torch.Tensor`): One for all cells.
        labels ([`LabelBatch`], *optional*): Their labels; `None` for an unconditional model.
        guidance_scale (`float`): 1.0 is no guidance, and costs half.

    Returns:
        `torch.Tensor` of shape `(cells, num_features)`.
    """
    if labels is None:
        return denoiser(latents, timestep, return_dict=False)[0]
    if guidance_scale == 1.0:
        return denoiser(latents, timestep, labels.combinations[:-1], return_dict=False, label_index=labels.index)[0]
    null = torch.full_like(labels.index, len(labels.combinations) - 1)
    index = torch.cat([null, labels.index])
    both = denoiser(torch.cat([latents] * 2), timestep, labels.combinations, return_dict=False, label_index=index)[0]
    unconditional, conditional = both.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


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
