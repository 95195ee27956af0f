"""How real generated cells are: arrays in, floats out.

The functions take log-normalised expression (cells × genes), or its principal components, of cells that were held out
from training and of generated ones. None of them means anything alone: print the same figure for real cells, the real
reference, beside it.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist, pdist
from scipy.special import softmax
from scipy.stats import entropy, spearmanr, ttest_ind, wasserstein_distance
from sklearn.base import ClassifierMixin
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


MARKERS_PER_TYPE = 50


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


def manifold_metrics(real: np.ndarray, generated: np.ndarray, num_neighbors: int = 5) -> dict[str, float]:
    """
    Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797): is each generated cell among real
    ones, and each real cell among generated ones?

    Args:
        real (`np.ndarray` of shape `(cells, dimensions)`): Held-out cells, e.g. in principal components.
        generated (`np.ndarray` of shape `(cells, dimensions)`): Generated cells.
        num_neighbors (`int`, defaults to 5): The ball around a cell reaches to this neighbour of its own kind.

    Returns:
        `dict[str, float]`: `precision`, `recall`, `density`, `coverage`. Equal distributions reach 1 in density, and
        less than 1 in the other three: see the real reference.
    """
    num_neighbors = min(num_neighbors, len(real) - 1, len(generated) - 1)

    def radii(cells: np.ndarray) -> np.ndarray:
        return NearestNeighbors(n_neighbors=num_neighbors).fit(cells).kneighbors()[0][:, -1]

    distance = cdist(real, generated)  # (real cells, generated cells)
    in_real_ball = distance < radii(real)[:, None]
    in_generated_ball = distance < radii(generated)[None]
    return {
        "precision": float(in_real_ball.any(axis=0).mean()),
        "recall": float(in_generated_ball.any(axis=1).mean()),
        "density": float(in_real_ball.sum(axis=0).mean() / num_neighbors),
        "coverage": float(in_real_ball.any(axis=1).mean()),
    }


def nearest_training_cell_ratio(train: np.ndarray, real: np.ndarray, generated: np.ndarray) -> float:
    """
    Median distance of generated cells to their nearest training cell, divided by that of held-out cells. Below about
    0.9, training cells were memorised; copies of training cells have 0.

    Args:
        train (`np.ndarray` of shape `(train cells, dimensions)`): Training cells, e.g. in principal components.
        real (`np.ndarray` of shape `(cells, dimensions)`): Held-out cells.
        generated (`np.ndarray` of shape `(cells, dimensions)`): Generated cells.

    Returns:
        `float`
    """
    neighbors = NearestNeighbors(n_neighbors=1).fit(train)
    return float(np.median(neighbors.kneighbors(generated)[0]) / np.median(neighbors.kneighbors(real)[0]))


def membership_auc(train_distances: np.ndarray, test_distances: np.ndarray) -> float:
    """
    Membership inference: can the distance to the nearest generated cell tell a training cell from a held-out one?

    Args:
        train_distances (`np.ndarray` of shape `(train cells,)`): Of training cells, as in [`nearest_distances`].
        test_distances (`np.ndarray` of shape `(test cells,)`): Of held-out cells.

    Returns:
        `float`: AUC that a training cell is nearer than a held-out one: 0.5 is no memory, 1 are copies.
    """
    is_train = np.repeat([1, 0], [len(train_distances), len(test_distances)])
    return float(roc_auc_score(is_train, -np.concatenate([train_distances, test_distances])))


def donor_membership_auc(
    train_distances: np.ndarray, train_donors: np.ndarray, test_distances: np.ndarray, test_donors: np.ndarray
) -> float:
    """
    [`membership_auc`] of donors: distances are averaged over each donor's training cells and over each donor's
    held-out cells, so that it says whether a person was in the training data (if donors were held out) or which of a
    person's cells were (if cells were).

    Args:
        train_distances (`np.ndarray` of shape `(train cells,)`): Of training cells, as in [`nearest_distances`].
        train_donors (`np.ndarray` of shape `(train cells,)`): Their donors.
        test_distances (`np.ndarray` of shape `(test cells,)`): Of held-out cells.
        test_donors (`np.ndarray` of shape `(test cells,)`): Their donors.

    Returns:
        `float`: AUC that the training cells of a donor are nearer on average than the held-out cells of one.
    """

    def means(distances: np.ndarray, donors: np.ndarray) -> np.ndarray:
        return np.array([distances[donors == donor].mean() for donor in np.unique(donors)])

    return membership_auc(means(train_distances, train_donors), means(test_distances, test_donors))


def nearest_distances(cells: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """Distance of each cell to the nearest generated one, `(cells,)`; both `(cells, dimensions)`."""
    return NearestNeighbors(n_neighbors=1).fit(generated).kneighbors(cells)[0][:, 0]


def library_size_w1(real: np.ndarray, generated: np.ndarray) -> float:
    """
    Wasserstein-1 distance of log library sizes: 0.1 is a tenth of the counts on average.

    Args:
        real (`np.ndarray` of shape `(cells,)`): Total counts of held-out cells.
        generated (`np.ndarray` of shape `(cells,)`): Total counts of generated cells.

    Returns:
        `float`
    """
    # A cell without counts has no logarithm: it stands with those of one count.
    return float(wasserstein_distance(*(np.log(np.maximum(sizes, 1)) for sizes in (real, generated))))


def other_genes_error(real: np.ndarray, generated: np.ndarray) -> dict[str, float]:
    """
    How well the share of counts that lies in genes outside the judged ones is met.

    Args:
        real (`np.ndarray` of shape `(cells,)`): Shares of held-out cells, 0 to 1.
        generated (`np.ndarray` of shape `(cells,)`): Shares of generated cells.

    Returns:
        `dict[str, float]`: `other_genes_mean_error` (generated minus real mean) and `other_genes_w1`.
    """
    return {
        "other_genes_mean_error": float(generated.mean() - real.mean()),
        "other_genes_w1": float(wasserstein_distance(real, generated)),
    }


def cell_type_classifier(x: np.ndarray, labels: np.ndarray, seed: int = 0) -> ClassifierMixin:
    """Logistic regression on 50 standardised principal components, fitted on cells `x` (cells × genes)."""
    num_components = min(50, *x.shape)
    classifier = make_pipeline(
        PCA(num_components, random_state=seed), StandardScaler(), LogisticRegression(C=0.1, max_iter=2000)
    )
    return classifier.fit(x, labels)


def log_fold_changes(x: np.ndarray, labels: np.ndarray, label: str) -> np.ndarray:
    """
    log2 fold change of each gene, cells of one label against all others, with a pseudocount of 1.

    Args:
        x (`np.ndarray` of shape `(cells, genes)`): log1p(CP10k).
        labels (`np.ndarray` of shape `(cells,)`): Label of each cell.
        label (`str`): The label.

    Returns:
        `np.ndarray` of shape `(genes,)`.
    """
    of_label = labels == label
    mean, others = np.expm1(x[of_label]).mean(axis=0), np.expm1(x[~of_label]).mean(axis=0)
    return np.log2((mean + 1) / (others + 1))


def rank_markers(x: np.ndarray, labels: np.ndarray, label: str) -> np.ndarray:
    """
    Genes by how clearly cells of one label express more of them than the others do: Welch's t, highest first.

    Args:
        x (`np.ndarray` of shape `(cells, genes)`): Log-normalised expression.
        labels (`np.ndarray` of shape `(cells,)`): Label of each cell.
        label (`str`): The label.

    Returns:
        `np.ndarray` of shape `(genes,)`: positions of the genes.
    """
    of_label = labels == label
    # A gene that no cell expresses has neither a difference nor a variance: t is 0, not NaN.
    return np.argsort(-np.nan_to_num(ttest_ind(x[of_label], x[~of_label], equal_var=False).statistic), kind="stable")


def marker_statistics(
    train: np.ndarray,
    train_labels: np.ndarray,
    real: np.ndarray,
    real_labels: np.ndarray,
    generated: np.ndarray,
    generated_labels: np.ndarray,
    labels: list[str],
) -> dict[str, dict[str, float]]:
    """
    Do generated cells of each label differ from the others in the same genes, and by as much?

    The markers of a label are the 50 first of [`rank_markers`] in the training cells.

    Args:
        train (`np.ndarray` of shape `(train cells, genes)`): log1p(CP10k) of training cells.
        train_labels (`np.ndarray` of shape `(train cells,)`): Their labels.
        real (`np.ndarray` of shape `(cells, genes)`): Held-out cells.
        real_labels (`np.ndarray` of shape `(cells,)`): Their labels.
        generated (`np.ndarray` of shape `(cells, genes)`): Generated cells.
        generated_labels (`np.ndarray` of shape `(cells,)`): Their labels.
        labels (`list[str]`): The labels to look at; each must have cells in all three.

    Returns:
        `dict`: for each label, and for `"pooled"` over all their markers, `lfc_slope` (least squares through the
        origin, generated on real log fold changes) and `de_recovery` (share of the 50 first genes of real cells that
        are among the 50 first of generated ones; for `"pooled"` the mean).
    """

    def slope(x: np.ndarray, y: np.ndarray) -> float:
        # Through the origin: of the few held-out cells of a type the changes are noisy, and a free intercept would
        # take much of that noise for a flatter slope.
        return float(x @ y / (x @ x))

    statistics, real_changes, generated_changes = {}, [], []
    for label in labels:
        markers = rank_markers(train, train_labels, label)[:MARKERS_PER_TYPE]
        real_changes.append(log_fold_changes(real, real_labels, label)[markers])
        generated_changes.append(log_fold_changes(generated, generated_labels, label)[markers])
        first, second = (
            rank_markers(x, names, label)[:MARKERS_PER_TYPE]
            for x, names in ((real, real_labels), (generated, generated_labels))
        )
        statistics[label] = {
            "lfc_slope": slope(real_changes[-1], generated_changes[-1]),
            "de_recovery": len(np.intersect1d(first, second)) / len(first),
        }
    statistics["pooled"] = {
        "lfc_slope": slope(np.concatenate(real_changes), np.concatenate(generated_changes)),
        "de_recovery": float(np.mean([one["de_recovery"] for one in statistics.values()])),
    }
    return statistics


def paper_parity(real: np.ndarray, generated: np.ndarray) -> dict[str, float]:
    """
    The metrics of arXiv 2411.06785, to compare with its tables and for nothing else: they pair cells that have nothing
    to do with each other, or forget which cell a value came from, and so reward a collapsed generator.

    Args:
        real (`np.ndarray` of shape `(cells, genes)`): Held-out cells.
        generated (`np.ndarray` of shape `(cells, genes)`): Generated cells, as many as real ones.

    Returns:
        `dict[str, float]`: `paper_kl` (of softmaxed rows, paired in order), `paper_wasserstein` (Wasserstein-1 of the
        flattened matrices) and `paper_mmd` ([`mmd2`] averaged over blocks of 20 genes, except those in which most real
        cells are equal).
    """
    blocks = [slice(start, start + 20) for start in range(0, real.shape[1], 20)]
    # The bandwidth is a median distance: 0 where more than half of the cells express none of the 20 genes.
    blocks = [block for block in blocks if np.median(pdist(real[:, block])) > 0]
    return {
        "paper_kl": float(entropy(softmax(real, axis=1), softmax(generated, axis=1), axis=1).mean()),
        "paper_wasserstein": float(wasserstein_distance(real.ravel(), generated.ravel())),
        "paper_mmd": float(np.mean([mmd2(real[:, block], generated[:, block]) for block in blocks] or [np.nan])),
    }


def compare_labels(
    train: np.ndarray,
    train_labels: np.ndarray,
    real: np.ndarray,
    real_labels: np.ndarray,
    generated: np.ndarray,
    generated_labels: np.ndarray,
    labels: list[str],
    pca: PCA,
    seed: int = 0,
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """
    Every metric of expression that needs labels: is a generated cell of a type of that type, and are the types as
    different as real ones?

    Args:
        train (`np.ndarray` of shape `(train cells, genes)`):
            log1p(CP10k) of training cells, none of them among the generated cells (where those are real).
        train_labels (`np.ndarray` of shape `(train cells,)`): Their labels.
        real (`np.ndarray` of shape `(cells, genes)`): Held-out cells.
        real_labels (`np.ndarray` of shape `(cells,)`): Their labels.
        generated (`np.ndarray` of shape `(cells, genes)`): Generated cells, as many of each label as held-out ones.
        generated_labels (`np.ndarray` of shape `(cells,)`): Their labels.
        labels (`list[str]`): The labels to look at, see [`judged_labels`].
        pca (`PCA`): Principal components in which distances are measured.
        seed (`int`, defaults to 0): Seed of the classifiers.

    Returns:
        `tuple`: over all such labels, `purity` (accuracy of [`cell_type_classifier`], fitted on training cells, on
        generated cells, divided by its accuracy on held-out ones), `f1` (macro-averaged, of the classifier fitted on
        the *generated* cells, on held-out ones: compare it with the real reference, fitted on as many real cells),
        `lfc_slope` and `de_recovery` of [`marker_statistics`]; and the same without `f1`, with `w2` and `mmd2`, for
        each label. Where the two sides have different numbers of cells of a label, its `w2` is NaN.
    """
    if len(labels) < 2:
        return {}, {}
    classifier = cell_type_classifier(train, train_labels, seed)
    real_hits, generated_hits = (
        classifier.predict(x) == names for x, names in ((real, real_labels), (generated, generated_labels))
    )
    real_pcs, generated_pcs = pca.transform(real), pca.transform(generated)
    statistics = marker_statistics(train, train_labels, real, real_labels, generated, generated_labels, labels=labels)

    def purity(label: list[str]) -> float:
        """NaN if the classifier recognises no real cell of the label."""
        accuracy = real_hits[np.isin(real_labels, label)].mean()
        return float(generated_hits[np.isin(generated_labels, label)].mean() / accuracy) if accuracy else float("nan")

    predicted = cell_type_classifier(generated, generated_labels, seed).predict(real)
    judged = np.isin(real_labels, labels)
    f1 = f1_score(real_labels[judged], predicted[judged], labels=labels, average="macro", zero_division=0)
    pooled = {"purity": purity(labels), "f1": float(f1), **statistics.pop("pooled")}
    per_label = {}
    for label in labels:
        of_real, of_generated = real_pcs[real_labels == label], generated_pcs[generated_labels == label]
        per_label[str(label)] = {
            "purity": purity([label]),
            **statistics[label],
            "w2": wasserstein2(of_real, of_generated) if len(of_real) == len(of_generated) else float("nan"),
            "mmd2": mmd2(of_real, of_generated),
        }
    return pooled, per_label


def judged_labels(
    train_labels: np.ndarray, real_labels: np.ndarray, generated_labels: np.ndarray, min_train_cells: int = 30
) -> list[str]:
    """Labels that can be judged: at least 30 training cells, and two on either side, for a variance."""
    names, numbers = np.unique(train_labels, return_counts=True)
    return [
        str(name)
        for name, number in zip(names, numbers)
        if number >= min_train_cells and min((real_labels == name).sum(), (generated_labels == name).sum()) >= 2
    ]
