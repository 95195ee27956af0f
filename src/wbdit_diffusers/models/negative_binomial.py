"""Counts as a mixture of two negative binomials for each gene."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse

from ..processing.normalize import log_normalize


class NegativeBinomialMixture:
    r"""
    Counts, of molecules or of reads.

    `counts ~ (1 - π) NB(mean μ, inverse dispersion θ) + π NB(mean r μ, inverse dispersion θ')` with
    `μ = library_size * proportions`. The second part, of a few cells for each gene, is what one negative binomial
    can't have beside a narrow body: counts of tens where others have one or two, or (`r < 1`) a gene that is missed.

    The columns are the genes, and at the end one bin for the counts of all other genes, so that the library of a drawn
    cell is what was drawn.

    Args:
        log_proportions (`torch.Tensor` of shape `(cells, genes + 1)`): Log of each bin's share of the library.
        log_theta (`torch.Tensor` of shape `(cells, genes + 1)`): Log inverse dispersions.
        outlier_logits (`torch.Tensor` of shape `(genes + 1,)`): Log odds of the second part, π.
        outlier_log_ratio (`torch.Tensor` of shape `(genes + 1,)`): Log of its mean over that of the first part, r.
        outlier_log_theta (`torch.Tensor` of shape `(genes + 1,)`): Its log inverse dispersion, θ'.
        library_size (`torch.Tensor` of shape `(cells,)`): Total counts over all genes.
    """

    HEADS = ("log_rates", "log_theta")  # linear in the programs
    GENE_PARAMETERS = ("outlier_logits", "outlier_log_ratio", "outlier_log_theta")  # alike in all cells
    PRIOR_PRECISIONS: dict[str, float] = {}
    TABLES: dict[str, int] = {}
    IS_OF_COUNTS = True

    def __init__(
        self,
        log_proportions: torch.Tensor,
        log_theta: torch.Tensor,
        outlier_logits: torch.Tensor,
        outlier_log_ratio: torch.Tensor,
        outlier_log_theta: torch.Tensor,
        library_size: torch.Tensor,
    ):
        self.log_proportions = log_proportions
        # Beyond these limits a distribution is all zeros, or Poisson.
        self.log_theta = log_theta.clamp(-4, 8)
        self.outlier_logits = outlier_logits
        self.outlier_log_ratio = outlier_log_ratio.clamp(-4, 4)
        self.outlier_log_theta = outlier_log_theta.clamp(-4, 4)
        self.library_size = library_size.to(log_proportions.device)

    @classmethod
    def from_heads(cls, heads: dict[str, torch.Tensor], library_size: torch.Tensor) -> "NegativeBinomialMixture":
        """From what a decoder gives: `HEADS`, `(cells, genes + 1)` each, and `GENE_PARAMETERS`, `(genes + 1,)`."""
        values = {name: value.float() for name, value in heads.items()}
        return cls(F.log_softmax(values.pop("log_rates"), dim=1), **values, library_size=library_size)

    @classmethod
    def initial_values(cls, counts: sparse.csr_matrix, library_size: np.ndarray) -> dict[str, torch.Tensor]:
        """
        Where the fit starts: the training cells' mean rates, and for each gene about the θ with which cells of equal
        proportions would have its variance, less what outliers add to that.

        Args:
            counts (`scipy.sparse.csr_matrix` of shape `(cells, genes)`): Counts of the training cells.
            library_size (`np.ndarray` of shape `(cells,)`): Their total counts.

        Returns:
            `dict[str, torch.Tensor]`: for each head's bias and each gene parameter `(genes + 1,)`.
        """
        genes = np.asarray(counts.sum(axis=0), dtype=np.float64).ravel()
        totals = np.append(genes, library_size.sum() - genes.sum()) + 0.5
        # Excess of the variance over a Poisson distribution's, (library_size * share)² / θ, summed over cells
        share = genes / library_size.sum()
        excess = (
            np.asarray(counts.power(2, dtype=np.float64).sum(axis=0)).ravel()
            - 2 * share * (counts.T @ library_size.astype(np.float64))
            + share**2 * (library_size**2).sum()
            - share * library_size.sum()
        )
        theta = share**2 * (library_size**2).sum() / np.maximum(excess, 1e-9)
        log_theta = np.append(1 + np.log(np.maximum(theta, 1e-9)), 3).clip(0, 3)
        return {
            "log_rates": torch.from_numpy(np.log(totals / totals.sum())).float(),
            "log_theta": torch.from_numpy(log_theta).float(),
            "outlier_logits": torch.full((len(totals),), -3.0),  # one cell in twenty
            "outlier_log_ratio": torch.full((len(totals),), 0.5),
            "outlier_log_theta": torch.full((len(totals),), -0.5),
        }

    @classmethod
    def initial_slopes(
        cls,
        counts: sparse.csr_matrix,
        library_size: np.ndarray,
        programs: np.ndarray,
        biases: dict[str, torch.Tensor],
        precision: float,
    ) -> dict[str, torch.Tensor]:
        """
        One step of Fisher scoring from cells that are all alike, for each weight by itself.

        Args:
            counts (`scipy.sparse.csr_matrix` of shape `(cells, genes)`): Counts of the training cells.
            library_size (`np.ndarray` of shape `(cells,)`): Their total counts.
            programs (`np.ndarray` of shape `(cells, num_programs)`): Their programs, centred.
            biases (`dict[str, torch.Tensor]`): Of the heads, `(genes + 1,)` each, see `initial_values`.
            precision (`float`): Of the prior on the weights.

        Returns:
            `dict[str, torch.Tensor]`: for the heads that depend on the programs from the start,
            `(genes + 1, num_programs)`.
        """
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

    @property
    def num_values(self) -> int:
        """How many counts a draw has: the genes, and the bin of all others."""
        return self.log_proportions.shape[1]

    def mean(self) -> torch.Tensor:
        """Expected counts of the genes, `(cells, genes)`."""
        outliers = torch.sigmoid(self.outlier_logits)
        rates = self.log_proportions.exp() * self.library_size[:, None]  # (cells, genes + 1)
        return (rates * (1 + outliers * torch.expm1(self.outlier_log_ratio)))[:, :-1]

    def expression(self) -> torch.Tensor:
        """The expected counts as log1p(CP10k), `(cells, genes)`."""
        return log_normalize(self.mean(), self.library_size)

    def log_prob(self, x: torch.Tensor, gene_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            x (`torch.Tensor` of shape `(cells, genes)` or `(cells, genes + 1)`):
                Counts of the genes, or with those of all other genes in the last column.
            gene_mask (`torch.BoolTensor`, *optional*): The columns of `x` to take; all by default.

        Returns:
            `torch.Tensor` of shape `(cells,)`: log-likelihood in nats. Differentiable in the parameters.
        """
        columns = slice(x.shape[1]) if gene_mask is None else gene_mask.nonzero().squeeze(1)
        x = x[:, columns]
        log_rates = (self.log_proportions + self.library_size[:, None].log())[:, columns]
        log_theta = self.log_theta[:, columns]
        log_outlier_rates = log_rates + self.outlier_log_ratio[columns]
        outlier_log_theta = self.outlier_log_theta[columns]
        body, outliers = F.logsigmoid(-self.outlier_logits[columns]), F.logsigmoid(self.outlier_logits[columns])
        # Most counts are zero, for which the likelihood is simple; what the others have more is added for them alone.
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
        """
        Counts by inverting their distribution at one random number for each value: how many random numbers a Poisson
        sampler takes depends on its rate, so that cells drawn together would depend on each other.

        Args:
            uniform (`torch.DoubleTensor` of shape `(cells, genes)` or `(cells, genes + 1)`):
                Random numbers in [0, 1), with or without one for the bin of all other genes.

        Returns:
            `torch.FloatTensor` of the same shape: integer values, on the CPU.
        """
        num_columns = uniform.shape[1]
        rates = (self.log_proportions.exp() * self.library_size[:, None])[:, :num_columns]
        theta = self.log_theta[:, :num_columns].exp()
        weight = torch.sigmoid(self.outlier_logits)[:num_columns]
        outlier_rates = rates * self.outlier_log_ratio[:num_columns].exp()
        outlier_theta = self.outlier_log_theta[:num_columns].exp()
        probability_above_zero = -(1 - weight) * torch.expm1(-theta * torch.log1p(rates / theta))
        probability_above_zero -= weight * torch.expm1(-outlier_theta * torch.log1p(outlier_rates / outlier_theta))
        if not torch.isfinite(probability_above_zero).all():  # every comparison with NaN would give an empty cell
            raise ValueError("The codec's rates are NaN or infinite: its weights, or the latents, are damaged.")
        above = 1 - uniform.to(rates.device)  # the share of the distribution that lies above the count
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
    """`log Γ(count + θ) + count log(rate / (θ + rate)) + θ log(θ / (θ + rate))`, so without `Γ(θ) Γ(count + 1)`, of
    which one is a property of the gene and the other one of the count."""
    log_gamma = torch.lgamma(count + log_theta.exp())
    return log_gamma - count * F.softplus(log_theta - log_rate) + _log_nb_of_zero(log_rate, log_theta)


