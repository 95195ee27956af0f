"""Classifier two-sample tests: can a classifier tell generated cells from held-out ones?

The area under the ROC curve (AUC) is 0.5 if it can't and 1 if it always can. Read it beside that of real cells, and
with the number of cells in mind: few cells train a weak classifier, which overlooks what is there to be seen.
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

from .cells import Cells


NUM_FOLDS = 5
MIN_CELLS = 4  # a side
NUM_TREES = 500
NUM_BOOSTED_GENES = 300
NUM_COUNT_FEATURES = 3  # what `count_view` has beside the genes


def paired_folds(
    real_labels: np.ndarray, other_labels: np.ndarray, num_folds: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    r"""
    Folds for telling two sets of cells apart, such that the AUC, averaged over folds, is 0.5 on average if both are
    samples of one distribution.

    Folds that are stratified by source alone don't give that: of a type with as many cells on both sides, a side that
    has more in the training folds has fewer in the test fold, and a classifier learns the wrong sign.

    - If both sides have the same number of cells of each label (so are conditional samples and references drawn), the
      cells of a label are paired at random, and a pair shares its fold. In training and in test the label then says
      nothing about the side, and the two cells of a pair are exchangeable.
    - If not, the other side's labels came by chance (an unconditional generator), while the held-out cells were split
      off by label. Folds of the held-out side have its label proportions, those of the other side are random: each is
      what it is in its whole side, so that a cell of either test side has the same distribution.
    - Without labels (give the same label to all cells) both are random.

    Args:
        real_labels (`np.ndarray` of shape `(real cells,)`): Labels of the held-out cells.
        other_labels (`np.ndarray` of shape `(other cells,)`): Labels of the cells that are compared with them.
        num_folds (`int`): Number of folds.
        rng (`np.random.Generator`): Shuffles the cells of each label.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: number of the fold of each real and of each other cell. The sizes of the folds
        differ by one cell a side at most.
    """

    def deal(labels: np.ndarray) -> np.ndarray:
        """Deals shuffled cells out, label by label; a label goes on where the last one stopped, so that the cells left
        over of small labels don't all come to the first fold."""
        shuffled = rng.permutation(len(labels))
        order = shuffled[np.argsort(labels[shuffled], kind="stable")]
        folds = np.empty(len(labels), dtype=np.int64)
        folds[order] = np.arange(len(labels)) % num_folds
        return folds

    real_labels, other_labels = np.asarray(real_labels).astype(str), np.asarray(other_labels).astype(str)
    real_folds = deal(real_labels)
    if np.array_equal(np.sort(real_labels), np.sort(other_labels)):
        # Dealt from the same place in the same order of labels: as many cells of each label as on the real side.
        return real_folds, deal(other_labels)
    return real_folds, deal(np.zeros(len(other_labels)))


def expression_view(cells: Cells) -> np.ndarray:
    """Log expression, `(cells, genes)`."""
    return cells.expression


def count_view(cells: Cells) -> np.ndarray:
    """
    What was measured, `(cells, genes + 3)`: log counts that no library size divides (or log values as they are), then
    the number of detected genes, log library size and the share of the library that lies in genes which are not judged
    (the last two are 0 of log values).
    """
    detected = (cells.matrix > 0).sum(axis=1)
    if cells.library_size is None:
        columns = [cells.matrix, detected, np.zeros(len(cells)), np.zeros(len(cells))]
    else:
        columns = [np.log1p(cells.matrix), detected, np.log1p(cells.library_size), cells.other_genes_share()]
    return np.column_stack(columns).astype(np.float32)


class MostVariableGenes(TransformerMixin, BaseEstimator):
    """
    Of [`count_view`], the genes that vary most in the training folds, whichever side they are on, and all columns that
    are no genes.

    Args:
        num_genes (`int`, defaults to 300): Genes to keep.
    """

    def __init__(self, num_genes: int = NUM_BOOSTED_GENES):
        self.num_genes = num_genes

    def fit(self, x: np.ndarray, y: np.ndarray | None = None) -> "MostVariableGenes":
        genes = np.argsort(-x[:, :-NUM_COUNT_FEATURES].var(axis=0), kind="stable")[: self.num_genes]
        self.columns_ = np.append(genes, np.arange(x.shape[1] - NUM_COUNT_FEATURES, x.shape[1]))
        return self

    def transform(self, x: np.ndarray) -> np.ndarray:
        return x[:, self.columns_]


def forest(shape: tuple[int, int], seed: int = 0, n_jobs: int | None = None) -> ClassifierMixin:
    """500 trees: sees thresholds of single genes and how few of them go together."""
    return RandomForestClassifier(NUM_TREES, min_samples_leaf=2, n_jobs=n_jobs, random_state=seed)


