"""Distributions of a cell given its latents: counts with a mixture of two negative binomials per gene, and log values
that are not counts, with a hurdle at zero and an empirical distribution per gene above it.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from scipy.special import ndtr, ndtri

from ..processing.normalize import log_normalize


MAX_LOG_RATIO = 9.0  # of outliers: haemoglobin fills red blood cells, and one molecule of it floats into others
FEW_CELLS = 0.05  # fraction of cells that may be outliers of a gene; θ, if they hold all its counts
MAX_SUMMED = 64  # larger counts are found by bisection

SCORES = np.linspace(-3, 3, 61)  # normal scores at which the quantiles of a gene are stored
STEP = 0.1  # between two scores
PRIOR_VALUES = 5  # weight of an average gene in the quantiles of a gene, as a number of values
TAIL_SLOPE = 0.3  # slope of the quantiles beyond the outermost values, in standard deviations of the gene per score
MAX_SCORE = 4.0  # largest score of a value
MAX_LEVELS = 2**16  # number of distinct values to keep
SMALLEST = 1e-6  # value above zero


class CellDistribution(Protocol):
    """Independent distributions of the genes in each cell, named as in `torch.distributions`."""

    library_size: torch.Tensor | None  # (cells,), expected total counts over all genes; `None` for log values
    num_values: int  # per draw: the genes, and one bin for all other genes if the likelihood has it

    def mean(self) -> torch.Tensor:
        """Expected values, `(cells, genes)`, in the unit of the training data."""

    def expression(self) -> torch.Tensor:
        """The mean on a log scale, `(cells, genes)`: log1p(CP10k) of counts, log values unchanged."""

    def log_prob(self, x: torch.Tensor, gene_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Log-likelihood `(cells,)` of `x` `(cells, genes)`, over all genes or those of a mask `(genes,)`."""

    def icdf(self, uniform: torch.Tensor) -> torch.Tensor:
        """Quantiles at the random numbers `uniform` `(cells, num_values)`: a draw of cells."""


