"""The expected expression at an activity, and how an edit is compared with it."""

import numpy as np
import pytest
from white_box import agreement, expected_at


def test_the_expectation_is_right_where_cells_are_few_on_one_side():
    rng = np.random.default_rng(0)
    activities = rng.exponential(size=4000)  # a mere average in a window would lean to the many
    genes = np.stack([2 * activities, np.sin(activities)], axis=1) + 0.1 * rng.normal(size=(4000, 2))
    for activity in (0.5, 2.0):
        np.testing.assert_allclose(
            expected_at(genes, activities, activity, 0.2), [2 * activity, np.sin(activity)], atol=0.03
        )


def test_genes_are_chosen_by_training_cells():
    rng = np.random.default_rng(0)
    in_training = np.concatenate([rng.normal(0, 5, 100), np.zeros(50)])
    held_out = in_training.copy()
    held_out[100:] = 1000  # changes by chance in held-out cells alone
    judged = agreement({"": 0.5 * in_training}, {"": in_training}, {"": held_out})
    assert judged == {"slope": pytest.approx(0.5), "correlation": pytest.approx(1)}
