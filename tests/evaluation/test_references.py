"""The real reference, and the baselines in latent space."""

from functools import partial

import numpy as np
import pytest

from wbdit_diffusers.evaluation.samples import draw_matching, gaussian_latents, resampled_latents, split_halves


gaussian_mixture_latents = partial(gaussian_latents, gaussian_mixture=True)
DRAWS = [gaussian_latents, gaussian_mixture_latents, resampled_latents]


@pytest.fixture(scope="module")
def latents():
    """Label (0,) has two far clusters, label (1,) is one narrow Gaussian, label (2,) has three cells."""
    rng = np.random.default_rng(0)
    signs = rng.choice([-1, 1], 400)
    clusters = rng.normal(0, 0.3, (400, 3)) + 3 * signs[:, None] * np.array([1, 0, 0])
    narrow = np.array([0, 5, 0]) + rng.normal(0, 0.5, (200, 3))
    few = np.array([0, 0, 8]) + rng.normal(0, 0.5, (3, 3))
    return np.vstack([clusters, narrow, few]), np.repeat([0, 1, 2], [400, 200, 3])


def wanted(label: int, number: int = 2000) -> np.ndarray:
    return np.full(number, label)


def test_real_references():
    """Halves have the same labels; preferred cells are drawn first, and twice only where there are too few."""
    labels = np.repeat(["a", "b", "c"], [10, 21, 1])
    first, second = split_halves(labels)
    assert sorted([*first, *second]) == list(range(32)) and (split_halves(labels, 1)[0][:5] != first[:5]).any()
    assert all(abs((labels[first] == label).sum() - (labels[second] == label).sum()) <= 1 for label in "ab")
    labels, rng, preferred = np.repeat(["a", "b"], [10, 4]), np.random.default_rng(0), np.array([1, 3, 5, 12])
    drawn = draw_matching(labels, np.array(["b", "a", "a", "a"]), rng, preferred)
    assert drawn[0] == 12 and sorted(drawn[1:]) == [1, 3, 5]
    drawn = draw_matching(labels, np.repeat("a", 5), rng, preferred)
    assert {1, 3, 5} < set(drawn) and len(set(drawn)) == 5
    assert sorted(set(draw_matching(labels, np.repeat("b", 6), rng))) == [10, 11, 12, 13]
    assert len(draw_matching(labels, np.array(["z", "z"]), rng)) == 2  # a label of no cell


@pytest.mark.parametrize("draw", DRAWS)
def test_baselines_have_the_moments_of_their_label(latents, draw):
    x, labels = latents
    both = np.concatenate([wanted(1), wanted(0)])
    drawn = draw(x, labels, both, np.random.default_rng(0))
    assert drawn.shape == (4000, 3)
    pooled = np.concatenate([x[labels == label] - x[labels == label].mean(axis=0) for label in range(3)])
    for label, part in ((1, drawn[:2000]), (0, drawn[2000:])):
        own = x[labels == label]
        np.testing.assert_allclose(part.mean(axis=0), own.mean(axis=0), atol=0.25)
        variance = own.var(axis=0)
        if draw is not resampled_latents:  # shrunk with the weight of 20 cells
            variance = (len(own) * variance + 20 * (pooled**2).mean(axis=0)) / (len(own) + 20)
        np.testing.assert_allclose(part.std(axis=0), np.sqrt(variance), rtol=0.15)


def test_clusters_and_a_label_of_three_cells(latents):
    """Only the Gaussian mixture leaves the gap between the clusters; both have a covariance for three cells."""
    x, labels = latents
    gaps = []
    for draw in (gaussian_mixture_latents, gaussian_latents):
        drawn = draw(x, labels, np.concatenate([wanted(0), wanted(2)]), np.random.default_rng(0))
        gaps.append(np.mean(np.abs(drawn[:2000, 0]) < 1.5))
        assert np.linalg.matrix_rank(np.cov(drawn[2000:].T)) == 3
        np.testing.assert_allclose(drawn[2000:].mean(axis=0), x[-3:].mean(axis=0), atol=0.2)
    assert gaps[0] < 0.05 < 0.3 < gaps[1]


@pytest.mark.parametrize("draw", DRAWS)
def test_unseen_labels_and_no_labels_take_all_cells(latents, draw):
    x, labels = latents
    for known, asked in ((labels, wanted(7)), (np.zeros(len(x)), np.zeros(2000))):
        drawn = draw(x, known, asked, np.random.default_rng(0))
        np.testing.assert_allclose(drawn.mean(axis=0), x.mean(axis=0), atol=0.25)
    resampled = resampled_latents(x, labels, wanted(1, 50), np.random.default_rng(0))
    assert set(resampled[:, 0]) <= set(x[400:600, 0]) and len(np.unique(resampled, axis=0)) == 50
