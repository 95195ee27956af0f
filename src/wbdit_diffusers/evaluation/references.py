"""Comparisons for generated cells: real cells with the same labels, and baselines without a denoiser."""

import numpy as np

from ..models.gaussian_mixture import PSEUDO_CELLS, mixture_responsibilities, within_labels


def split_halves(labels: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """
    Two halves of the training cells, stratified by label, as sorted positions. Principal components and the cell type
    classifier are fitted on the first half. The real reference comes from the second half, which they have not seen.
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    order = shuffled[np.argsort(np.asarray(labels)[shuffled], kind="stable")]
    return np.sort(order[::2]), np.sort(order[1::2])


def draw_matching(
    labels: np.ndarray, wanted: np.ndarray, rng: np.random.Generator, preferred: np.ndarray | None = None
) -> np.ndarray:
    """
    Positions of cells with the wanted labels, in their order, drawn from cells with `labels` `(cells,)`. Preferred
    positions come first, and cells are drawn twice only if a label has too few. A label of no cell matches all cells.
    """
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
    class_labels: np.ndarray,
    wanted_labels: np.ndarray,
    rng: np.random.Generator,
    gaussian_mixture: bool = False,
) -> np.ndarray:
    """
    Draws latents `(cells, num_features)` from one Gaussian per combination of labels. Its covariance is shrunk towards
    the covariance pooled within labels, with the weight of 20 cells. `gaussian_mixture` draws from the Gaussian
    mixtures that [`GaussianMixtureDenoiser`] fits instead. An unseen combination is drawn from all training cells.

    Args:
        latents (`np.ndarray` of shape `(train cells, num_features)`): Latents of training cells.
        class_labels (`np.ndarray` of shape `(train cells, num_label_keys)`): Labels of training cells.
        wanted_labels (`np.ndarray` of shape `(cells, num_label_keys)`): Labels of the cells to draw.
    """
    latents = latents.astype(np.float64)
    codes, wanted = _combinations(class_labels, wanted_labels)
    pooled = within_labels(latents, codes)
    drawn = np.empty((len(wanted), latents.shape[1]))
    for code in np.unique(wanted):
        own = latents[codes == code] if (codes == code).any() else latents
        number = int((wanted == code).sum())
        if not gaussian_mixture:
            drawn[wanted == code] = _draw_gaussian(own, np.ones(len(own)), pooled, number, rng)
            continue
        shares = mixture_responsibilities(own, pooled, seed=int(rng.integers(2**31)))
        sizes = shares.sum(axis=0)
        counts = rng.multinomial(number, sizes / sizes.sum())
        parts = [_draw_gaussian(own, share, pooled, count, rng) for share, count in zip(shares.T, counts)]
        drawn[wanted == code] = rng.permutation(np.concatenate(parts))
    return drawn


def resampled_latents(
    latents: np.ndarray, class_labels: np.ndarray, wanted_labels: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Draws training latents with the wanted labels. [`gaussian_latents`] describes the arguments."""
    return latents[draw_matching(*_combinations(class_labels, wanted_labels), rng)]


def _combinations(class_labels: np.ndarray, wanted_labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An integer for the combination of labels of each training cell and of each wanted cell."""
    both = np.concatenate([class_labels, wanted_labels])
    codes = np.unique(both, axis=0, return_inverse=True)[1].ravel() if both.shape[1] else np.zeros(len(both), int)
    return codes[: len(class_labels)], codes[len(class_labels) :]


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