def _invert_mixture(tail: np.ndarray, parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> np.ndarray:
    """The smallest count k >= 1 with P(count > k) <= tail, of a mixture of (weight, θ, p)."""
    from scipy import stats  # slow to import

    counts, unfinished, k = np.empty_like(tail), np.arange(len(tail)), 1
    probability = [weight * p**theta for weight, theta, p in parts]  # of k - 1
    above = 1 - sum(probability)  # P(count > k - 1)
    # Nearly all counts are small, and summed up at once; SciPy takes microseconds for each of the others.
    while k <= 16 and len(unfinished):
        probability = [last * (1 - p) * (theta + k - 1) / k for last, (_, theta, p) in zip(probability, parts)]
        above = above - sum(probability)
        counts[unfinished[above <= tail]] = k
        left = above > tail
        unfinished, above, tail = unfinished[left], above[left], tail[left]
        probability = [values[left] for values in probability]
        parts = [tuple(values[left] for values in part) for part in parts]
        k += 1
    if len(unfinished):
        # The mixture's quantile lies between those of its parts.
        tail = np.maximum(tail, 1e-16)
        quantiles = np.stack([stats.nbinom.isf(tail, theta, p) for _, theta, p in parts])
        low, high = np.maximum(quantiles.min(axis=0), k) - 1, np.maximum(quantiles.max(axis=0), k)
        while (high - low > 1).any():  # P(count > low) > tail >= P(count > high)
            middle = np.floor((low + high) / 2)
            is_enough = sum(weight * stats.nbinom.sf(middle, theta, p) for weight, theta, p in parts) <= tail
            low, high = np.where(is_enough, low, middle), np.where(is_enough, middle, high)
        counts[unfinished] = high
    return counts
