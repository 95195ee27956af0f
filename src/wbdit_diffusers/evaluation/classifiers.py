"""Classifier two-sample tests: can a classifier separate generated cells from held-out cells?

The area under the ROC curve (AUC) is 0.5 if it cannot, and 1 if it always can. Compare it with the AUC of real cells.
"""

from collections.abc import Callable
from operator import attrgetter

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from .cells import CellArrays


NUM_FOLDS = 5
NUM_TREES = 500
NUM_ROUNDS = 100  # of boosting
NUM_BOOSTED_GENES = 300
NUM_COUNT_FEATURES = 3  # columns of `count_view` after those of genes


def paired_folds(
    real_labels: np.ndarray, other_labels: np.ndarray, num_folds: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """
    The fold of each cell of two sets, such that the mean AUC is 0.5 if both have one distribution. Folds stratified by
    source alone teach the wrong sign: a side with more cells of a type in training has fewer in the test fold. If both
    sides have the same label counts, cells of a label are paired, and a pair shares its fold. Otherwise the other side
    drew its labels at random, and its folds are random.
    """

    def deal(labels: np.ndarray) -> np.ndarray:
        """Deals shuffled cells, sorted by label. A new start at each label would fill the first fold."""
        shuffled = rng.permutation(len(labels))
        order = shuffled[np.argsort(labels[shuffled], kind="stable")]
        folds = np.empty(len(labels), dtype=np.int64)
        folds[order] = np.arange(len(labels)) % num_folds
        return folds

    real_labels, other_labels = np.asarray(real_labels).astype(str), np.asarray(other_labels).astype(str)
    is_paired = np.array_equal(np.sort(real_labels), np.sort(other_labels))
    return deal(real_labels), deal(other_labels if is_paired else np.zeros(len(other_labels)))


def count_view(cells: CellArrays) -> np.ndarray:
    """Log counts without normalisation (or log values), detected genes, log library size, share of other genes."""
    detected = (cells.matrix > 0).sum(axis=1)
    if cells.library_size is None:
        columns = [cells.matrix, detected, np.zeros(len(cells)), np.zeros(len(cells))]
    else:
        columns = [np.log1p(cells.matrix), detected, np.log1p(cells.library_size), cells.other_genes_share()]
    return np.column_stack(columns).astype(np.float32)


class MostVariableGenes(TransformerMixin, BaseEstimator):
    """Selects the most variable genes of the training folds from a [`count_view`], and the last three columns."""

    def fit(self, x: np.ndarray, y: np.ndarray | None = None) -> "MostVariableGenes":
        genes = np.argsort(-x[:, :-NUM_COUNT_FEATURES].var(axis=0), kind="stable")[:NUM_BOOSTED_GENES]
        self.columns_ = np.append(genes, np.arange(x.shape[1] - NUM_COUNT_FEATURES, x.shape[1]))
        return self

    def transform(self, x: np.ndarray) -> np.ndarray:
        return x[:, self.columns_]


def forest(shape: tuple[int, int], seed: int) -> ClassifierMixin:
    """500 trees, which find thresholds of single genes and combinations of a few."""
    return RandomForestClassifier(NUM_TREES, min_samples_leaf=2, n_jobs=-1, random_state=seed)


def boosting(shape: tuple[int, int], seed: int) -> ClassifierMixin:
    """Gradient boosting, which adds up many weak signals and uses sequencing depth and counts (lab/ruler.md)."""
    settings = {"max_iter": NUM_ROUNDS, "max_leaf_nodes": 8, "max_bins": 16, "max_features": 0.1, "random_state": seed}
    settings |= {"min_samples_leaf": max(5, min(20, shape[0] // 20)), "early_stopping": False}
    return make_pipeline(MostVariableGenes(), HistGradientBoostingClassifier(**settings))


def regression(shape: tuple[int, int], seed: int) -> ClassifierMixin:
    """Logistic regression on 50 principal components of standardised genes, which finds shifts of many genes."""
    pca = PCA(min(50, max(1, shape[0] // 4), shape[1]), random_state=seed)
    return make_pipeline(StandardScaler(), pca, StandardScaler(), LogisticRegression(C=0.1, max_iter=500))


# The features of each judge, and the function that makes its classifier for (training cells, features)
JUDGES: dict[str, tuple[Callable, Callable]] = {
    "forest": (attrgetter("expression"), forest),
    "boosting": (count_view, boosting),
    "regression": (attrgetter("expression"), regression),
}


def two_sample_auc(
    real: CellArrays, other: CellArrays, view: Callable, make_classifier: Callable, seed: int = 0
) -> float:
    """The AUC with which a classifier (`view`, `make_classifier`) separates other cells, averaged over five folds."""
    num_folds = min(NUM_FOLDS, len(real), len(other))
    folds = np.concatenate(paired_folds(real.labels, other.labels, num_folds, np.random.default_rng(seed)))
    x, y = np.vstack([view(real), view(other)]), np.repeat([0, 1], [len(real), len(other)])
    aucs = []
    # Trees grow on all cores. The rest is small, and more threads would only wait for each other.
    with threadpool_limits(1):
        for fold in range(num_folds):
            train, test = folds != fold, folds == fold
            classifier = make_classifier(x[train].shape, seed)
            scores = classifier.fit(x[train], y[train]).predict_proba(x[test])[:, 1]
            aucs.append(roc_auc_score(y[test], scores))
    # The AUC of all predictions together would be biased, because the scales of two folds differ.
    return float(np.mean(aucs))


def judge(real: CellArrays, other: CellArrays, seed: int = 0) -> dict[str, float]:
    """[`two_sample_auc`] of each of [`JUDGES`]: `"forest"`, `"boosting"`, `"regression"`."""
    return {name: two_sample_auc(real, other, *JUDGES[name], seed) for name in JUDGES}
