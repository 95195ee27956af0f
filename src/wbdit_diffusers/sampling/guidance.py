"""Classifier-free guidance: what the denoiser predicts for cells with labels, pushed away from cells without."""

from dataclasses import dataclass

import torch


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
