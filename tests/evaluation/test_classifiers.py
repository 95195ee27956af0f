"""Two-sample tests: an AUC of 0.5 for equal distributions, more for different ones."""

import anndata as ad
import numpy as np
import pytest

from wbdit_diffusers.evaluation.cells import CellArrays, real_cells
from wbdit_diffusers.evaluation.classifiers import JUDGES, judge, paired_folds, two_sample_auc


class SubtypeTable:
    """Uses only the subtype in the first gene, and predicts the side on which it is more common in training."""

    def fit(self, x: np.ndarray, y: np.ndarray) -> "SubtypeTable":
        subtypes = x[:, 0].astype(int)
        numbers = [np.bincount(subtypes[y == side], minlength=100) + 1 for side in (0, 1)]
        self.share = numbers[1] / (numbers[0] + numbers[1])
        return self

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        share = self.share[x[:, 0].astype(int)]
        return np.column_stack([1 - share, share])


def typed_sides(setting: str, size: int, rng: np.random.Generator) -> tuple[CellArrays, CellArrays]:
    """Two sides of one distribution of 8 types, each with 3 subtypes that the folds do not know."""
    frequencies = np.array([30, 20, 15, 10, 10, 7, 5, 3]) / 100
    real = np.repeat(np.arange(8), np.diff(np.rint(np.cumsum([0, *frequencies]) * size).astype(int)))
    other = real if setting == "matched" else rng.choice(8, size, p=frequencies)
    if setting == "unlabelled":
        real = rng.choice(8, size, p=frequencies)
    sides = []
    for labels in (real, other):
        genes = (3 * labels + rng.integers(3, size=size))[:, None].astype(np.float32)
        sides.append(CellArrays(genes, genes, labels=None if setting == "unlabelled" else labels))
    return tuple(sides)


def quick_auc(real: CellArrays, other: CellArrays, seed: int = 0) -> float:
    view, _ = JUDGES["forest"]
    return two_sample_auc(real, other, view, lambda shape, seed: SubtypeTable(), seed)


def mean_auc(setting: str, size: int, repeats: int) -> float:
    sides = (typed_sides(setting, size, np.random.default_rng([seed, size])) for seed in range(repeats))
    return float(np.mean([quick_auc(*pair, seed) for seed, pair in enumerate(sides)]))


@pytest.mark.parametrize("setting", ["matched", "iid", "unlabelled"])
@pytest.mark.parametrize("size, repeats", [(60, 150), (150, 80), (500, 40), (2000, 20)])
def test_two_samples_of_one_distribution_are_not_separated(setting, size, repeats):
    """With a classifier of types alone; the standard error of these means is at most 0.007."""
    assert mean_auc(setting, size, repeats) == pytest.approx(0.5, abs=0.02)


def halves(pbmc: ad.AnnData, seed: int, num_genes: int = 100) -> tuple[CellArrays, CellArrays]:
    """Real cells split in two with the same labels."""
    total = np.asarray(pbmc.X.sum(axis=0)).ravel()
    cells = real_cells(pbmc, pbmc.var_names[np.argsort(-total)[:num_genes]], label_keys=["cell_type"])
    rng, sides = np.random.default_rng(seed), []
    for label in np.unique(cells.labels):
        of_label = rng.permutation(np.flatnonzero(cells.labels == label))[:60]
        sides.append(of_label[: len(of_label) // 2 * 2].reshape(2, -1))
    return tuple(cells[side] for side in np.hstack(sides))


def test_the_judges_do_not_separate_real_cells(pbmc):
    aucs = [judge(*halves(pbmc, seed), seed=seed) for seed in range(3)]
    for name in JUDGES:
        # The standard deviation of one is about 0.03, so that of the mean 0.017.
        assert np.mean([row[name] for row in aucs]) == pytest.approx(0.5, abs=0.06), name
    # The quickest of the three, often enough to see a small bias
    aucs = [two_sample_auc(*halves(pbmc, seed), *JUDGES["regression"], seed) for seed in range(25)]
    assert np.mean(aucs) == pytest.approx(0.5, abs=0.02)


def test_permuted_genes_and_doubled_counts_are_found(pbmc):
    """Counts of each gene permuted over the cells of a type; then all counts doubled, which only counts show."""
    real, other = halves(pbmc, 0)
    rng, matrix = np.random.default_rng(0), other.matrix.copy()
    for label in np.unique(other.labels):
        of_label = other.labels == label
        matrix[of_label] = rng.permuted(matrix[of_label], axis=0)
    expression = np.log1p(matrix * (1e4 / other.library_size)[:, None]).astype(np.float32)
    permuted = CellArrays(matrix, expression, other.library_size, other.labels)
    deeper = CellArrays(2 * other.matrix, other.expression, 2 * other.library_size, other.labels)
    of_permuted, of_deeper, null = (judge(real, cells) for cells in (permuted, deeper, other))
    assert max(of_permuted.values()) > 0.65 and of_permuted["boosting"] > null["boosting"] + 0.1
    assert of_deeper["boosting"] > 0.95
    assert abs(of_deeper["forest"] - 0.5) < 0.12 and abs(of_deeper["regression"] - 0.5) < 0.12


def test_pairs_share_their_folds():
    rng = np.random.default_rng(0)
    labels = np.repeat(["a", "b", "c", "d", "e"], [1, 2, 7, 23, 40])
    other = rng.permutation(labels)
    folds = paired_folds(labels, other, 5, rng)
    assert all(sorted(labels[folds[0] == i]) == sorted(other[folds[1] == i]) for i in range(5))
    assert np.ptp(np.bincount(folds[0])) <= 1
    # With other label counts, folds of the other side are random: a rare label is not dealt out evenly.
    labels, other = np.repeat(["a", "b"], [50, 50]), np.repeat(["a", "b"], [20, 83])
    real_folds, other_folds = paired_folds(labels, other, 5, rng)
    assert np.bincount(real_folds[:50]).tolist() == np.bincount(real_folds[50:]).tolist() == [10] * 5
    assert np.ptp(np.bincount(other_folds)) <= 1
    assert np.std([np.bincount(paired_folds(labels, other, 5, rng)[1][:20], minlength=5) for _ in range(20)]) > 1


def test_log_values_have_no_library_sizes():
    x = np.random.default_rng(0).gamma(1, 1, (40, 10)).astype(np.float32)
    real, other = CellArrays(x[:20], x[:20]), CellArrays(x[20:] + 1, x[20:] + 1)
    assert two_sample_auc(real, other, *JUDGES["boosting"]) > 0.8
