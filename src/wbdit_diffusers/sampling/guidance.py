"""Conditions of a batch, classifier-free guidance, and guides that move the clean estimate."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .schedulers import from_clean, to_clean


@dataclass
class Conditions:
    """
    The conditions of a batch. A batch has many cells and few combinations of labels, so each combination is stored,
    and its modulation computed, once. An unconditional model has none.
    """

    kwargs: dict[str, torch.Tensor]  # of the denoiser, such as `class_labels` (combinations, num_label_keys)
    index: torch.Tensor  # the row of each cell, (cells,)
    null: dict[str, torch.Tensor] = field(default_factory=dict)  # the null condition, (1, num_label_keys)
    label_keys: Sequence[str] = ()  # of the columns

    @classmethod
    def from_class_labels(
        cls,
        class_labels: torch.Tensor,
        condition_sizes: Sequence[int],
        device: torch.device,
        label_keys: Sequence[str] = (),
        null_labels: torch.Tensor | None = None,
    ) -> "Conditions":
        """
        From the codes of each cell `(cells, num_label_keys)` and the number of categories of each label key. Labels to
        stay away from, `null_labels` `(1, num_label_keys)`, take the place of none; -1 is none.
        """
        if not condition_sizes:
            return cls({}, torch.zeros(len(class_labels), dtype=torch.long, device=device), {})
        combinations, index = class_labels.to(device).unique(dim=0, return_inverse=True)
        null_label = torch.tensor([list(condition_sizes)], device=device)  # one past the last category
        if null_labels is not None:
            null_label = torch.where(null_labels.to(device) < 0, null_label, null_labels.to(device))
        return cls({"class_labels": combinations}, index, {"class_labels": null_label}, label_keys)

    def without(self, key: str | None) -> dict[str, torch.Tensor]:
        """The rows of `kwargs` without the labels of one key, or without all conditions."""
        if key is None:
            return {name: row.expand_as(self.kwargs[name]) for name, row in self.null.items()}
        if key not in self.label_keys:
            raise ValueError(f"`guidance_scale` has {key!r}: the label keys are {list(self.label_keys)}.")
        class_labels, column = self.kwargs["class_labels"].clone(), self.label_keys.index(key)
        class_labels[:, column] = self.null["class_labels"][0, column]
        return {**self.kwargs, "class_labels": class_labels}

    @property
    def class_labels(self) -> torch.Tensor | None:
        """The codes of each cell `(cells, num_label_keys)`, or `None` for an unconditional model."""
        return self.kwargs["class_labels"][self.index] if "class_labels" in self.kwargs else None


# `guide(clean, noisy, timestep, conditions)` returns a better estimate of the clean latents `(cells, num_features)`.
Guide = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Conditions], torch.Tensor]


@dataclass
class GaussianGuide:
    """
    A guide to cells about which more is known: a Gaussian likelihood of their clean latents.

    A Gaussian mixture gives the distribution of the clean cell given the noisy one, the network its mean. The product
    with the likelihood has a closed form ([`GaussianMixtureDenoiser.given`]), and its mean is the new estimate.
    """

    gaussian_mixture: Any  # a `GaussianMixtureDenoiser`
    precision: torch.Tensor  # of the likelihood, (cells or 1, num_features, num_features)
    shift: torch.Tensor  # the precision times the likelihood's mean, (cells or 1, num_features)

    def __call__(
        self, clean: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """The new estimate, `(cells, num_features)`."""
        guided = torch.empty_like(clean)
        for i, labels in enumerate(conditions.kwargs.get("class_labels", [None])):
            rows = (conditions.index == i).nonzero()[:, 0]
            one_for_all = rows if len(self.precision) > 1 else slice(None)
            likelihood = self.precision[one_for_all], self.shift[one_for_all]
            known = *likelihood, labels, noisy[rows], timestep, clean[rows]
            means, _, log_weights = self.gaussian_mixture.given(*known)
            guided[rows] = (log_weights.exp()[..., None] * means).sum(1).to(clean)
        return guided


def predict(
    denoiser: torch.nn.Module,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    conditions: Conditions,
    guidance_scale: float | Mapping[str, float] = 1.0,
    guides: Sequence[Guide] = (),
) -> torch.Tensor:
    """
    The denoiser's prediction with classifier-free guidance (arXiv 2207.12598, equation 6 in the form of Diffusers):
    `unconditional + guidance_scale * (conditional - unconditional)`. Guides then move the clean estimate.

    `latents` and the result are `(cells, num_features)`. All cells have one timestep. Scales by label key compose:
    each one's difference is to the prediction without that label. A scale of 1 means no guidance, and costs nothing.
    """
    inputs, kwargs, index = latents.to(denoiser.dtype), conditions.kwargs, conditions.index
    by_key: Any = guidance_scale if isinstance(guidance_scale, Mapping) else {None: guidance_scale}
    scales = {key: scale for key, scale in by_key.items() if scale != 1.0 and kwargs}
    if scales:
        dropped = [conditions.without(key) for key in scales]
        num_rows = len(next(iter(kwargs.values())))
        index = torch.cat([index + i * num_rows for i in range(len(scales) + 1)])
        kwargs = {name: torch.cat([rows, *(one[name] for one in dropped)]) for name, rows in kwargs.items()}
        inputs = torch.cat([inputs] * (len(scales) + 1))
    if kwargs and "label_index" in inspect.signature(denoiser.forward).parameters:
        kwargs = {**kwargs, "label_index": index}
    else:  # a user's denoiser
        kwargs = {name: rows[index] for name, rows in kwargs.items()}
    output = denoiser(inputs, timestep, **kwargs, return_dict=False)[0]
    if scales:
        conditional, *others = output.chunk(len(scales) + 1)
        output = conditional + sum((s - 1) * (conditional - other) for s, other in zip(scales.values(), others))
    if guides:
        clean = to_clean(output, latents, timestep, scheduler)
        for guide in guides:
            clean = guide(clean, latents, timestep, conditions)
        output = from_clean(clean, latents, timestep, scheduler)
    return output
