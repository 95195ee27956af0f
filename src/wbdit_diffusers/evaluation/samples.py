"""Cells to judge: what a pipeline generates, and what its codec alone would make."""

from typing import Any

import anndata as ad
import numpy as np
import torch
from diffusers.utils import logging

from .references import gaussian_latents, mixture_latents, resampled_latents


logger = logging.get_logger(__name__)

BASELINES = {
    "Gaussian per label": gaussian_latents,
    "Gaussian mixture per label": mixture_latents,
    "training latents resampled": resampled_latents,
}


def cells_to_judge(test: ad.AnnData, known: np.ndarray, max_cells: int = 5000) -> ad.AnnData:
    """
    The held-out cells that a model can be judged on: those whose labels training knows, `max_cells` of them at most.

    Args:
        test (`AnnData`): Held-out cells.
        known (`np.ndarray` of shape `(cells,)`): Which of them have labels that training knows.
        max_cells (`int`, defaults to 5000): The optimal assignment of W2 takes their number cubed.

    Returns:
        `AnnData`: a view of `test`, in its order.

    Raises:
        ValueError: If training knows the labels of none.
    """
    if not known.any():
        raise ValueError(
            "No held-out cell has labels that training knows: give cells of the same kind as in training."
        )
    if not known.all():
        logger.warning(f"{(~known).sum()} held-out cells have labels that no training cell has: left out.")
    test = test[known]
    if test.n_obs > max_cells:
        test = test[np.sort(np.random.default_rng(0).choice(test.n_obs, max_cells, replace=False))]
    return test


def draw_samples(
    pipe: Any, test: ad.AnnData, num_samples: int = 3, seed: int = 0, max_cells: int = 5000, **call_kwargs
) -> tuple[list[ad.AnnData], ad.AnnData]:
    """
    Generates as many cells as there are held-out cells, with their labels.

    Args:
        pipe ([`ScRNAGenerationPipeline`]): What is judged.
        test (`AnnData`): The held-out cells. Those with a label that the pipeline does not know are left out.
        num_samples (`int`, defaults to 3): Samples to draw.
        seed (`int`, defaults to 0): Seed of the first sample; the others follow.
        max_cells (`int`, defaults to 5000): Held-out cells to use; the optimal assignment takes their number cubed.
        call_kwargs: Further arguments of the pipeline's call.

    Returns:
        `tuple[list[AnnData], AnnData]`: the samples, and the held-out cells that they correspond to.

    Raises:
        ValueError: If the pipeline knows the labels of no held-out cell.
    """
    test = cells_to_judge(test, pipe.processor.knows_labels(test), max_cells)
    labels = {key: test.obs[key].astype(str).tolist() for key in pipe.processor.label_keys}
    samples = []
    for i in range(num_samples):
        generator = torch.Generator().manual_seed(seed + i)
        samples.append(pipe(num_cells=test.n_obs, conditions=labels, generator=generator, **call_kwargs).cells)
    return samples, test


def draw_baselines(
    pipe: Any, train: ad.AnnData, test: ad.AnnData, num_samples: int = 3, seed: int = 0
) -> dict[str, list[ad.AnnData]]:
    """
    Cells from the pipeline's own codec, without its denoiser: what the denoiser has to beat, and what it can reach.

    Args:
        pipe ([`ScRNAGenerationPipeline`]): Whose codec makes the cells.
        train (`AnnData`): The cells that it was trained on; their latents are imitated.
        test (`AnnData`): The held-out cells of [`draw_samples`], whose labels the cells get.
        num_samples (`int`, defaults to 3): Samples of each baseline.
        seed (`int`, defaults to 0): Seed of the first sample; the others follow.

    Returns:
        `dict[str, list[AnnData]]`: `"Gaussian per label"` and `"Gaussian mixture per label"` (components by
        cross-validation), see [`~evaluation.references.mixture_latents`]; `"training latents resampled"` is what a
        denoiser without any error would give.
    """
    latents = pipe.encode_cells(train)
    known, wanted = pipe.processor.encode_labels(train), pipe.processor.encode_labels(test)
    samples = {}
    for name, draw in BASELINES.items():
        # All samples from one fit.
        drawn = draw(
            latents.detach().cpu().double().numpy(),
            known.cpu().numpy(),
            wanted.cpu().numpy().repeat(num_samples, axis=0),
            np.random.default_rng(seed),
        )
        samples[name] = [
            pipe.decode_latents(
                torch.from_numpy(drawn[i::num_samples]).to(latents),
                class_labels=wanted,
                generator=torch.Generator().manual_seed(seed + i),
            )
            for i in range(num_samples)
        ]
    return samples
