"""Conditions of a batch, classifier-free guidance, and guides that move the clean estimate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .schedulers import from_clean, to_clean


@dataclass
class Conditions:
    """
    The conditions of a batch. A batch has many cells and few combinations of labels, so each combination is stored,
    and its modulation computed, once.

    Args:
        kwargs (`dict[str, torch.Tensor]`):
            Keyword arguments of the denoiser, such as `class_labels` `(combinations, num_label_keys)`. The last row is
            the null condition. Empty for an unconditional model.
        index (`torch.LongTensor` of shape `(cells,)`): The row of each cell.
    """

    kwargs: dict[str, torch.Tensor]
    index: torch.Tensor

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

    Args:
        denoiser ([`WhiteBoxDiTModel`]): The network.
        scheduler ([`SchedulerMixin`]): Converts between prediction and clean estimate where there are guides.
        latents (`torch.Tensor` of shape `(cells, num_features)`): Noisy latents.
        timestep (`torch.Tensor`): One timestep for all cells.
        conditions ([`Conditions`]): Conditions of the cells.
        guidance_scale (`float`, defaults to 1.0): Strength of the guidance. 1.0 means none, and halves the cost.
        guides (`Sequence[Guide]`, defaults to `()`): Applied in order.

    Returns:
        `torch.Tensor` of shape `(cells, num_features)`.
    """
    inputs, kwargs, index = latents.to(denoiser.dtype), conditions.kwargs, conditions.index
    if not kwargs:
        output = denoiser(inputs, timestep, return_dict=False)[0]
    elif guidance_scale == 1.0:
        kwargs = {name: rows[:-1] for name, rows in kwargs.items()}
        output = denoiser(inputs, timestep, **kwargs, label_index=index, return_dict=False)[0]
    else:
        null = torch.full_like(index, len(next(iter(kwargs.values()))) - 1)
        both = denoiser(
            torch.cat([inputs] * 2), timestep, **kwargs, label_index=torch.cat([null, index]), return_dict=False
        )[0]
        unconditional, conditional = both.chunk(2)
        output = unconditional + guidance_scale * (conditional - unconditional)
    if guides:
        clean = to_clean(output, latents, timestep, scheduler)
        for guide in guides:
            clean = guide(clean, latents, timestep, conditions)
        output = from_clean(clean, latents, timestep, scheduler)
    return output
