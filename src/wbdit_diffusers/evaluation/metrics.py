"""Metrics of generated cells: arrays in, floats out.

They take log-normalised expression `(cells, genes)` or, for distances, its principal components `(cells, dimensions)`,
of held-out cells (`real`) and of generated cells. No metric is meaningful alone: compare it with the real reference.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import spearmanr, ttest_ind, wasserstein_distance
from sklearn.base import ClassifierMixin
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .cells import CellArrays


MARKERS_PER_TYPE = 50
MIN_TRAIN_CELLS = 30  # of a label
NUM_NEIGHBORS = 5
SPECIFIC = 0.2  # of the cells of a label, beyond those of others, express a gene that names it


def wasserstein2(real: np.ndarray, generated: np.ndarray) -> float:
    """Exact 2-Wasserstein distance of two sets of equally many points, by optimal assignment."""
    cost = cdist(real, generated, "sqeuclidean")
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))


def mmd2(real: np.ndarray, generated: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy with five Gaussian kernels, which may be slightly negative."""
    # The bandwidths are ¼ to 4 times the median squared distance between real cells.
    within_real = cdist(real, real, "sqeuclidean")
    median = np.median(within_real[np.triu_indices(len(real), k=1)])

    def kernel(distance: np.ndarray) -> np.ndarray:
        return np.mean([np.exp(-distance / (scale * median)) for scale in (0.25, 0.5, 1, 2, 4)], axis=0)

    within = 0.0  # without the diagonals
    for matrix in (kernel(within_real), kernel(cdist(generated, generated, "sqeuclidean"))):
        within += (matrix.sum() - np.trace(matrix)) / (len(matrix) * (len(matrix) - 1))
    return float(within - 2 * kernel(cdist(real, generated, "sqeuclidean")).mean())


def distances(real: np.ndarray, generated: np.ndarray) -> dict[str, float]:
    """[`wasserstein2`] and [`mmd2`]; none for fewer than two points, and no `w2` for different numbers."""
    if min(len(real), len(generated)) < 2:
        return {}
    w2 = {"w2": wasserstein2(real, generated)} if len(real) == len(generated) else {}
    return w2 | {"mmd2": mmd2(real, generated)}


def gene_statistics(real: np.ndarray, generated: np.ndarray) -> dict[str, float]:
    """Agreement of gene means, variances, zeros and, of the 200 most variable real genes, correlation matrices."""
    variance = real.var(axis=0)
    top = np.argsort(variance)[-200:]
    # A gene that no cell expresses has no correlation.
    top = top[(variance[top] > 0) & (generated[:, top].var(axis=0) > 0)]
    upper = np.triu_indices(len(top), k=1)
    correlations = [np.corrcoef(x[:, top].T)[upper] for x in (real, generated)]
    return {
        "mean_pearson": float(np.corrcoef(real.mean(axis=0), generated.mean(axis=0))[0, 1]),
        "mean_spearman": float(spearmanr(real.mean(axis=0), generated.mean(axis=0)).statistic),
        "variance_pearson": float(np.corrcoef(variance, generated.var(axis=0))[0, 1]),
        "variance_ratio": float(generated.var(axis=0).sum() / variance.sum()),
        "zero_fraction_error": float(np.abs((real == 0).mean(axis=0) - (generated == 0).mean(axis=0)).mean()),
        "gene_correlation": float(np.corrcoef(*correlations)[0, 1]),
    }


def manifold_metrics(real: np.ndarray, generated: np.ndarray) -> dict[str, float]:
    """Precision, recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797), with balls of five neighbours."""
    num_neighbors = min(NUM_NEIGHBORS, len(real) - 1, len(generated) - 1)
    neighbors = (NearestNeighbors(n_neighbors=num_neighbors).fit(cells).kneighbors() for cells in (real, generated))
    real_radii, generated_radii = (distances[:, -1] for distances, _ in neighbors)
    distance = cdist(real, generated)  # (real cells, generated cells)
    in_real_ball, in_generated_ball = distance < real_radii[:, None], distance < generated_radii
    return {
        "precision": float(in_real_ball.any(axis=0).mean()),
        "recall": float(in_generated_ball.any(axis=1).mean()),
        "density": float(in_real_ball.sum(axis=0).mean() / num_neighbors),
        "coverage": float(in_real_ball.any(axis=1).mean()),
    }


