"""Log values that are not counts: a hurdle at zero, and an empirical distribution per gene above it."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from scipy.special import ndtr, ndtri


SCORES = np.linspace(-3, 3, 61)  # normal scores at which the quantiles of a gene are stored
STEP = 0.1  # between two scores
PRIOR_VALUES = 5  # weight of an average gene in the quantiles of a gene, as a number of values
TAIL_SLOPE = 0.3  # slope of the quantiles beyond the outermost values, in standard deviations of the gene per score
MAX_SCORE = 4.0  # largest score of a value
MAX_LEVELS = 2**16  # number of distinct values to keep
SMALLEST = 1e-6  # value above zero


@dataclass(eq=False)
class QuantileHurdle:
    r"""
    Values on a log scale that are not counts, such as TPM of full-length protocols.

    `P(x = 0) = sigmoid(zero_logits)`, and above zero `T_g(x) ~ N(scores, exp(log_std_g)²)`. `T_g` maps the values of
    gene `g` in the training cells to standard normal scores. It is linear between their quantiles.
    """

    scores: torch.Tensor  # (cells, genes), expected normal scores of values above zero
    zero_logits: torch.Tensor  # (cells, genes), log odds of zero
    log_std: torch.Tensor  # (genes,), log standard deviation of the scores
    quantiles: torch.Tensor  # (genes, 61), values at the scores -3, -2.9 … 3, increasing
    levels: torch.Tensor | None = None  # distinct values of the training cells, to which draws are rounded
    library_size: None = None

    HEADS = ("scores", "zero_logits")  # linear in the programs
    GENE_PARAMETERS = ("log_std",)  # shared by all cells
    PRIOR_PRECISIONS: ClassVar = {"log_std": 100.0}  # keeps rarely expressed genes from being fitted exactly
    TABLES: ClassVar = {"quantiles": len(SCORES)}  # measured, not fitted: number of values per gene
    is_counts = False

    def __post_init__(self):
        self.log_std = self.log_std.clamp(-5, 2)
        self.num_values = self.scores.shape[1]

    @classmethod
    def initial_values(cls, matrix: sparse.csr_matrix, library_size: np.ndarray | None = None) -> dict:
        """Starting point of the fit: biases, gene parameters, `quantiles`, and `levels` if values repeat."""
        columns = matrix.tocsc()
        num_cells, num_genes = columns.shape
        number = np.diff(columns.indptr)
        pooled_mean, pooled_std = float(columns.data.mean()), max(float(columns.data.std()), 1e-3)
        quantiles = np.empty((num_genes, len(SCORES)))
        for gene in range(num_genes):
            values = np.sort(columns.data[columns.indptr[gene] : columns.indptr[gene + 1]].astype(np.float64))
            quantiles[gene] = _quantiles(values, pooled_mean, pooled_std)
        quantiles = np.maximum(quantiles, min(float(columns.data.min()), 1e-3))
        steps = 1e-5 * np.arange(len(SCORES))  # quantiles must increase even if many values are equal
        quantiles = np.maximum.accumulate(quantiles, axis=1) + steps
        levels = np.unique(columns.data.astype(np.float32))[:MAX_LEVELS]  # the lowest distinct values, if they repeat
        if np.count_nonzero(columns.data <= levels[-1]) <= 1.1 * len(levels):
            levels = levels[:0]
        zeros = (num_cells - number + 0.5) / (num_cells + 1)
        return {
            "scores": torch.zeros(num_genes),
            "zero_logits": torch.from_numpy(np.log(zeros / (1 - zeros))).float(),
            "log_std": torch.zeros(num_genes),
            "quantiles": torch.from_numpy(quantiles).float(),
            "levels": torch.from_numpy(levels),
        }

    @classmethod
    def initial_slopes(
        cls,
        matrix: sparse.csr_matrix,
        library_size: np.ndarray | None,
        programs: np.ndarray,
        biases: dict[str, torch.Tensor],
        precision: float,
    ) -> dict[str, torch.Tensor]:
        """One step of Fisher scoring, as [`NegativeBinomialMixture.initial_slopes`]."""
        is_zero = torch.sigmoid(biases["zero_logits"].double()).cpu().numpy()
        observed = (matrix != 0).astype(np.float64)
        zero_slopes = -(observed.T @ programs)
        zero_slopes /= (is_zero * (1 - is_zero))[:, None] * np.square(programs).sum(axis=0) + precision
        # Normal scores are close to the values, standardised within the gene.
        scores = sparse.csr_matrix(matrix, dtype=np.float64)  # in single precision, a variance can be negative
        number = np.maximum(scores.getnnz(axis=0), 1)
        mean = np.asarray(scores.sum(axis=0)).ravel() / number
        variance = np.asarray(scores.power(2).sum(axis=0)).ravel() / number - mean**2
        scores.data = (scores.data - mean[scores.indices]) / np.sqrt(variance[scores.indices].clip(min=1e-6))
        slopes = (scores.T @ programs) / (observed.T @ np.square(programs) + precision)
        return {"zero_logits": torch.from_numpy(zero_slopes), "scores": torch.from_numpy(slopes)}

    def mean(self) -> torch.Tensor:
        """Expected values including zeros, not rounded: `(cells, genes)`."""
        # The mean of a piecewise linear function of a normal variable: each change of slope adds a term.
        std = self.log_std.exp()
        slopes = self.quantiles.diff(dim=1) / STEP  # (genes, 60)
        changes = slopes.diff(dim=1)  # (genes, 59)
        above_zero = self.quantiles[:, 0] + slopes[:, 0] * (self.scores - SCORES[0])
        for score, change in zip(SCORES[1:-1].tolist(), changes.unbind(1)):
            beyond = (self.scores - score) / std
            density = torch.exp(-0.5 * beyond**2) / math.sqrt(2 * math.pi)
            above_zero = above_zero + change * std * (density + beyond * torch.special.ndtr(beyond))
        return torch.sigmoid(-self.zero_logits) * above_zero.clamp(min=SMALLEST)

    def expression(self) -> torch.Tensor:
        """The mean, `(cells, genes)`, which is on a log scale already."""
        return self.mean()

    def log_prob(self, x: torch.Tensor, gene_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Log-likelihood `(cells,)` in nats: probabilities of zeros `(cells, genes)`, densities of other values."""
        columns = slice(x.shape[1]) if gene_mask is None else gene_mask.nonzero().squeeze(1)
        x, scores, zero_logits = x[:, columns], self.scores[:, columns], self.zero_logits[:, columns]
        log_std = self.log_std[columns]
        observed, log_slope = self._to_scores(x, columns)
        deviation = (observed - scores) * torch.exp(-log_std)
        log_density = -0.5 * deviation**2 - log_std - 0.5 * math.log(2 * math.pi) + log_slope
        above_zero = F.logsigmoid(-zero_logits) + log_density
        return torch.where(x > 0, above_zero, F.logsigmoid(zero_logits)).sum(1)

    def icdf(self, uniform: torch.Tensor) -> torch.Tensor:
        """Draws values, in double precision. Raises a `ValueError` if a score is NaN or infinite."""
        if not (torch.isfinite(self.zero_logits).all() and torch.isfinite(self.scores).all()):
            raise ValueError("The codec's scores are NaN or infinite. Check its weights and the latents.")
        uniform = uniform.to(self.scores.device)
        zero = torch.sigmoid(self.zero_logits).to(uniform.dtype)
        share = ((uniform - zero) / (1 - zero).clamp(min=1e-12)).clamp(1e-9, 1 - 1e-9)  # among values above 0
        scores = self.scores + self.log_std.exp() * torch.special.ndtri(share).float()
        values = self._from_scores(scores)
        return torch.where(uniform < zero, 0.0, values).cpu()

    def _from_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """Values of normal scores, both `(cells, genes)`, rounded to the nearest level unless above the highest."""
        position = (scores - SCORES[0]) / STEP
        left = position.floor().clamp(0, len(SCORES) - 2)  # the last slope continues beyond the outermost quantiles
        index = left.long().T  # (genes, cells)
        low, high = self.quantiles.gather(1, index).T, self.quantiles.gather(1, index + 1).T
        values = (low + (position - left) * (high - low)).clamp(min=SMALLEST)
        if self.levels is None or not len(self.levels):
            return values
        levels = self.levels.to(values.device)
        above = torch.searchsorted(levels, values.contiguous()).clamp(1, len(levels) - 1)
        low, high = levels[above - 1], levels[above]
        return torch.where(values > levels[-1], values, torch.where(values - low < high - values, low, high))

    def _to_scores(self, values: torch.Tensor, columns) -> tuple[torch.Tensor, torch.Tensor]:
        """Normal scores of values, and the log of their slope, all `(cells, genes)`."""
        quantiles = self.quantiles[columns]
        index = torch.searchsorted(quantiles, values.T.contiguous()).clamp(1, len(SCORES) - 1)  # (genes, cells)
        low, high = quantiles.gather(1, index - 1).T, quantiles.gather(1, index).T
        scores = SCORES[0] + STEP * (index.T - 1 + (values - low) / (high - low))
        return scores.clamp(-MAX_SCORE, MAX_SCORE), torch.log(STEP / (high - low))


def _quantiles(values: np.ndarray, pooled_mean: float, pooled_std: float) -> np.ndarray:
    """Quantiles of one gene's sorted positive values at `SCORES`."""
    number = len(values)
    mean = (values.sum() + 2 * pooled_mean) / (number + 2)
    squares = np.square(values - mean).sum()
    std = math.sqrt((squares + PRIOR_VALUES * pooled_std**2) / (number + PRIOR_VALUES))
    normal = mean + std * SCORES
    if number < 2:
        return normal
    empirical = np.interp(ndtr(SCORES), (np.arange(number) + 0.5) / number, values)
    outermost = -ndtri(0.5 / number)
    below, above = SCORES < -outermost, SCORES > outermost
    empirical[below] = values[0] + TAIL_SLOPE * std * (SCORES[below] + outermost)
    empirical[above] = values[-1] + TAIL_SLOPE * std * (SCORES[above] - outermost)
    weight = number / (number + PRIOR_VALUES)
    return weight * empirical + (1 - weight) * normal
