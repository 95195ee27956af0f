"""How real generated cells are: arrays in, floats out.

Every function takes log-normalised expression (cells × genes) of cells that were held out from training, and of
generated ones. None of them means anything alone: print the same figure for real cells, the floor, beside it.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import spearmanr
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline


def random_forest_auc(
    real: np.ndarray, generated: np.ndarray, num_components: int | None = None, seed: int = 0
) -> float:
    """
    Area under the ROC curve of a random forest that tells generated cells from real ones: 0.5 is the best.

    500 trees, `min_samples_leaf` 2, 5-fold cross-validated probabilities.

    Args:
        real (`np.ndarray` of shape `(cells, genes)`): Held-out cells.
        generated (`np.ndarray` of shape `(cells, genes)`): Generated cells, as many as real ones.
        num_components (`int`, *optional*):
            Principal components, fitted inside each fold, to look at instead of genes.
        seed (`int`, defaults to 0): Seed of the folds and the trees.

    Returns:
        `float`
    """
    x = np.vstack([real, generated])
    y = np.repeat([0, 1], [len(real), len(generated)])
    classifier = RandomForestClassifier(500, min_samples_leaf=2, n_jobs=-1, random_state=seed)
    if num_components is not None:
        num_components = min(num_components, x.shape[1], len(x) * 4 // 5 - 1)
        classifier = make_pipeline(PCA(num_components, random_state=seed), classifier)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    return float(roc_auc_score(y, cross_val_predict(classifier, x, y, cv=folds, method="predict_proba")[:, 1]))


def wasserstein2(real: np.ndarray, generated: np.ndarray) -> float:
    """
    Exact 2-Wasserstein distance between two equally large sets of points, by optimal assignment.

    Args:
        real (`np.ndarray` of shape `(cells, dimensions)`): Held-out cells, e.g. in principal components.
        generated (`np.ndarray` of shape `(cells, dimensions)`): Generated cells.

    Returns:
        `float`
    """
    if len(real) != len(generated):
        raise ValueError(f"The assignment needs as many generated cells as real ones: {len(generated)}, {len(real)}.")
    cost = cdist(real, generated, "sqeuclidean")
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))


def mmd2(real: np.ndarray, generated: np.ndarray) -> float:
    """
    Unbiased squared maximum mean discrepancy. It may be slightly negative.

    The kernel is the mean of five Gaussians, `exp(-d² / bandwidth)`, whose bandwidths are ¼, ½, 1, 2 and 4 times the
    median squared distance between the real cells.

    Args:
        real (`np.ndarray` of shape `(cells, dimensions)`): Held-out cells, e.g. in principal components.
        generated (`np.ndarray` of shape `(cells, dimensions)`): Generated cells.

    Returns:
        `float`
    """
    within_real = cdist(real, real, "sqeuclidean")
    median = np.median(within_real[np.triu_indices(len(real), k=1)])

    def kernel(distance: np.ndarray) -> np.ndarray:
        return np.mean([np.exp(-distance / (scale * median)) for scale in (0.25, 0.5, 1, 2, 4)], axis=0)

    def mean_off_diagonal(matrix: np.ndarray) -> float:
        return (matrix.sum() - np.trace(matrix)) / (len(matrix) * (len(matrix) - 1))

    return float(
        mean_off_diagonal(kernel(within_real))
        + mean_off_diagonal(kernel(cdist(generated, generated, "sqeuclidean")))
        - 2 * kernel(cdist(real, generated, "sqeuclidean")).mean()
    )


def gene_statistics(real: np.ndarray, generated: np.ndarray) -> dict[str, float]:
    """
    How well per-gene statistics of generated cells match those of real ones.

    Args:
        real (`np.ndarray` of shape `(cells, genes)`): Held-out cells.
        generated (`np.ndarray` of shape `(cells, genes)`): Generated cells.

    Returns:
        `dict[str, float]`: `mean_pearson` and `mean_spearman` of the gene means, `variance_pearson` of the gene
        variances, `variance_ratio` of the total variances, `zero_fraction_error` (mean absolute), and
        `gene_correlation`: how the correlation matrices of the 200 genes of highest real variance correlate.
    """
    variance = real.var(axis=0)
    top = np.argsort(variance)[-200:]
    # A gene that no cell expresses has no correlation.
    top = top[(variance[top] > 0) & (generated[:, top].var(axis=0) > 0)]
    upper = np.triu_indices(len(top), k=1)
    real_correlation = np.corrcoef(real[:, top].T)[upper]
    generated_correlation = np.corrcoef(generated[:, top].T)[upper]
    return {
        "mean_pearson": float(np.corrcoef(real.mean(axis=0), generated.mean(axis=0))[0, 1]),
        "mean_spearman": float(spearmanr(real.mean(axis=0), generated.mean(axis=0)).statistic),
        "variance_pearson": float(np.corrcoef(variance, generated.var(axis=0))[0, 1]),
        "variance_ratio": float(generated.var(axis=0).sum() / variance.sum()),
        "zero_fraction_error": float(np.abs((real == 0).mean(axis=0) - (generated == 0).mean(axis=0)).mean()),
        "gene_correlation": float(np.corrcoef(real_correlation, generated_correlation)[0, 1]),
    }


def compare(train: np.ndarray, real: np.ndarray, generated: np.ndarray, seed: int = 0) -> dict[str, float]:
    """
    The headline metrics.

    Args:
        train (`np.ndarray` of shape `(train cells, genes)`): Training cells; the 30 principal components are theirs.
        real (`np.ndarray` of shape `(cells, genes)`): Held-out cells.
        generated (`np.ndarray` of shape `(cells, genes)`):
            Generated cells, as many as held-out ones; or training cells, for the floor.
        seed (`int`, defaults to 0): Seed of the random forest.

    Returns:
        `dict[str, float]`: `rf_auc` (genes), `rf_auc_pca` (50 components), `w2`, `mmd2` and [`gene_statistics`].
    """
    pca = PCA(min(30, *train.shape), random_state=seed).fit(train)
    real_pcs, generated_pcs = pca.transform(real), pca.transform(generated)
    return {
        "rf_auc": random_forest_auc(real, generated, seed=seed),
        "rf_auc_pca": random_forest_auc(real, generated, num_components=50, seed=seed),
        "w2": wasserstein2(real_pcs, generated_pcs),
        "mmd2": mmd2(real_pcs, generated_pcs),
        **gene_statistics(real, generated),
    }
