"""Distributions of a cell given its latents: what a codec's `decode` returns.

A `CellDistribution` has `mean()`, `log_prob(x, gene_mask)` and `icdf(uniform)` in the habit of `torch.distributions`,
and `expression()`, the mean on a log scale. `LIKELIHOODS` holds those that a linear decoder can parametrise.
"""

from typing import Protocol

import torch

from ..processing.normalize import TARGET_SUM
from .negative_binomial import NegativeBinomialMixture
from .quantile_hurdle import QuantileHurdle


class CellDistribution(Protocol):
    """What is known of some cells once their latents are: one independent distribution for each gene."""

    library_size: torch.Tensor | None  # (cells,), expected total counts over all genes; `None` for log values

    @property
    def num_values(self) -> int:
        """How many values a draw has: the genes, and where it is drawn, one bin for all others."""

    def mean(self) -> torch.Tensor:
        """Expected values, `(cells, genes)`, in the unit of the training data."""

    def expression(self) -> torch.Tensor:
        """The mean as log1p(CP10k), or as it is where the training data are log values: `(cells, genes)`."""

    def log_prob(self, x: torch.Tensor, gene_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Log-likelihood `(cells,)` of `x` `(cells, genes)`, over all genes or those of a mask `(genes,)`."""

    def icdf(self, uniform: torch.Tensor) -> torch.Tensor:
        """Values below which a share `uniform` `(cells, num_values)` of each distribution lies: a draw of cells."""


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

    @property
    def num_values(self) -> int:
        """How many values a draw has: the genes."""
        return self.log_values.shape[1]

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


LIKELIHOODS: dict[str, type[NegativeBinomialMixture] | type[QuantileHurdle]] = {
    "nb_mixture": NegativeBinomialMixture,
    "quantile_hurdle": QuantileHurdle,
}
