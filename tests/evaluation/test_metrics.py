import numpy as np
import pytest

from wbdit_diffusers.evaluation.metrics import compare, gene_statistics, mmd2, random_forest_auc, wasserstein2


@pytest.fixture(scope="module")
def samples():
    """Three independent samples of one distribution of correlated, zero-inflated expression."""
    rng = np.random.default_rng(0)
    programs = rng.gamma(0.5, 2.0, (4, 60))

    def sample(cells):
        return np.log1p(rng.poisson(rng.gamma(0.5, 1.0, (cells, 4)) @ programs)).astype(np.float32)

    return {"train": sample(400), "real": sample(150), "generated": sample(150)}


def test_a_perfect_generator(samples):
    metrics = compare(**samples)
    assert 0.35 < metrics["rf_auc"] < 0.65 and 0.35 < metrics["rf_auc_pca"] < 0.65
    assert abs(metrics["mmd2"]) < 0.01
    assert metrics["variance_ratio"] == pytest.approx(1, abs=0.15)
    assert metrics["mean_pearson"] > 0.9 and metrics["mean_spearman"] > 0.9
    assert metrics["zero_fraction_error"] < 0.06
    assert metrics["gene_correlation"] > 0.7


def test_copies_of_the_real_cells(samples):
    real = samples["real"]
    assert wasserstein2(real, real[::-1]) == pytest.approx(0, abs=1e-6)
    statistics = gene_statistics(real, real)
    assert statistics.pop("zero_fraction_error") == 0
    assert all(value == pytest.approx(1) for value in statistics.values())


def test_a_collapsed_generator_is_found_out(samples):
    collapsed = np.tile(samples["real"].mean(axis=0), (150, 1)) + np.random.default_rng(0).normal(0, 1e-3, (150, 60))
    assert random_forest_auc(samples["real"], collapsed) > 0.99
    assert gene_statistics(samples["real"], collapsed)["variance_ratio"] < 0.01
    assert mmd2(samples["real"], collapsed) > 0.1
    assert wasserstein2(samples["real"], collapsed) > wasserstein2(samples["real"], samples["generated"])


def test_shuffled_genes_are_found_out(samples):
    """Each gene's values permuted over the cells: the marginals are right, the cells are not."""
    rng = np.random.default_rng(0)
    shuffled = np.stack([rng.permutation(column) for column in samples["generated"].T], axis=1)
    before = gene_statistics(samples["real"], samples["generated"])
    after = gene_statistics(samples["real"], shuffled)
    assert after["mean_pearson"] == pytest.approx(before["mean_pearson"], abs=1e-5)
    assert after["gene_correlation"] < 0.3 < before["gene_correlation"]
    assert random_forest_auc(samples["real"], shuffled) > 0.7
    assert mmd2(samples["real"], shuffled) > 0.01 > mmd2(samples["real"], samples["generated"])


def test_known_distances():
    points = np.random.default_rng(0).normal(size=(200, 3))
    assert wasserstein2(points, points + np.array([3.0, 0, 4.0])) == pytest.approx(5)
    with pytest.raises(ValueError, match="as many generated cells"):
        wasserstein2(points, points[:-1])
    # Two far clouds: the cross term vanishes, and each cloud's own does not.
    within = mmd2(points, points[::-1])
    assert mmd2(points, points + 1000) > 0.5 > 0.01 > abs(within)


def test_unbiased_mmd_is_zero_on_average():
    rng = np.random.default_rng(0)
    values = [mmd2(rng.normal(size=(40, 4)), rng.normal(size=(40, 4))) for _ in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(200)


def test_a_shifted_mean_is_found_out(samples):
    shifted = samples["generated"] + 0.5
    assert random_forest_auc(samples["real"], shifted) > 0.9
    assert mmd2(samples["real"], shifted) > 0.01
    assert gene_statistics(samples["real"], shifted)["zero_fraction_error"] > 0.2


def test_random_forest_auc_is_reproducible(samples):
    assert random_forest_auc(samples["real"], samples["generated"]) == random_forest_auc(
        samples["real"], samples["generated"]
    )