@dataclass(eq=False)
class NegativeBinomialMixture:
    r"""
    Counts of molecules or reads.

    `counts ~ (1 - π) NB(mean μ, inverse dispersion θ) + π NB(mean r μ, inverse dispersion θ')` with
    `μ = library_size * proportions`. The second component describes the outliers of a gene, which a narrow negative
    binomial can't: counts of tens or thousands where other cells have one or two, or (`r < 1`) dropouts.

    The columns are the genes, followed by one bin for all other genes, so that a draw has a library size of its own.
    """

    log_rates: torch.Tensor  # (cells, genes + 1), whose softmax is the share of each bin
    log_theta: torch.Tensor  # (cells, genes + 1), log inverse dispersion θ
    outlier_logits: torch.Tensor  # (genes + 1,), log odds of the second component, π
    outlier_log_ratio: torch.Tensor  # (genes + 1,), log ratio of the two means, r
    outlier_log_theta: torch.Tensor  # (genes + 1,), log inverse dispersion θ' of the second component
    library_size: torch.Tensor  # (cells,), total counts over all genes

    HEADS = ("log_rates", "log_theta")  # linear in the programs
    GENE_PARAMETERS = ("outlier_logits", "outlier_log_ratio", "outlier_log_theta")  # shared by all cells
    PRIOR_PRECISIONS: ClassVar[dict[str, float]] = {}
    TABLES: ClassVar[dict[str, int]] = {}
    is_counts = True

    def __post_init__(self):
        self.log_proportions = F.log_softmax(self.log_rates, dim=1)
        self.num_values = self.log_rates.shape[1]  # per draw: the genes, and the bin of all other genes
        self.log_theta = self.log_theta.clamp(-4, 8)  # beyond, a distribution is all zeros, or Poisson
        self.outlier_log_ratio = self.outlier_log_ratio.clamp(-4, MAX_LOG_RATIO)
        self.outlier_log_theta = self.outlier_log_theta.clamp(-4, 4)
        self.library_size = self.library_size.to(self.log_rates.device)

    @classmethod
    def initial_values(cls, counts: sparse.csr_matrix, library_size: np.ndarray) -> dict[str, torch.Tensor]:
        """Starting point of the fit: bias of each head and value of each gene parameter, `(genes + 1,)`."""
        genes = np.asarray(counts.sum(axis=0), dtype=np.float64).ravel()
        # Variance beyond a Poisson distribution's, (library_size * share)² / θ, summed over cells
        share = genes / library_size.sum()
        squares = np.asarray(counts.power(2, dtype=np.float64).sum(axis=0)).ravel()
        excess = (
            squares
            - 2 * share * (counts.T @ library_size.astype(np.float64))
            + share**2 * (library_size**2).sum()
            - share * library_size.sum()
        )
        theta = share**2 * (library_size**2).sum() / np.maximum(excess, 1e-9)
        log_theta = 1 + np.log(np.maximum(theta, 1e-9)).clip(-1, 2)  # raised a little: outliers add variance
        logits, log_ratio = np.full((2, len(genes)), [[-3.0], [0.5]])  # one cell in twenty is an outlier
        # A cell has many counts of a gene: at least a third of those in the cell of the gene's average molecule.
        entries = counts.tocoo()
        has_many = entries.data > (squares / np.maximum(genes, 1))[entries.col] / 3
        in_many, many = entries.col[has_many], entries.data[has_many].astype(np.float64)
        num_cells, num_counts = (np.bincount(in_many, of, len(genes)) for of in (None, many))
        few = (theta < FEW_CELLS) & (num_cells < FEW_CELLS * counts.shape[0]) & (num_cells > 0)
        others = np.maximum(genes - num_counts, 0.5)  # counts in the other cells
        logits[few] = np.log(num_cells[few] / (counts.shape[0] - num_cells[few]))
        ratio = num_counts[few] / num_cells[few] / (others[few] / counts.shape[0])
        log_ratio[few] = np.log(ratio).clip(0, MAX_LOG_RATIO)
        log_theta[few] = 1.0
        of_other_genes = max(library_size.sum(dtype=np.float64) - genes.sum(), 0)  # sums may be rounded
        totals = np.append(np.where(few, others, genes + 0.5), of_other_genes + 0.5)
        values = {
            "log_rates": np.log(totals / totals.sum()),
            "log_theta": np.append(log_theta, 3.0),
            "outlier_logits": np.append(logits, -3.0),
            "outlier_log_ratio": np.append(log_ratio, 0.5),
            "outlier_log_theta": np.full(len(totals), -0.5),
        }
        return {name: torch.from_numpy(value).float() for name, value in values.items()}

    @classmethod
    def initial_slopes(
        cls,
        counts: sparse.csr_matrix,
        library_size: np.ndarray,
        programs: np.ndarray,
        biases: dict[str, torch.Tensor],
        precision: float,
    ) -> dict[str, torch.Tensor]:
        """One step of Fisher scoring from the `initial_values`: weights `(genes + 1, num_programs)`."""
        share = torch.softmax(biases["log_rates"].double(), dim=0).cpu().numpy()
        theta = biases["log_theta"].double().exp().cpu().numpy()
        score, information = np.zeros((len(share), programs.shape[1])), precision
        for start in range(0, counts.shape[0], 1024):
            cells = slice(start, start + 1024)
            of_genes = counts[cells].toarray()
            values = np.column_stack([of_genes, library_size[cells] - of_genes.sum(axis=1)])
            rates = library_size[cells, None] * share  # (cells, genes + 1)
            weights = 1 / (1 + rates / theta)
            score += ((values - rates) * weights).T @ programs[cells]
            information = information + (rates * weights).T @ programs[cells] ** 2
        return {"log_rates": torch.from_numpy(score / information)}

    def bin_means(self) -> torch.Tensor:
        """Expected counts of the genes, and of all other genes together, `(cells, genes + 1)`."""
        rates = self.log_proportions.exp() * self.library_size[:, None]
        return rates * (1 + torch.sigmoid(self.outlier_logits) * torch.expm1(self.outlier_log_ratio))

    def mean(self) -> torch.Tensor:
        """Expected counts of the genes, `(cells, genes)`."""
        return self.bin_means()[:, :-1]

    def scaled_means(self, factor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gene parameters that multiply each bin's mean by `factor` `(genes + 1,)`, and the change of `log_rates`."""
        # Where few cells are outliers, they carry the change: a higher rate would put the gene into all cells.
        log_ratio, log_theta = self.outlier_log_ratio, self.outlier_log_theta
        weight = torch.sigmoid(self.outlier_logits)
        wanted = factor * (1 + weight * torch.expm1(log_ratio))  # the mean relative to the rate
        few = (factor != 1) & (log_ratio > 0) & (weight < FEW_CELLS) & (wanted > 1)
        new_ratio = torch.where(few, torch.log1p((wanted - 1) / weight).clamp(max=MAX_LOG_RATIO), log_ratio)
        new_weight = torch.where(few, (wanted - 1) / torch.expm1(new_ratio), weight)
        return {
            "log_rates": torch.where(few, 0.0, factor.log()),
            "outlier_logits": torch.where(few, torch.logit(new_weight), self.outlier_logits),
            "outlier_log_ratio": new_ratio,
            # With a smaller θ', one cell would hold nearly all counts.
            "outlier_log_theta": torch.where(few, log_theta.clamp(min=0), log_theta),
        }

    def expression(self) -> torch.Tensor:
        """The expected counts as log1p(CP10k), `(cells, genes)`."""
        return log_normalize(self.mean(), self.library_size)

    def log_prob(self, x: torch.Tensor, gene_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Log-likelihood `(cells,)` in nats; `x` is `(cells, genes)` or `(cells, genes + 1)`, with the last bin."""
        columns = slice(x.shape[1]) if gene_mask is None else gene_mask.nonzero().squeeze(1)
        x = x[:, columns]
        log_rates = (self.log_proportions + self.library_size[:, None].log())[:, columns]
        log_theta = self.log_theta[:, columns]
        log_outlier_rates = log_rates + self.outlier_log_ratio[columns]
        outlier_log_theta = self.outlier_log_theta[columns]
        body, outliers = F.logsigmoid(-self.outlier_logits[columns]), F.logsigmoid(self.outlier_logits[columns])
        # Most counts are zero, and their likelihood is simple. The terms of other counts are computed for these alone.
        log_zero = torch.logaddexp(
            body + _log_nb_of_zero(log_rates, log_theta),
            outliers + _log_nb_of_zero(log_outlier_rates, outlier_log_theta),
        )  # (cells, genes)
        cells, genes = x.nonzero(as_tuple=True)
        count, log_theta_of_count = x[cells, genes], log_theta[cells, genes]
        of_expressed = torch.logaddexp(
            body[genes]
            - torch.lgamma(log_theta_of_count.exp())
            + _log_nb(count, log_rates[cells, genes], log_theta_of_count),
            (outliers - torch.lgamma(outlier_log_theta.exp()))[genes]
            + _log_nb(count, log_outlier_rates[cells, genes], outlier_log_theta[genes]),
        )
        of_expressed = of_expressed - torch.lgamma(count + 1)
        return log_zero.sum(1).index_add(0, cells, of_expressed - log_zero[cells, genes])

    def information(self) -> dict[str, torch.Tensor]:
        """Fisher information `(cells, genes)` about the heads. Dispersions and outliers tell little."""
        rates = self.log_proportions[:, :-1].exp() * self.library_size[:, None]
        return {"log_rates": rates / (1 + rates * torch.exp(-self.log_theta[:, :-1]))}

    def icdf(self, uniform: torch.Tensor) -> torch.Tensor:
        """Draws counts by inverting the distribution function, with one double of `uniform` per count."""
        # A Poisson sampler uses more random numbers at higher rates: cells drawn together would depend on each other.
        num_columns = uniform.shape[1]
        rates = (self.log_proportions.exp() * self.library_size[:, None])[:, :num_columns]
        theta = self.log_theta[:, :num_columns].exp()
        weight = torch.sigmoid(self.outlier_logits)[:num_columns]
        outlier_rates = rates * self.outlier_log_ratio[:num_columns].exp()
        outlier_theta = self.outlier_log_theta[:num_columns].exp()
        probability_above_zero = -(1 - weight) * torch.expm1(-theta * torch.log1p(rates / theta))
        probability_above_zero -= weight * torch.expm1(-outlier_theta * torch.log1p(outlier_rates / outlier_theta))
        if not torch.isfinite(probability_above_zero).all():  # every comparison with NaN would give an empty cell
            raise ValueError("The codec's rates are NaN or infinite. Check its weights and the latents.")
        above = 1 - uniform.to(rates.device)  # P(count > k)
        cells, genes = (above < probability_above_zero).nonzero(as_tuple=True)  # most counts are zero
        tail, rates, theta, outlier_rates, weight, outlier_theta = (
            values.double().cpu().numpy()
            for values in (
                *(matrix[cells, genes] for matrix in (above, rates, theta, outlier_rates)),
                *(vector[genes] for vector in (weight, outlier_theta)),
            )
        )
        parts = [(1 - weight, theta, theta / (theta + rates))]
        parts += [(weight, outlier_theta, outlier_theta / (outlier_theta + outlier_rates))]
        counts = torch.zeros(uniform.shape)
        counts[cells.cpu(), genes.cpu()] = torch.from_numpy(_invert_mixture(tail, parts).astype(np.float32))
        return counts


def _log_nb_of_zero(log_rate: torch.Tensor, log_theta: torch.Tensor) -> torch.Tensor:
    """`θ log(θ / (θ + rate))`."""
    return -(log_theta.exp() * F.softplus(log_rate - log_theta))


def _log_nb(count: torch.Tensor, log_rate: torch.Tensor, log_theta: torch.Tensor) -> torch.Tensor:
    """`log Γ(count + θ) + count log(rate / (θ + rate)) + θ log(θ / (θ + rate))`: without `Γ(θ) Γ(count + 1)`."""
    log_gamma = torch.lgamma(count + log_theta.exp())
    return log_gamma - count * F.softplus(log_theta - log_rate) + _log_nb_of_zero(log_rate, log_theta)


def _invert_mixture(tail: np.ndarray, parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> np.ndarray:
    """The smallest count k >= 1 with P(count > k) <= tail, for a mixture of (weight, θ, p)."""
    from scipy import stats  # slow to import

    counts, unfinished, k = np.empty_like(tail), np.arange(len(tail)), 1
    probability = [weight * p**theta for weight, theta, p in parts]  # of k - 1
    above = 1 - sum(probability)  # P(count > k - 1)
    # Nearly all counts are small, and a sum finds them together. SciPy needs microseconds for each of the others.
    while k <= MAX_SUMMED and len(unfinished):
        probability = [last * (1 - p) * (theta + k - 1) / k for last, (_, theta, p) in zip(probability, parts)]
        above = above - sum(probability)
        counts[unfinished[above <= tail]] = k
        left = above > tail
        unfinished, above, tail = unfinished[left], above[left], tail[left]
        probability = [values[left] for values in probability]
        parts = [tuple(values[left] for values in part) for part in parts]
        k += 1
    if len(unfinished):
        # The mixture's quantile is between those of its parts.
        tail = np.maximum(tail, 1e-16)
        quantiles = np.stack([stats.nbinom.isf(tail, theta, p) for _, theta, p in parts])
        low, high = np.maximum(quantiles.min(axis=0), k) - 1, np.maximum(quantiles.max(axis=0), k)
        while (high - low > 1).any():  # P(count > low) > tail >= P(count > high)
            middle = np.floor((low + high) / 2)
            is_enough = sum(weight * stats.nbinom.sf(middle, theta, p) for weight, theta, p in parts) <= tail
            low, high = np.where(is_enough, low, middle), np.where(is_enough, middle, high)
        counts[unfinished] = high
    return counts


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

    def information(self) -> dict[str, torch.Tensor]:
        """Fisher information `(cells, genes)` about the heads."""
        zero = torch.sigmoid(self.zero_logits)
        return {"scores": (1 - zero) * torch.exp(-2 * self.log_std), "zero_logits": zero * (1 - zero)}

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


# The likelihoods that a linear decoder can parametrise
LIKELIHOODS: dict[str, type[NegativeBinomialMixture] | type[QuantileHurdle]] = {
    "nb_mixture": NegativeBinomialMixture,
    "quantile_hurdle": QuantileHurdle,
}
