"""Conditions of a batch, classifier-free guidance, and guides that move the clean estimate."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .schedulers import from_clean, to_clean


@dataclass
class Conditions:
    """
    The conditions of a batch. A batch has many cells and few combinations of labels, so each combination is stored,
    and its modulation computed, once. The last row is the null condition. An unconditional model has none.
    """

    kwargs: dict[str, torch.Tensor]  # of the denoiser, such as `class_labels` (combinations, num_label_keys)
    index: torch.Tensor  # the row of each cell, (cells,)

    @classmethod
    def from_class_labels(
        cls, class_labels: torch.Tensor, condition_sizes: Sequence[int], device: torch.device
    ) -> "Conditions":
        """From the codes of each cell `(cells, num_label_keys)` and the number of categories of each label key."""
        if not condition_sizes:
            return cls({}, torch.zeros(len(class_labels), dtype=torch.long, device=device))
        combinations, index = class_labels.to(device).unique(dim=0, return_inverse=True)
        null_label = torch.tensor([list(condition_sizes)], device=device)  # one past the last category
        return cls({"class_labels": torch.cat([combinations, null_label])}, index)

    @property
    def class_labels(self) -> torch.Tensor | None:
        """The codes of each cell `(cells, num_label_keys)`, or `None` for an unconditional model."""
        return self.kwargs["class_labels"][self.index] if "class_labels" in self.kwargs else None


# `guide(clean, noisy, timestep, conditions)` returns a better estimate of the clean latents `(cells, num_features)`.
Guide = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Conditions], torch.Tensor]


def predict(
    denoiser: torch.nn.Module,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    conditions: Conditions,
    guidance_scale: float = 1.0,
    guides: Sequence[Guide] = (),
) -> torch.Tensor:
    """
    The denoiser's prediction with classifier-free guidance (arXiv 2207.12598, equation 6 in the form of Diffusers):
    `unconditional + guidance_scale * (conditional - unconditional)`. Guides then move the clean estimate.

    `latents` and the result are `(cells, num_features)`. All cells have one timestep. A scale of 1 means no guidance,
    and halves the cost.
    """
    inputs, kwargs, index = latents.to(denoiser.dtype), conditions.kwargs, conditions.index
    is_guided = bool(kwargs) and guidance_scale != 1.0
    if is_guided:
        null = torch.full_like(index, len(next(iter(kwargs.values()))) - 1)
        inputs, index = torch.cat([inputs] * 2), torch.cat([null, index])
    else:
        kwargs = {name: rows[:-1] for name, rows in kwargs.items()}
    if kwargs and "label_index" in inspect.signature(denoiser.forward).parameters:
        kwargs = {**kwargs, "label_index": index}
    else:  # a user's denoiser
        kwargs = {name: rows[index] for name, rows in kwargs.items()}
    output = denoiser(inputs, timestep, **kwargs, return_dict=False)[0]
    if is_guided:
        unconditional, conditional = output.chunk(2)
        output = unconditional + guidance_scale * (conditional - unconditional)
    if guides:
        clean = to_clean(output, latents, timestep, scheduler)
        for guide in guides:
            clean = guide(clean, latents, timestep, conditions)
        output = from_clean(clean, latents, timestep, scheduler)
    return output
