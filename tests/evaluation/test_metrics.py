"""Metrics: what each finds, and what it does not."""

import numpy as np
import pytest

from wbdit_diffusers.evaluation import metrics
from wbdit_diffusers.evaluation.cells import CellArrays


@pytest.fixture(scope="module")
def samples():
    """Three independent samples of one distribution of correlated, zero-inflated expression."""
    rng = np.random.default_rng(0)
    programs = rng.gamma(0.5, 2.0, (4, 60))

    def sample(cells):
        return np.log1p(rng.poisson(rng.gamma(0.5, 1.0, (cells, 4)) @ programs)).astype(np.float32)

    return {"train": sample(400), "real": sample(150), "generated": sample(150)}


def test_bad_generators_are_found(samples):
    """A perfect generator, copies, one that collapsed, genes permuted over cells, and a shifted mean."""
    real, perfect, rng = samples["real"], samples["generated"], np.random.default_rng(0)
    stats = metrics.gene_statistics(real, perfect)
    assert abs(metrics.mmd2(real, perfect)) < 0.01
    assert stats["variance_ratio"] == pytest.approx(1, abs=0.15)
    assert stats["mean_pearson"] > 0.9 and stats["mean_spearman"] > 0.9
    assert stats["zero_fraction_error"] < 0.06 and stats["gene_correlation"] > 0.7
    assert metrics.wasserstein2(real, real[::-1]) == pytest.approx(0, abs=1e-6)
    copies = metrics.gene_statistics(real, real)
    assert copies.pop("zero_fraction_error") == 0 and all(value == pytest.approx(1) for value in copies.values())
    collapsed = np.tile(real.mean(axis=0), (150, 1)) + rng.normal(0, 1e-3, (150, 60))
    assert metrics.gene_statistics(real, collapsed)["variance_ratio"] < 0.01 and metrics.mmd2(real, collapsed) > 0.1
    assert metrics.wasserstein2(real, collapsed) > metrics.wasserstein2(real, perfect)
    shuffled = rng.permuted(perfect, axis=0)  # the marginals are right, the cells are not
    after = metrics.gene_statistics(real, shuffled)
    assert after["mean_pearson"] == pytest.approx(stats["mean_pearson"], abs=1e-5)
    assert after["gene_correlation"] < 0.3 and metrics.mmd2(real, shuffled) > 0.01
    assert metrics.gene_statistics(real, perfect + 0.5)["zero_fraction_error"] > 0.2


def test_known_distances():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(200, 3))
    assert metrics.wasserstein2(points, points + np.array([3.0, 0, 4.0])) == pytest.approx(5)
    # The cross term vanishes between two far clouds, and the term within each cloud does not.
    assert metrics.mmd2(points, points + 1000) > 0.5 > 0.01 > abs(metrics.mmd2(points, points[::-1]))
    unbiased = [metrics.mmd2(*rng.normal(size=(2, 40, 4))) for _ in range(200)]
    assert abs(np.mean(unbiased)) < 3 * np.std(unbiased) / np.sqrt(200)
    sizes = rng.lognormal(8, 0.5, 500)
    assert metrics.library_size_w1(sizes, sizes[::-1]) == 0
    assert metrics.library_size_w1(sizes, 1.1 * sizes) == pytest.approx(np.log(1.1))
    errors = metrics.other_genes_error(np.linspace(0.1, 0.3, 50), np.linspace(0.05, 0.25, 50))
    assert errors == {"other_genes_mean_error": pytest.approx(-0.05), "other_genes_w1": pytest.approx(0.05)}


def test_precision_and_recall_separate_noise_from_collapse():
    rng = np.random.default_rng(0)
    real, perfect = rng.normal(size=(2, 300, 3))
    same = metrics.manifold_metrics(real, perfect)
    assert same["density"] == pytest.approx(1, abs=0.2)
    assert min(same["precision"], same["recall"], same["coverage"]) > 0.85
    # Half of the distribution only: every cell is believable, half of the real ones have none near them.
    collapsed = metrics.manifold_metrics(real, perfect[perfect[:, 0] > 0])
    assert collapsed["precision"] > 0.85 and collapsed["recall"] < 0.75 and collapsed["coverage"] < 0.75
    # Too wide: the real cells are covered, the generated ones are not believable.
    wide = metrics.manifold_metrics(real, 4 * perfect)
    assert wide["precision"] < 0.4 and wide["recall"] > 0.8
    far = metrics.manifold_metrics(real, perfect + 100)
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_copies_of_training_cells_are_found():
    rng = np.random.default_rng(0)
    train, test, fresh = rng.normal(size=(3, 400, 5))
    near = train + rng.normal(0, 1e-3, train.shape)
    ratios = [metrics.nearest_training_cell_ratio(train, test, cells) for cells in (fresh, train[:100], near)]
    assert ratios[0] == pytest.approx(1, abs=0.1) and ratios[1] == 0 and ratios[2] < 0.1

    def auc(generated):
        return metrics.membership_auc(*(metrics.nearest_distances(cells, generated) for cells in (train, test)))

    assert auc(fresh) == pytest.approx(0.5, abs=0.05) and auc(train) == 1 and auc(test) == 0
    assert 0.7 < auc(np.vstack([train[:200], fresh[:200]])) < 0.9  # half of them are copies


