"""Counts, with a mixture of two negative binomials per gene."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse

from ...processing.normalize import log_normalize


MAX_LOG_RATIO = 9.0  # of outliers: haemoglobin fills red blood cells, and one molecule of it floats into others
FEW_CELLS = 0.05  # fraction of cells that may be outliers of a gene; θ, if they hold all its counts
MAX_SUMMED = 64  # larger counts are found by bisection


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
