"""Cells to judge: samples of a pipeline, baselines without its denoiser, and real cells with the same labels."""

from collections.abc import Callable
from functools import partial
from typing import Any

import anndata as ad
import numpy as np
import torch
from diffusers.utils import logging

from ..models.gaussian_mixture import PSEUDO_CELLS, mixture_responsibilities, within_labels


logger = logging.get_logger(__name__)

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


def split_halves(labels: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sorted positions of two halves of the cells, stratified by label: one to fit with, one as the real reference."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    order = shuffled[np.argsort(np.asarray(labels)[shuffled], kind="stable")]
    return np.sort(order[::2]), np.sort(order[1::2])


def draw_matching(
    labels: np.ndarray, wanted: np.ndarray, rng: np.random.Generator, preferred: np.ndarray | None = None
) -> np.ndarray:
    """Positions of cells with the wanted labels. Preferred ones come first. A label of no cell matches all cells."""
    is_preferred = np.zeros(len(labels), dtype=bool)
    is_preferred[slice(None) if preferred is None else preferred] = True
    drawn = np.empty(len(wanted), dtype=np.int64)
    for label in np.unique(wanted):
        places = np.flatnonzero(wanted == label)
        candidates = np.flatnonzero(labels == label)
        candidates = rng.permutation(candidates if len(candidates) else len(labels))
        candidates = candidates[np.argsort(~is_preferred[candidates], kind="stable")]
        again = rng.choice(candidates, max(len(places) - len(candidates), 0))
        drawn[places] = np.concatenate([candidates[: len(places)], again])
    return drawn


def gaussian_latents(
    latents: np.ndarray,
    labels: np.ndarray,
    wanted: np.ndarray,
    rng: np.random.Generator,
    gaussian_mixture: bool = False,
) -> np.ndarray:
    """Draws latents with the wanted labels from a Gaussian, or a Gaussian mixture, of each label's latents."""
    latents = latents.astype(np.float64)
    pooled = within_labels(latents, labels)
    drawn = np.empty((len(wanted), latents.shape[1]))
    for label in np.unique(wanted):
        own = latents[labels == label] if (labels == label).any() else latents
        number = int((wanted == label).sum())
        if not gaussian_mixture:
            drawn[wanted == label] = _draw_gaussian(own, np.ones(len(own)), pooled, number, rng)
            continue
        shares = mixture_responsibilities(own, pooled, seed=int(rng.integers(2**31)))
        sizes = shares.sum(axis=0)
        counts = rng.multinomial(number, sizes / sizes.sum())
        parts = [_draw_gaussian(own, share, pooled, count, rng) for share, count in zip(shares.T, counts)]
        drawn[wanted == label] = rng.permutation(np.concatenate(parts))
    return drawn


def resampled_latents(
    latents: np.ndarray, labels: np.ndarray, wanted: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Draws training latents with the wanted labels."""
    return latents[draw_matching(labels, wanted, rng)]


def _draw_gaussian(
    own: np.ndarray, weights: np.ndarray, pooled: np.ndarray, number: int, rng: np.random.Generator
) -> np.ndarray:
    """Draws from a Gaussian with the weighted mean of `own` and its covariance, shrunk towards that of `pooled`."""
    # Random sums of deviations have this covariance. The matrix itself would be slow for thousands of latents.
    total = weights.sum()
    mean = weights @ own / total
    deviations = np.sqrt(weights)[:, None] * (own - mean)
    drawn = rng.standard_normal((number, len(own))) @ deviations
    drawn += np.sqrt(PSEUDO_CELLS / len(pooled)) * rng.standard_normal((number, len(pooled))) @ pooled
    return mean + drawn / np.sqrt(total + PSEUDO_CELLS)


BASELINES: dict[str, Callable[..., np.ndarray]] = {
    "Gaussian per label": gaussian_latents,
    "Gaussian mixture per label": partial(gaussian_latents, gaussian_mixture=True),
    "training latents resampled": resampled_latents,
}


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
