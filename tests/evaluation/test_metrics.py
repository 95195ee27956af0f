import numpy as np
import pytest

from wbdit_diffusers.evaluation.metrics import (
    compare,
    compare_labels,
    gene_statistics,
    manifold_metrics,
    mmd2,
    nearest_training_cell_ratio,
    paper_parity,
    random_forest_auc,
    wasserstein2,
)


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


def test_precision_and_recall_tell_noise_from_collapse():
    rng = np.random.default_rng(0)
    real, perfect = rng.normal(size=(2, 300, 3))
    same = manifold_metrics(real, perfect)
    assert same["density"] == pytest.approx(1, abs=0.2)
    assert min(same["precision"], same["recall"], same["coverage"]) > 0.85
    # Half of the distribution only: every cell is believable, half of the real ones have none near them.
    collapsed = manifold_metrics(real, perfect[perfect[:, 0] > 0])
    assert collapsed["precision"] > 0.85 and collapsed["recall"] < 0.75 and collapsed["coverage"] < 0.75
    # Too wide: the real cells are covered, the generated ones are not believable.
    wide = manifold_metrics(real, 4 * perfect)
    assert wide["precision"] < 0.4 and wide["recall"] > 0.8
    far = manifold_metrics(real, perfect + 100)
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_copies_of_training_cells_are_found_out():
    rng = np.random.default_rng(0)
    train, real, generated = rng.normal(size=(3, 400, 5))
    assert nearest_training_cell_ratio(train, real, generated) == pytest.approx(1, abs=0.1)
    assert nearest_training_cell_ratio(train, real, train[:100]) == 0
    assert nearest_training_cell_ratio(train, real, train + rng.normal(0, 1e-3, train.shape)) < 0.1


def typed_cells(seed, cells=120, genes=80, strength=3.0):
    """Three types; each has 20 genes of its own, `strength` times as much expressed as in the others."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(["a", "b", "c"], cells // 3)
    rates = np.ones((cells, genes))
    for i, label in enumerate("abc"):
        rates[labels == label, 20 * i : 20 * (i + 1)] *= strength
    counts = rng.poisson(2 * rates)
    return np.log1p(counts / counts.sum(1, keepdims=True) * 1e4).astype(np.float32), labels


def test_labels_of_a_perfect_generator():
    train, real, generated = (typed_cells(seed, cells=300) for seed in range(3))
    pooled, per_label = compare_labels(*train, *real, *generated)
    assert set(per_label) == {"a", "b", "c"}
    assert pooled["purity"] == pytest.approx(1, abs=0.05)
    assert pooled["f1"] > 0.95
    assert pooled["lfc_slope"] == pytest.approx(1, abs=0.1)
    assert pooled["de_recovery"] > 0.5  # 20 of the 50 are markers, the other 30 are chance
    assert all(set(row) == {"purity", "lfc_slope", "de_recovery", "w2", "mmd2"} for row in per_label.values())
    assert all(abs(row["mmd2"]) < 0.02 for row in per_label.values())


def test_weak_types_have_a_flat_slope():
    train, real, weak = typed_cells(0, 300), typed_cells(1, 300), typed_cells(2, 300, strength=1.5)
    pooled, _ = compare_labels(*train, *real, *weak)
    assert pooled["lfc_slope"] < 0.6


def test_wrong_labels_are_found_out():
    train, real, (generated, labels) = (typed_cells(seed, cells=300) for seed in range(3))
    swapped = np.array([{"a": "b", "b": "a", "c": "c"}[label] for label in labels])
    pooled, per_label = compare_labels(*train, *real, generated, swapped)
    assert per_label["a"]["purity"] < 0.1 and per_label["c"]["purity"] > 0.9
    assert pooled["f1"] < 0.5
    assert per_label["a"]["lfc_slope"] < 0.1


def test_rare_types_are_left_out():
    train, real, generated = (typed_cells(seed, cells=90) for seed in range(3))
    assert set(compare_labels(*train, *real, *generated)[1]) == {"a", "b", "c"}
    assert compare_labels(*train, *real, *generated, min_train_cells=31) == ({}, {})


def test_parity_metrics_reward_collapse(samples):
    """Why they are no headline."""
    real = samples["real"]
    assert paper_parity(real, real) == {
        "paper_kl": pytest.approx(0, abs=1e-6),
        "paper_wasserstein": pytest.approx(0, abs=1e-6),
        "paper_mmd": pytest.approx(0, abs=0.02),
    }
    mean_cell = np.tile(real.mean(axis=0), (len(real), 1))
    assert paper_parity(real, mean_cell)["paper_kl"] < paper_parity(real, samples["generated"])["paper_kl"]


def test_paper_parity_of_genes_that_few_cells_express():
    """The median distance within 20 such genes is 0, which is no bandwidth."""
    rng = np.random.default_rng(0)
    real, generated = (
        np.hstack([rng.normal(size=(30, 20)), np.eye(30, 20)[rng.permutation(30)] * (np.arange(30) < 5)[:, None]])
        for _ in range(2)
    )
    assert paper_parity(real, generated)["paper_mmd"] == pytest.approx(
        paper_parity(real[:, :20], generated[:, :20])["paper_mmd"]
    )
