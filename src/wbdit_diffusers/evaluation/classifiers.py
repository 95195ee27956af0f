"""Classifier two-sample tests: can a classifier separate generated cells from held-out cells?

The area under the ROC curve (AUC) is 0.5 if it cannot, and 1 if it always can. Compare it with the AUC of real cells.
"""

from collections.abc import Callable

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
NUM_BOOSTED_GENES = 300
NUM_COUNT_FEATURES = 3  # columns of `count_view` after those of genes


def paired_folds(
    real_labels: np.ndarray, other_labels: np.ndarray, num_folds: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """
    Folds for separating two sets of cells, such that the mean AUC over folds is 0.5 if both have one distribution.

    Folds stratified by source alone do not have this property. If both sides have equally many cells of a type, a side
    with more of them in the training folds has fewer in the test fold. A classifier then learns the wrong sign.

    - If both sides have the same label counts, as for conditional samples, cells of a label are paired at random. A
      pair shares its fold, so the label carries no information about the side.
    - Otherwise, the other side drew its labels at random, as an unconditional generator does. Folds of the held-out
      side keep its label proportions, and folds of the other side are random.

    Takes labels `(cells,)`. Returns the fold of each real and of each other cell. Sizes differ by at most one a side.
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


def expression_view(cells: CellArrays) -> np.ndarray:
    """Log expression, `(cells, genes)`."""
    return cells.expression


def count_view(cells: CellArrays) -> np.ndarray:
    """
    Measured values, `(cells, genes + 3)`: log counts without normalisation (or log values), number of detected genes,
    log library size and fraction of counts in other genes. The last two are 0 for log values.
    """
    detected = (cells.matrix > 0).sum(axis=1)
    if cells.library_size is None:
        columns = [cells.matrix, detected, np.zeros(len(cells)), np.zeros(len(cells))]
    else:
        columns = [np.log1p(cells.matrix), detected, np.log1p(cells.library_size), cells.other_genes_share()]
    return np.column_stack(columns).astype(np.float32)


class MostVariableGenes(TransformerMixin, BaseEstimator):
    """Selects the most variable genes of the training folds from a [`count_view`], and the last three columns."""

    def __init__(self, num_genes: int = NUM_BOOSTED_GENES):
        self.num_genes = num_genes

    def fit(self, x: np.ndarray, y: np.ndarray | None = None) -> "MostVariableGenes":
        genes = np.argsort(-x[:, :-NUM_COUNT_FEATURES].var(axis=0), kind="stable")[: self.num_genes]
        self.columns_ = np.append(genes, np.arange(x.shape[1] - NUM_COUNT_FEATURES, x.shape[1]))
        return self

    def transform(self, x: np.ndarray) -> np.ndarray:
        return x[:, self.columns_]


def forest(shape: tuple[int, int], seed: int = 0, n_jobs: int | None = None) -> ClassifierMixin:
    """500 trees, which find thresholds of single genes and combinations of a few."""
    return RandomForestClassifier(NUM_TREES, min_samples_leaf=2, n_jobs=n_jobs, random_state=seed)


def boosting(shape: tuple[int, int], seed: int = 0, n_jobs: int | None = None) -> ClassifierMixin:
    """Gradient boosting, which adds up many weak signals and uses sequencing depth and counts (lab/ruler.md)."""
    classifier = HistGradientBoostingClassifier(
        max_leaf_nodes=8,
        max_bins=16,
        max_features=0.1,
        min_samples_leaf=max(5, min(20, shape[0] // 20)),
        early_stopping=False,
        random_state=seed,
    )
    return make_pipeline(MostVariableGenes(), classifier)


def regression(shape: tuple[int, int], seed: int = 0, n_jobs: int | None = None) -> ClassifierMixin:
    """Logistic regression on 50 principal components of standardised genes, which finds shifts of many genes."""
    pca = PCA(min(50, max(1, shape[0] // 4), shape[1]), random_state=seed)
    return make_pipeline(StandardScaler(), pca, StandardScaler(), LogisticRegression(C=0.1, max_iter=500))


# The features of each judge, and the function that makes its classifier for (training cells, features)
JUDGES: dict[str, tuple[Callable[[CellArrays], np.ndarray], Callable[..., ClassifierMixin]]] = {
    "forest": (expression_view, forest),
    "boosting": (count_view, boosting),
    "regression": (expression_view, regression),
}


def two_sample_auc(
    real: CellArrays,
    other: CellArrays,
    view: Callable[[CellArrays], np.ndarray],
    make_classifier: Callable[..., ClassifierMixin],
    seed: int = 0,
    n_jobs: int | None = None,
) -> float:
    """
    AUC of one classifier that separates other cells from real cells, averaged over five [`paired_folds`]. The values
    of [`JUDGES`] are pairs of `view` and `make_classifier`. `n_jobs` is the number of threads; all cores by default.
    """
    fewest = min(len(real), len(other))
    if fewest < 4:
        raise ValueError(f"Judge at least 4 cells a side: there are {len(real)} held-out cells.")
    num_folds = min(NUM_FOLDS, fewest)
    folds = np.concatenate(paired_folds(real.labels, other.labels, num_folds, np.random.default_rng(seed)))
    x, y = np.vstack([view(real), view(other)]), np.repeat([0, 1], [len(real), len(other)])
    aucs = []
    # Trees grow in `n_jobs` threads. The rest is small, and more threads would only wait for each other.
    with threadpool_limits(1):
        for fold in range(num_folds):
            train, test = folds != fold, folds == fold
            classifier = make_classifier(x[train].shape, seed=seed, n_jobs=-1 if n_jobs is None else n_jobs)
            scores = classifier.fit(x[train], y[train]).predict_proba(x[test])[:, 1]
            aucs.append(roc_auc_score(y[test], scores))
    # The AUC of all predictions together would be biased, because the scales of two folds differ.
    return float(np.mean(aucs))


def judge(real: CellArrays, other: CellArrays, seed: int = 0, n_jobs: int | None = None) -> dict[str, float]:
    """[`two_sample_auc`] of each of [`JUDGES`]: `"forest"`, `"boosting"`, `"regression"`."""
    return {name: two_sample_auc(real, other, *JUDGES[name], seed, n_jobs) for name in JUDGES}