def nearest_distances(cells: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distance of each cell to the nearest of the others, `(cells,)`; both arguments are `(cells, dimensions)`."""
    return NearestNeighbors(n_neighbors=1).fit(others).kneighbors(cells)[0][:, 0]


def nearest_training_cell_ratio(train: np.ndarray, real: np.ndarray, generated: np.ndarray) -> float:
    """Median distance to the nearest training cell, relative to held-out cells: below 0.9 is memory, 0 copies."""
    return float(np.median(nearest_distances(generated, train)) / np.median(nearest_distances(real, train)))


def membership_auc(train_distances: np.ndarray, test_distances: np.ndarray) -> float:
    """AUC that a training cell is nearer to the generated cells than a held-out cell: 0.5 is no memory, 1 copies."""
    is_train = np.repeat([1, 0], [len(train_distances), len(test_distances)])
    return float(roc_auc_score(is_train, -np.concatenate([train_distances, test_distances])))


def mean_by_donor(distances: np.ndarray, donors: np.ndarray) -> np.ndarray:
    """Mean distance of each donor's cells, `(donors,)`. [`membership_auc`] of these shows which donors were seen."""
    return np.array([distances[donors == donor].mean() for donor in np.unique(donors)])


def library_size_w1(real: np.ndarray, generated: np.ndarray) -> float:
    """Wasserstein-1 distance of log library sizes `(cells,)`: 0.1 is a tenth of the counts on average."""
    # An empty cell counts as a cell of one count: 0 has no logarithm.
    return float(wasserstein_distance(*(np.log(np.maximum(sizes, 1)) for sizes in (real, generated))))


def other_genes_error(real: np.ndarray, generated: np.ndarray) -> dict[str, float]:
    """Errors of the fraction of counts in genes that are not judged, `(cells,)`: of its mean, and Wasserstein-1."""
    return {
        "other_genes_mean_error": float(generated.mean() - real.mean()),
        "other_genes_w1": float(wasserstein_distance(real, generated)),
    }


def cell_type_classifier(x: np.ndarray, labels: np.ndarray, seed: int = 0) -> ClassifierMixin:
    """Logistic regression on 50 standardised principal components, fitted on cells `x` (cells × genes)."""
    pca = PCA(min(50, *x.shape), random_state=seed)
    return make_pipeline(pca, StandardScaler(), LogisticRegression(C=0.1, max_iter=2000)).fit(x, labels)


def log_fold_changes(x: np.ndarray, labels: np.ndarray, label: str) -> np.ndarray:
    """log2 fold change of log1p(CP10k) `(cells, genes)` between the cells of one label and all others: `(genes,)`."""
    of_label = labels == label
    mean, others = np.expm1(x[of_label]).mean(axis=0), np.expm1(x[~of_label]).mean(axis=0)
    return np.log2((mean + 1) / (others + 1))


def rank_markers(x: np.ndarray, labels: np.ndarray, label: str) -> np.ndarray:
    """Positions of genes, ranked by Welch's t between the cells of one label and all others, highest first."""
    of_label = labels == label
    # For a gene that no cell expresses, t is 0 instead of NaN.
    return np.argsort(-np.nan_to_num(ttest_ind(x[of_label], x[~of_label], equal_var=False).statistic), kind="stable")


def name_markers(x: np.ndarray, labels: np.ndarray, label: str) -> np.ndarray:
    """Genes in the order in which a figure names them: by log2 fold change times the fraction of expressing cells."""
    of_label = labels == label
    fraction, others = ((x[cells] > 0).mean(axis=0) for cells in (of_label, ~of_label))
    score = np.maximum(log_fold_changes(x, labels, label), 0) * fraction
    # Genes that hardly more cells of the label than others express, such as ribosomal ones, come last.
    return np.lexsort((-score, fraction - others < SPECIFIC))


def compare_labels(
    train: CellArrays,
    real: CellArrays,
    generated: CellArrays,
    labels: list[str],
    frequent: list[str],
    seed: int = 0,
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Metrics that need labels, over all `frequent` ones and of each: [`TITLES`] says what they are."""
    if len(labels) < 2:
        return {}, {}
    classifier = cell_type_classifier(train.expression, train.types, seed)
    real_hits, generated_hits = (classifier.predict(cells.expression) == cells.types for cells in (real, generated))

    def purity(label: list[str]) -> float:
        """Accuracy ratio; NaN if the classifier recognises no real cell of the label."""
        accuracy = real_hits[np.isin(real.types, label)].mean()
        return float(generated_hits[np.isin(generated.types, label)].mean() / accuracy) if accuracy else float("nan")

    def slope(x: np.ndarray, y: np.ndarray) -> float:
        """Through the origin: changes in few held-out cells are noisy, and an intercept would flatten the slope."""
        return float(x @ y / (x @ x)) if x.any() else float("nan")

    per_label, changes = {}, {}
    for label in labels:
        markers, first, second = (
            rank_markers(cells.expression, cells.types, label)[:MARKERS_PER_TYPE] for cells in (train, real, generated)
        )
        changes[label] = [log_fold_changes(c.expression, c.types, label)[markers] for c in (real, generated)]
        per_label[label] = {
            "purity": purity([label]),
            "lfc_slope": slope(*changes[label]),
            "de_recovery": len(np.intersect1d(first, second)) / len(first),
        }
        if generated.library_size is not None:
            sizes = (cells[cells.types == label].library_size for cells in (real, generated))
            per_label[label]["library_size_w1"] = library_size_w1(*sizes)
    if not frequent:
        return {}, per_label
    predicted = cell_type_classifier(generated.expression, generated.types, seed).predict(real.expression)
    types, judged = np.asarray(real.types), np.isin(real.types, frequent)
    pooled = {
        "purity": purity(frequent),
        "f1": float(f1_score(types[judged], predicted[judged], labels=frequent, average="macro", zero_division=0)),
        "lfc_slope": slope(*map(np.concatenate, zip(*(changes[label] for label in frequent)))),
        "de_recovery": float(np.mean([per_label[label]["de_recovery"] for label in frequent])),
    }
    return pooled, per_label


def judged_labels(train: CellArrays, real: CellArrays, generated: CellArrays, min_cells: int = 2) -> list[str]:
    """Labels with at least `min_cells` training cells, and two on either side, which a variance needs."""
    names, numbers = np.unique(train.types, return_counts=True)
    enough = names[numbers >= min_cells]
    return [str(name) for name in enough if min((side.types == name).sum() for side in (real, generated)) >= 2]