def boosting(shape: tuple[int, int], seed: int = 0, n_jobs: int | None = None) -> ClassifierMixin:
    """
    Gradient boosting: adds up many weak signs, and sees depth and exact counts.

    Small trees on the 300 genes that vary most in the training folds (whichever side they are on): a ninth of the time
    of trees of 31 leaves on 2,000 genes, and about as much seen on one dataset (lab/ruler.md).
    """
    return make_pipeline(
        MostVariableGenes(),
        HistGradientBoostingClassifier(
            learning_rate=0.1,
            max_iter=100,
            max_leaf_nodes=8,
            max_bins=16,
            max_features=0.1,
            min_samples_leaf=max(5, min(20, shape[0] // 20)),
            early_stopping=False,
            random_state=seed,
        ),
    )


def regression(shape: tuple[int, int], seed: int = 0, n_jobs: int | None = None) -> ClassifierMixin:
    """Logistic regression on 50 principal components of standardised genes: sees shifts that many genes share."""
    return make_pipeline(
        StandardScaler(),
        PCA(min(50, max(1, shape[0] // 4), shape[1]), random_state=seed),
        StandardScaler(),
        LogisticRegression(C=0.1, max_iter=500),
    )


# What each judge looks at, and the function that makes its classifier for (training cells, features)
JUDGES: dict[str, tuple[Callable[[Cells], np.ndarray], Callable[..., ClassifierMixin]]] = {
    "forest": (expression_view, forest),
    "boosting": (count_view, boosting),
    "regression": (expression_view, regression),
}


def two_sample_auc(
    real: Cells,
    other: Cells,
    view: Callable[[Cells], np.ndarray],
    make_classifier: Callable[..., ClassifierMixin],
    seed: int = 0,
    n_jobs: int | None = None,
) -> float:
    """
    AUC of one classifier that tells other cells from real ones, averaged over 5 folds of [`paired_folds`] (fewer where
    a side has fewer cells).

    The average over folds, not the AUC of all predictions together: classifiers of different folds are on different
    scales, and what shifts one scale against another is again which side has more of a type in training.

    Args:
        real ([`Cells`]): Held-out cells.
        other ([`Cells`]): Generated cells or real ones.
        view (`Callable`): Makes of [`Cells`] what the classifier sees, `(cells, features)`.
        make_classifier (`Callable`): Makes a classifier of `(shape, seed, n_jobs)`, see [`JUDGES`].
        seed (`int`, defaults to 0): Seed of the folds and of the classifier.
        n_jobs (`int`, *optional*): Threads of the forest; all cores by default.

    Returns:
        `float`: 0.5 on average if both are samples of one distribution, 1 if no cell is mistaken.

    Raises:
        ValueError: If a side has fewer than 4 cells.
    """
    fewest = min(len(real), len(other))
    if fewest < MIN_CELLS:
        raise ValueError(
            f"A classifier needs at least {MIN_CELLS} cells on each side; there are {len(real)} held-out and"
            f" {len(other)} other cells: judge more cells."
        )
    num_folds = min(NUM_FOLDS, fewest)
    real_labels, other_labels = (np.zeros(len(c)) if c.labels is None else c.labels for c in (real, other))
    folds = np.concatenate(paired_folds(real_labels, other_labels, num_folds, np.random.default_rng(seed)))
    x, y = np.vstack([view(real), view(other)]), np.repeat([0, 1], [len(real), len(other)])
    aucs = []
    # Trees grow in `n_jobs` threads. What is left is small, and its threads would wait for each other: it has one.
    with threadpool_limits(1):
        for fold in range(num_folds):
            in_training = folds != fold
            classifier = make_classifier(x[in_training].shape, seed=seed, n_jobs=-1 if n_jobs is None else n_jobs)
            classifier.fit(x[in_training], y[in_training])
            scores = classifier.predict_proba(x[~in_training])[:, 1]
            aucs.append(roc_auc_score(y[~in_training], scores))
    return float(np.mean(aucs))


def judge(real: Cells, other: Cells, seed: int = 0, n_jobs: int | None = None) -> dict[str, float]:
    """
    AUC of each judge: [`two_sample_auc`] with each of [`JUDGES`].

    Args:
        real ([`Cells`]): Held-out cells.
        other ([`Cells`]): Generated cells or real ones.
        seed (`int`, defaults to 0): Seed of the folds and of the classifiers.
        n_jobs (`int`, *optional*): Threads of the forest; all cores by default.

    Returns:
        `dict[str, float]`: `"forest"`, `"boosting"`, `"regression"`.

    Raises:
        ValueError: If a side has fewer than 4 cells.
    """
    return {
        name: two_sample_auc(real, other, view, make_classifier, seed, n_jobs)
        for name, (view, make_classifier) in JUDGES.items()
    }
