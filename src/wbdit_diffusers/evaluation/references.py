"""What generated cells are compared with: real cells drawn alike, and baselines that need no denoiser."""

from collections.abc import Callable

import numpy as np

from ..models.gaussian_mixture import PSEUDO_CELLS, mixture_responsibilities, within_labels


# ==================== Real cells ====================


def split_halves(labels: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """
    Two halves of the training cells: on one, everything that the judging needs is fitted (principal components, the
    cell type classifier); from the other one the real reference is drawn, which it has not seen either.

    Args:
        labels (`np.ndarray` of shape `(cells,)`): Labels to stratify by.
        seed (`int`, defaults to 0): Seed of the shuffle.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: sorted positions of the cells to fit on, and of the other ones.
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    order = shuffled[np.argsort(np.asarray(labels)[shuffled], kind="stable")]
    return np.sort(order[::2]), np.sort(order[1::2])


def draw_matching(
    labels: np.ndarray, wanted: np.ndarray, rng: np.random.Generator, preferred: np.ndarray | None = None
) -> np.ndarray:
    """
    Draws cells with given labels: the preferred ones first, then the rest, and twice only where a label has too few.

    Args:
        labels (`np.ndarray` of shape `(cells,)`): Labels of the cells to draw from.
        wanted (`np.ndarray` of shape `(wanted cells,)`): The labels to match.
        rng (`np.random.Generator`): Draws.
        preferred (`np.ndarray`, *optional*): Positions of the cells to draw first; all alike by default.

    Returns:
        `np.ndarray` of shape `(wanted cells,)`: positions, the i-th of a cell with the i-th wanted label. A label that
        none of the cells has is drawn from all of them.
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


# ==================== Baselines in latent space ====================


def gaussian_latents(
    latents: np.ndarray, class_labels: np.ndarray, wanted_labels: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """
    Draws from one Gaussian per combination of labels, with the label's mean and covariance. The covariance is shrunk
    towards the one pooled within labels with the weight of 20 cells, so that a label of few cells has one.

    Args:
        latents (`np.ndarray` of shape `(train cells, num_features)`): Latents of training cells.
        class_labels (`np.ndarray` of shape `(train cells, num_label_keys)`): Their labels.
        wanted_labels (`np.ndarray` of shape `(cells, num_label_keys)`):
            Labels of the cells to draw; a combination that no training cell has is drawn from all training cells.
        rng (`np.random.Generator`): Draws.

    Returns:
        `np.ndarray` of shape `(cells, num_features)`.
    """

    def draw(own: np.ndarray, pooled: np.ndarray, number: int) -> np.ndarray:
        return _draw_gaussian(own, np.ones(len(own)), pooled, number, rng)

    return _draw_by_label(latents, class_labels, wanted_labels, draw)


def mixture_latents(
    latents: np.ndarray, class_labels: np.ndarray, wanted_labels: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """
    Draws from one Gaussian mixture per combination of labels: full covariances, 1 to 32 components by the likelihood
    of cells that are set aside, each covariance shrunk as in [`gaussian_latents`]. The arguments are the same.
    """

    def draw(own: np.ndarray, pooled: np.ndarray, number: int) -> np.ndarray:
        responsibilities = mixture_responsibilities(own, pooled, seed=int(rng.integers(2**31)))
        sizes = responsibilities.sum(axis=0)
        drawn = np.concatenate(
            [
                _draw_gaussian(own, responsibilities[:, i], pooled, count, rng)
                for i, count in enumerate(rng.multinomial(number, sizes / sizes.sum()))
            ]
        )
        return rng.permutation(drawn)

    return _draw_by_label(latents, class_labels, wanted_labels, draw)


def resampled_latents(
    latents: np.ndarray, class_labels: np.ndarray, wanted_labels: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """
    Latents of training cells with the wanted labels, which is what a denoiser without any error would give. The
    arguments are those of [`gaussian_latents`].
    """
    codes = _combination_codes(class_labels, wanted_labels)
    return latents[draw_matching(codes[: len(latents)], codes[len(latents) :], rng)]


def _combination_codes(class_labels: np.ndarray, wanted_labels: np.ndarray) -> np.ndarray:
    """A number for each combination of labels, the training cells' first, then the wanted ones'."""
    both = np.concatenate([class_labels, wanted_labels])
    if both.shape[1] == 0:
        return np.zeros(len(both), dtype=np.int64)
    return np.unique(both, axis=0, return_inverse=True)[1].ravel()


def _draw_by_label(
    latents: np.ndarray,
    class_labels: np.ndarray,
    wanted_labels: np.ndarray,
    draw: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
) -> np.ndarray:
    """`draw(latents of the label, deviations from the label means of all cells, number)` for each combination."""
    codes = _combination_codes(class_labels, wanted_labels)
    codes, wanted = codes[: len(latents)], codes[len(latents) :]
    pooled = within_labels(latents.astype(np.float64), codes)
    drawn = np.empty((len(wanted), latents.shape[1]))
    for code in np.unique(wanted):
        own = latents[codes == code] if (codes == code).any() else latents
        drawn[wanted == code] = draw(own.astype(np.float64), pooled, int((wanted == code).sum()))
    return drawn


def _draw_gaussian(
    own: np.ndarray, weights: np.ndarray, pooled: np.ndarray, number: int, rng: np.random.Generator
) -> np.ndarray:
    """
    From a Gaussian with the weighted mean of `own` and `(weights · own covariance + 20 · pooled covariance) / (sum of
    weights + 20)`. Random sums of the deviations themselves have that covariance: it need not be formed, which would
    be slow where latents have thousands of values.
    """
    total = weights.sum()
    mean = weights @ own / total
    deviations = np.sqrt(weights)[:, None] * (own - mean)
    drawn = rng.standard_normal((number, len(own))) @ deviations
    drawn += np.sqrt(PSEUDO_CELLS / len(pooled)) * rng.standard_normal((number, len(pooled))) @ pooled
    return mean + drawn / np.sqrt(total + PSEUDO_CELLS)
