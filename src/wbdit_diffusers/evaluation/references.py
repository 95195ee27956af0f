"""Comparisons for generated cells: real cells with the same labels, and baselines without a denoiser."""

import numpy as np

from ..models.gaussian_mixture import PSEUDO_CELLS, mixture_responsibilities, within_labels


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
