"""Distributions of a cell given its latents, as a codec's `decode` returns them."""

from typing import Protocol

import torch

from .negative_binomial import NegativeBinomialMixture
from .quantile_hurdle import QuantileHurdle


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


# The likelihoods that a linear decoder can parametrise
LIKELIHOODS: dict[str, type[NegativeBinomialMixture] | type[QuantileHurdle]] = {
    "nb_mixture": NegativeBinomialMixture,
    "quantile_hurdle": QuantileHurdle,
}

__all__ = ["LIKELIHOODS", "CellDistribution", "NegativeBinomialMixture", "QuantileHurdle"]
