"""Means of combinations of labels that no training cell has, composed from those that were measured."""

from dataclasses import dataclass

import numpy as np


PSEUDO_CELLS = 40  # a change that is measured in so many cells counts half
WIDTHS = np.geomspace(0.1, 10, 21)  # of the kernel, in median distances between combinations


@dataclass
class Composed:
    """
    A combination that was not measured: `mean(base) + change`. `error` is the distance between composed and measured
    means, over all measured combinations left out in turn; infinite if none could be.
    """

    labels: np.ndarray  # (num_label_keys,)
    base: int  # position of a measured combination that differs in one label
    change: np.ndarray  # (values,)
    size: float  # norm of the change, in the metric
    error: float  # in the metric


class Composition:
    """
    Additive composition of labels. A combination is a measured one, the base, plus the change that one label makes.

    The change is the mean over contexts: pairs of measured combinations that differ in the same label, such as another
    cell type with and without the stimulus. Contexts near the base weigh more, by a Gaussian kernel. Its width, one
    for each label key, minimises the error of measured combinations that are left out in turn.

    `combinations` `(combinations, num_label_keys)` are those measured, with `means` `(combinations, values)` and
    numbers of cells `(combinations,)`. Distances are Euclidean after `metric` `(values, dimensions)`.
    """

    def __init__(self, combinations: np.ndarray, means: np.ndarray, num_cells: np.ndarray, metric: np.ndarray):
        self.combinations, self.means, self.num_cells = combinations, means, num_cells
        self.places = {tuple(row): i for i, row in enumerate(combinations.tolist())}
        self.points = means @ metric  # (combinations, dimensions)
        self.metric = metric
        self.distances = np.linalg.norm(self.points[:, None] - self.points[None], axis=2)
        apart = self.distances[self.distances > 0]
        self.widths = WIDTHS * (np.median(apart) if len(apart) else 1.0)
        fits = [self._fit(key) for key in range(combinations.shape[1])]
        self.width, self.error = [fit[0] for fit in fits], [fit[1] for fit in fits]  # of each label key

    def compose(self, labels: np.ndarray) -> Composed | None:
        """A combination from its best base, or `None` if no measured combinations show the change."""
        options = []
        for key, base in self._bases(labels):
            contexts = self._contexts(key, base, labels)
            if len(contexts):
                # A base of the same cell type, the first key, keeps what the condition does not change.
                options.append((key == 0, self.error[key], -self.num_cells[base], key, base))
        if not options:
            return None
        _, error, _, key, base = min(options)
        contexts = self._contexts(key, base, labels)
        changes = self.means[contexts[:, 1]] - self.means[contexts[:, 0]]
        change = self._weights(base, contexts, self.width[key]) @ changes
        return Composed(labels, base, change, float(np.linalg.norm(change @ self.metric)), error)

    def _bases(self, labels: np.ndarray) -> list[tuple[int, int]]:
        """Measured combinations that differ from some labels in one key, with this key."""
        differs = self.combinations != labels
        return [(int(np.flatnonzero(differs[i])[0]), int(i)) for i in np.flatnonzero(differs.sum(axis=1) == 1)]

    def _contexts(self, key: int, base: int, labels: np.ndarray) -> np.ndarray:
        """Pairs `(contexts, 2)` of other combinations that differ as base and labels do."""
        rows = np.flatnonzero(self.combinations[:, key] == self.combinations[base, key])
        after = self.combinations[rows].copy()
        after[:, key] = labels[key]
        pairs = [(i, self.places[row]) for i, row in zip(rows, map(tuple, after.tolist())) if row in self.places]
        return np.array([pair for pair in pairs if pair[0] != base], dtype=int).reshape(-1, 2)

    def _weights(self, base: int, contexts: np.ndarray, width: float) -> np.ndarray:
        """Weights of contexts, whose sum is 1: near the base, and measured in many cells."""
        cells = 1 / (1 / self.num_cells[contexts]).sum(axis=1)  # of a difference of two means
        log_weights = np.log(cells / (cells + PSEUDO_CELLS))
        log_weights -= 0.5 * (self.distances[base, contexts[:, 0]] / width) ** 2
        weights = np.exp(log_weights - log_weights.max())
        return weights / weights.sum()

    def _fit(self, key: int) -> tuple[float, float]:
        """The kernel's width for a label key, and its error: the root of the mean square, weighted by cells."""
        errors, weights = [], []
        for target, labels in enumerate(self.combinations):
            for _, base in [pair for pair in self._bases(labels) if pair[0] == key]:
                contexts = self._contexts(key, base, labels)
                if len(contexts):
                    changes = self.points[contexts[:, 1]] - self.points[contexts[:, 0]]
                    missed = self.points[target] - self.points[base]
                    composed = np.stack([self._weights(base, contexts, width) for width in self.widths]) @ changes
                    errors.append(np.square(composed - missed).sum(axis=1))  # (widths,)
                    weights.append(self.num_cells[target] / (self.num_cells[target] + PSEUDO_CELLS))
        if not errors:
            return float(self.widths[-1]), float("inf")
        mean = np.average(errors, axis=0, weights=weights)
        return float(self.widths[mean.argmin()]), float(np.sqrt(mean.min()))