def test_membership_of_donors():
    """One donor of two was remembered: its cells are near, and all others are not."""
    rng = np.random.default_rng(0)
    donors = np.repeat(["a", "b"], 100)
    near, far, farther = (rng.uniform(start, start + 1, 100) for start in (0, 2, 4))

    def auc(train, test):
        return metrics.membership_auc(*(metrics.mean_by_donor(np.concatenate(side), donors) for side in (train, test)))

    assert auc((near, near), (far, far)) == 1
    assert auc((near, farther), (far, far)) == auc((near, farther), (far, 3 + near)) == 0.5
    assert auc((farther, farther), (far, far)) == 0


def test_distances_of_what_can_be_compared():
    x, y = (np.random.default_rng(seed).normal(size=(100, 5)) for seed in range(2))
    both = metrics.distances(x, y)
    assert both == {"w2": metrics.wasserstein2(x, y), "mmd2": metrics.mmd2(x, y)} and abs(both["mmd2"]) < 0.02
    assert set(metrics.distances(x, y[1:])) == {"mmd2"}  # w2 pairs points
    assert metrics.distances(x, y[:1]) == metrics.distances(x[:1], y[:1]) == {}


def judge_types(train, real, generated):
    """Metrics over all labels that can be judged."""
    labels, frequent = (metrics.judged_labels(train, real, generated, number) for number in (2, 30))
    return metrics.compare_labels(train, real, generated, labels, frequent)


def typed_cells(seed, cells=300, genes=80, strength=3.0):
    """Three types; each has 20 genes of its own, expressed `strength` times as much as in the others."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(["a", "b", "c"], cells // 3)
    rates = np.ones((cells, genes))
    for i, label in enumerate("abc"):
        rates[labels == label, 20 * i : 20 * (i + 1)] *= strength
    counts = rng.poisson(2 * rates)
    x = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4).astype(np.float32)
    return CellArrays(counts, x, types=labels)


def test_types_of_a_perfect_generator_and_of_weak_ones():
    train, real, generated = (typed_cells(seed) for seed in range(3))
    pooled, per_label = judge_types(train, real, generated)
    assert set(per_label) == {"a", "b", "c"}
    assert pooled["purity"] == pytest.approx(1, abs=0.05) and pooled["f1"] > 0.95
    assert pooled["lfc_slope"] == pytest.approx(1, abs=0.1)
    assert pooled["de_recovery"] > 0.5  # 20 of the 50 are markers, the other 30 are chance
    assert all(set(row) == {"purity", "lfc_slope", "de_recovery"} for row in per_label.values())
    assert judge_types(train, real, typed_cells(2, strength=1.5))[0]["lfc_slope"] < 0.6


def test_wrong_labels():
    train, real, generated = (typed_cells(seed) for seed in range(3))
    generated.types = np.repeat(["b", "a", "c"], 100)
    pooled, per_label = judge_types(train, real, generated)
    assert per_label["a"]["purity"] < 0.1 and per_label["c"]["purity"] > 0.9
    assert pooled["f1"] < 0.5 and per_label["a"]["lfc_slope"] < 0.1


def test_rare_types_have_their_row_alone():
    train, real, generated = (typed_cells(seed, cells=90) for seed in range(3))
    assert metrics.judged_labels(train, real, generated, 30) == ["a", "b", "c"]
    assert metrics.judged_labels(train[:80], real, generated, 30) == ["a", "b"]
    without_c = judge_types(train[:60], real, generated)[0]
    pooled, per_label = judge_types(train[:80], real, generated)
    assert set(per_label) == {"a", "b", "c"} and pooled["f1"] == without_c["f1"]
    generated.types = np.repeat(["a", "b"], [89, 1])
    assert metrics.judged_labels(train, real, generated) == ["a"]
    assert judge_types(train, real, generated) == ({}, {})  # a single type differs from nothing


def test_markers_that_a_figure_names_are_specific():
    """Rather than genes of all cells, which a test with many cells finds significant."""
    train = typed_cells(0, cells=900, strength=4.0)
    counts = train.matrix.copy()
    counts[:, 60:70] = (5 + 10 * (train.types == "a"))[:, None]  # everywhere, and more in a
    counts[:, :20] = np.where((train.types == "a")[:, None], counts[:, :20], 0)
    x = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    assert set(metrics.name_markers(x, train.types, "a")[:20]) == set(range(20))
    assert metrics.log_fold_changes(x, train.types, "a")[60:70].min() > 0.3
