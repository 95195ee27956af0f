"""Distributions of a cell given its latents: what a codec's `decode` returns.

A `CellDistribution` has `mean()`, `log_prob(x, gene_mask)` and `icdf(uniform)` in the habit of `torch.distributions`,
and `expression()`, the mean on a log scale. `LIKELIHOODS` holds those that a linear decoder can parametrise.
"""

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse

from ..processing.normalize import TARGET_SUM, log_normalize


class CellDistribution(Protocol):
    """What is known of some cells once their latents are: one independent distribution for each gene."""

    library_size: torch.Tensor | None  # (cells,), total counts over all genes; `None` for log values

    def mean(self) -> torch.Tensor:
        """Expected values, `(cells, genes)`, in the unit of the training data."""

    def expression(self) -> torch.Tensor:
        """The mean as log1p(CP10k), or as it is where the training data are log values: `(cells, genes)`."""

    def log_prob(self, x: torch.Tensor, gene_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Log-likelihood `(cells,)` of `x` `(cells, genes)`, over all genes or those of a mask `(genes,)`."""

    def icdf(self, uniform: torch.Tensor) -> torch.Tensor:
        """The values below which a share `uniform` `(cells, genes)` of each distribution lies: a draw of cells."""


class ZeroInflatedNegativeBinomial:
    r"""
    Counts, of molecules or of reads.

    `counts ~ NB(mean = library_size * proportions, inverse dispersion = θ)`; with probability
    `sigmoid(dropout_logits)` a gene is missed altogether, and its count is zero.

    Args:
        log_proportions (`torch.Tensor` of shape `(cells, genes)`): Log of each gene's expected share of the library.
        log_theta (`torch.Tensor` of shape `(cells, genes)`): Log inverse dispersions.
        dropout_logits (`torch.Tensor` of shape `(cells, genes)`): Log odds that the gene is missed.
        library_size (`torch.Tensor` of shape `(cells,)`): Total counts over all genes.
    """

    HEADS = ("log_rates", "log_theta", "dropout_logits")
    MAX_INITIAL_LOG_THETA = 2.5  # nearly Poisson: the variance of a count of 12 is twice its mean

    def __init__(
        self,
        log_proportions: torch.Tensor,
        log_theta: torch.Tensor,
        dropout_logits: torch.Tensor,
        library_size: torch.Tensor,
    ):
        self.log_proportions = log_proportions
        self.log_theta = log_theta
        self.dropout_logits = dropout_logits
        self.library_size = library_size.to(log_proportions.device)

    @classmethod
    def from_heads(cls, heads: dict[str, torch.Tensor], library_size: torch.Tensor) -> "ZeroInflatedNegativeBinomial":
        """
        From what a decoder's heads give, each `(cells, num_genes + 1)`: their last column is the bin of all other
        genes, which takes its share of the library and has no distribution of its own.
        """
        return cls(
            log_proportions=F.log_softmax(heads["log_rates"].float(), dim=1)[:, :-1],
            # Beyond these limits the distribution is all zeros, or Poisson.
            log_theta=heads["log_theta"].float().clamp(-4, 8)[:, :-1],
            dropout_logits=heads["dropout_logits"].float()[:, :-1],
            library_size=library_size,
        )

    @classmethod
    def initial_biases(cls, counts: sparse.csr_matrix, library_size: np.ndarray) -> dict[str, torch.Tensor]:
        """
        Where the heads start: the training cells' mean rates, and for each gene the θ with which cells of equal
        proportions would have its variance. From zeros, or from one θ for all genes, the fit is far worse.

        Args:
            counts (`scipy.sparse.csr_matrix` of shape `(cells, genes)`): Counts of the training cells.
            library_size (`np.ndarray` of shape `(cells,)`): Their total counts.

        Returns:
            `dict[str, torch.Tensor]`: for each head `(num_genes + 1,)`.
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
        log_theta = np.log(np.maximum(theta, 1e-9)).clip(-2, cls.MAX_INITIAL_LOG_THETA)
        return {
            "log_rates": torch.from_numpy(np.log(totals / totals.sum())).float(),
            "log_theta": torch.from_numpy(np.append(log_theta, cls.MAX_INITIAL_LOG_THETA)).float(),
            "dropout_logits": torch.full((len(totals),), -3.0),  # few genes are missed: one in twenty
        }

    def _rates(self) -> torch.Tensor:
        return self.log_proportions.exp() * self.library_size[:, None]  # (cells, genes)

    def mean(self) -> torch.Tensor:
        """Expected counts, `(cells, genes)`."""
        return self._rates() * torch.sigmoid(-self.dropout_logits)

    def expression(self) -> torch.Tensor:
        """The expected counts as log1p(CP10k), `(cells, genes)`."""
        return log_normalize(self.mean(), self.library_size)

    def log_prob(self, x: torch.Tensor, gene_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            x (`torch.Tensor` of shape `(cells, genes)`): Counts.
            gene_mask (`torch.BoolTensor` of shape `(genes,)`, *optional*): The genes to take; all by default.

        Returns:
            `torch.Tensor` of shape `(cells,)`: log-likelihood in nats. Differentiable in the parameters.
        """
        log_rates = self.log_proportions + self.library_size[:, None].log()
        log_theta, missed = self.log_theta, self.dropout_logits
        if gene_mask is not None:
            x, log_rates, log_theta, missed = (values[:, gene_mask] for values in (x, log_rates, log_theta, missed))
        # log NB(count | rate, θ) = θ log(θ / (θ + rate)), and where the count is not zero also
        # log Γ(count + θ) / (Γ(θ) Γ(count + 1)) + count log(rate / (θ + rate)). Most counts are zero, so the second
        # part is computed for the others alone.
        log_nb_zero = -(log_theta.exp() * F.softplus(log_rates - log_theta))  # (cells, genes)
        log_zero = torch.logaddexp(missed, log_nb_zero)
        log_likelihood = (log_zero - F.softplus(missed)).sum(1)  # (cells,)
        cells, genes = x.nonzero(as_tuple=True)
        count, log_rate, log_theta = x[cells, genes], log_rates[cells, genes], log_theta[cells, genes]
        theta = log_theta.exp()
        of_expressed = torch.lgamma(count + theta) - torch.lgamma(theta) - torch.lgamma(count + 1)
        of_expressed = of_expressed - count * F.softplus(log_theta - log_rate)
        of_expressed = of_expressed + log_nb_zero[cells, genes] - log_zero[cells, genes]
        return log_likelihood.index_add(0, cells, of_expressed)

    def icdf(self, uniform: torch.Tensor) -> torch.Tensor:
        """
        Counts by inverting their distribution at one random number for each value: how many random numbers a Poisson
        sampler takes depends on its rate, so that cells drawn together would depend on each other.

        Args:
            uniform (`torch.DoubleTensor` of shape `(cells, genes)`): Random numbers in [0, 1).

        Returns:
            `torch.FloatTensor` of shape `(cells, genes)`: integer values, on the CPU.
        """
        rates, theta, detection = self._rates(), self.log_theta.exp(), torch.sigmoid(-self.dropout_logits)
        probability_above_zero = -detection * torch.expm1(-theta * torch.log1p(rates / theta))
        above = 1 - uniform.to(rates.device)  # the share of the distribution that lies above the count
        cells, genes = (above < probability_above_zero).nonzero(as_tuple=True)  # most counts are zero
        tail, detection, theta, rates = (
            values[cells, genes].double().cpu().numpy() for values in (above, detection, theta, rates)
        )
        counts = torch.zeros(uniform.shape)
        drawn = _invert_negative_binomial(tail / detection, theta, theta / (theta + rates))
        counts[cells.cpu(), genes.cpu()] = torch.from_numpy(drawn.astype(np.float32))
        return counts


def _invert_negative_binomial(tail: np.ndarray, theta: np.ndarray, p: np.ndarray) -> np.ndarray:
    """The smallest count k >= 1 with P(count > k) <= tail."""
    from scipy import stats  # slow to import

    counts = np.empty_like(tail)
    unfinished, k = np.arange(len(tail)), 1
    probability = p**theta  # of k - 1
    above = 1 - probability  # P(count > k - 1)
    # Nearly all counts are small, and summed up at once; SciPy takes a microsecond for each of the others.
    while k <= 16 and len(unfinished):
        probability = probability * (1 - p) * (theta + k - 1) / k
        above = above - probability
        counts[unfinished[above <= tail]] = k
        left = above > tail
        unfinished, probability, above, tail, theta, p = (
            values[left] for values in (unfinished, probability, above, tail, theta, p)
        )
        k += 1
    counts[unfinished] = np.maximum(stats.nbinom.isf(np.maximum(tail, 1e-16), theta, p), k)
    return counts


class PointMass:
    """
    Cells that follow from their latents without any noise, as in the paper: expression, and counts rounded from it.

    Args:
        log_values (`torch.Tensor` of shape `(cells, genes)`): Expression, not negative.
        library_size (`torch.Tensor` of shape `(cells,)`, *optional*):
            Total counts over all genes, with which `log_values`, log1p(CP10k), become counts.
        is_counts (`bool`, defaults to `False`): Whether the cells are counts; else they are `log_values` themselves.
    """

    def __init__(self, log_values: torch.Tensor, library_size: torch.Tensor | None = None, is_counts: bool = False):
        self.log_values = log_values
        self.library_size = library_size
        self.is_counts = is_counts

    def mean(self) -> torch.Tensor:
        """Counts before they are rounded, or log values: `(cells, genes)`. A `ValueError` if counts have no size."""
        if not self.is_counts:
            return self.log_values
        if self.library_size is None:
            raise ValueError("These latents hold no library size, without which there are no counts: give one.")
        return torch.expm1(self.log_values) * self.library_size.to(self.log_values.device)[:, None] / TARGET_SUM

    def expression(self) -> torch.Tensor:
        """The expression that the denoiser made, `(cells, genes)`."""
        return self.log_values

    def log_prob(self, x: torch.Tensor, gene_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Raises a `ValueError`: without noise there is no likelihood."""
        raise ValueError(
            "ExpressionCodec has no likelihood: cells follow from latents without noise. Use ProgramCodec."
        )

    def icdf(self, uniform: torch.Tensor) -> torch.Tensor:
        """The mean, rounded where it is counts; the random numbers `(cells, genes)` have no effect. On the CPU."""
        values = self.mean().float().cpu()
        return values.round() if self.is_counts else values


LIKELIHOODS = {"zinb": ZeroInflatedNegativeBinomial}
