"""Means of combinations of labels that were not measured."""

import numpy as np
import pytest
import torch

from wbdit_diffusers import GaussianMixtureDenoiser
from wbdit_diffusers.models.composition import Composition
from wbdit_diffusers.sampling import training_scheduler


NUM_TYPES = 8


def additive(num_conditions: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Combinations of types and conditions, and means that are the sum of an effect of each."""
    rng = np.random.default_rng(seed)
    combinations = np.array([(t, c) for t in range(NUM_TYPES) for c in range(num_conditions)])
    types, conditions = rng.normal(size=(NUM_TYPES, 5)) * 3, rng.normal(size=(num_conditions, 5))
    return combinations, types[combinations[:, 0]] + conditions[combinations[:, 1]]


def without(combinations: np.ndarray, means: np.ndarray, *left_out: tuple) -> Composition:
    kept = ~np.array([tuple(row) in left_out for row in combinations.tolist()])
    return Composition(combinations[kept], means[kept], np.full(kept.sum(), 100), np.eye(5))


def test_additive_labels_compose_exactly():
    combinations, means = additive(num_conditions=3)
    composition = without(combinations, means, (2, 1), (5, 0), (5, 1))
    for labels in [(2, 1), (5, 0), (5, 1)]:
        composed = composition.compose(np.array(labels))
        base = composition.combinations[composed.base]
        assert (base != labels).sum() == 1
        np.testing.assert_allclose(
            composition.means[composed.base] + composed.change, means[labels[0] * 3 + labels[1]]
        )
        assert composed.size == pytest.approx(np.linalg.norm(composed.change)) and composed.error < 1e-6


def test_near_types_show_the_change_and_its_error():
    """Two groups of types respond in different ways: the change comes from the type's own group."""
    combinations, means = additive()
    group = combinations[:, 0] // (NUM_TYPES // 2)
    means = means * 0.1 + 20 * group[:, None] * np.array([1, 0, 0, 0, 0])
    response = np.where(group[:, None] == 0, [0, 2, 0, 0, 0], [0, 0, 0, 3, 0])
    means = means + response * combinations[:, 1:]
    composition = without(combinations, means, (1, 1), (6, 1))
    near, far = (composition.compose(np.array(labels)).change for labels in [(1, 1), (6, 1)])
    plain = additive()[1] * 0.1
    common = plain[1] - plain[0]
    np.testing.assert_allclose(near - common, [0, 2, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(far - common, [0, 0, 0, 3, 0], atol=1e-6)


def test_a_change_that_nothing_shows_is_not_composed():
    combinations = np.array([(0, 0), (1, 0), (1, 1)])
    means = np.arange(15.0).reshape(3, 5)
    composition = Composition(combinations, means, np.full(3, 50), np.eye(5))
    one = composition.compose(np.array([0, 1]))
    np.testing.assert_allclose(one.change, means[2] - means[1])
    assert one.error == np.inf  # nothing can be left out
    assert Composition(combinations[:2], means[:2], np.full(2, 50), np.eye(5)).compose(np.array([0, 1])) is None


@pytest.fixture(scope="module")
def mixture() -> GaussianMixtureDenoiser:
    combinations, means = additive()
    kept = combinations[(combinations != [3, 1]).any(axis=1)]
    labels = torch.from_numpy(np.repeat(kept, 200, axis=0))
    latents = torch.from_numpy(np.repeat(means[(combinations != [3, 1]).any(axis=1)], 200, axis=0)).float()
    latents += 0.5 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    return GaussianMixtureDenoiser.fit(
        latents, labels, (NUM_TYPES, 2), training_scheduler("v_prediction"), metric=torch.eye(5)
    )


def test_a_mixture_has_the_combination(mixture, tmp_path):
    combinations, means = additive()
    labels = torch.tensor([[3, 1]])
    assert mixture.config.num_composed == 1 and mixture.composed_labels.tolist() == [[3, 1]]
    assert mixture.find_composed(labels[0]) == 0 and mixture.find_composed(torch.tensor([3, 0])) is None
    assert mixture.find_composed(torch.tensor([3, -1])) == 0  # any condition
    drawn = mixture.sample(labels.expand(2000, -1), torch.Generator().manual_seed(0))
    np.testing.assert_allclose(drawn.mean(0), means[7], atol=0.12)
    np.testing.assert_allclose(drawn.std(0), 0.5, atol=0.06)
    assert 0 < mixture.composed_errors[0] < mixture.composed_changes[0]
    mixture.save_pretrained(tmp_path)
    again = GaussianMixtureDenoiser.from_pretrained(tmp_path)
    assert torch.equal(again.composed_changes, mixture.composed_changes)


def test_composed_cells_do_not_join_the_others(mixture):
    """A cell without labels, or with one of two, is drawn from what was measured."""
    drawn = mixture.sample(torch.tensor([[NUM_TYPES, 1]]).expand(3000, -1), torch.Generator().manual_seed(1))
    distance = (drawn - torch.from_numpy(additive()[1][7]).float()).norm(dim=1)
    assert (distance < 1.0).float().mean() < 0.01


def test_cells_find_the_nearest_labels(mixture):
    combinations, means = additive()
    latents = torch.from_numpy(means).float()
    unknown = torch.full((len(means), 2), -1)
    nearest = mixture.nearest_labels(latents, unknown)
    expected = combinations.copy()
    kept = (combinations != [3, 1]).any(axis=1)
    assert np.array_equal(nearest.numpy()[kept], expected[kept])
    given = torch.from_numpy(combinations).clone()
    given[:, 0] = -1
    assert torch.equal(mixture.nearest_labels(latents, given)[:, 1], given[:, 1])
