"""Cells to judge: samples of a pipeline, and baselines that its codec makes without the denoiser."""

from collections.abc import Callable
from functools import partial
from typing import Any

import anndata as ad
import numpy as np
import torch
from diffusers.utils import logging

from .references import gaussian_latents, resampled_latents


logger = logging.get_logger(__name__)

BASELINES: dict[str, Callable[..., np.ndarray]] = {
    "Gaussian per label": gaussian_latents,
    "Gaussian mixture per label": partial(gaussian_latents, gaussian_mixture=True),
    "training latents resampled": resampled_latents,
}
MAX_CELLS = 5000  # the time of the optimal assignment grows with the third power of their number


def cells_to_judge(known: np.ndarray) -> np.ndarray:
    """Sorted positions of the held-out cells to judge: at most 5,000 that are `known` to the training labels."""
    if not known.any():
        raise ValueError("No held-out cell has labels that training knows: give cells of the kind in training.")
    if not known.all():
        logger.warning(f"{(~known).sum()} held-out cells are left out: their labels do not occur in training.")
    positions = np.flatnonzero(known)
    chosen = np.random.default_rng(0).choice(len(positions), min(len(positions), MAX_CELLS), replace=False)
    return positions[np.sort(chosen)]


def draw_samples(
    pipe: Any, test: ad.AnnData, num_samples: int = 3, seed: int = 0, **call_kwargs
) -> tuple[list[ad.AnnData], ad.AnnData]:
    """
    Generates one cell for each held-out cell, with its labels. Returns the samples, and these held-out cells.

    Held-out cells with unknown labels are left out, and cells beyond 5,000. Each further sample adds 1 to the seed.
    """
    test = test[cells_to_judge(pipe.processor.knows_labels(test))]
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
    Decodes latents that need no denoiser. A denoiser has to beat the two Gaussian baselines. A perfect denoiser would
    equal `"training latents resampled"`. The baselines have the labels of `test`, the held-out cells of
    [`draw_samples`]. Returns the samples of each baseline by name.
    """
    latents = pipe.encode_cells(train)
    known, wanted = pipe.processor.encode_labels(train), pipe.processor.encode_labels(test)
    both = np.concatenate([known.numpy(), wanted.numpy().repeat(num_samples, axis=0)])  # one fit for all samples
    codes = np.zeros(len(both)) if wanted.shape[1] == 0 else np.unique(both, axis=0, return_inverse=True)[1].ravel()
    samples = {}
    for name, draw in BASELINES.items():
        rng = np.random.default_rng(seed)
        drawn = draw(latents.detach().cpu().double().numpy(), *np.split(codes, [len(known)]), rng)
        parts = [torch.from_numpy(drawn[i::num_samples]).to(latents) for i in range(num_samples)]
        samples[name] = [
            pipe.decode_latents(part, class_labels=wanted, generator=torch.Generator().manual_seed(seed + i))
            for i, part in enumerate(parts)
        ]
    return samples
