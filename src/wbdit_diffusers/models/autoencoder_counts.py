"""`CountAutoencoder`: cells as a few linear gene programs under a likelihood of their counts."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from scipy import sparse
from torch import nn


NEAR_POISSON = 2.5  # log θ


class CountAutoencoder(ModelMixin, ConfigMixin):
    r"""
    Maps counts to gene programs and back: a small variational encoder (arXiv 1312.6114), and a **linear** decoder with
    a zero-inflated negative-binomial likelihood. What the denoiser models is a cell's programs and its log library
    size, standardised.

    `rates = library_size * softmax(W programs + b)` over the modelled genes and one bin for all others;
    `counts ~ NB(mean=rates, inverse dispersion=θ)` with `log θ = V programs + c`: a gene that varies much in one cell
    type need not in another. Read counts above all have more zeros than that: a gene is missed altogether with
    probability `sigmoid(U programs + d)`. Row `g` of `W` (`decoder.weight`) says how much each program raises the log
    rate of gene `g`.

    The prior of the programs is the denoiser, not the standard normal distribution: the divergence from that enters
    the loss with a small weight, only to keep the encoder from fitting the noise of single counts.

    Args:
        num_genes (`int`): Modelled genes; the bin of all other genes is not counted.
        num_programs (`int`, defaults to 32): Gene programs.
        hidden_size (`int`, defaults to 256): Width of the encoder.
    """

    @register_to_config
    def __init__(self, num_genes: int, num_programs: int = 32, hidden_size: int = 256):
        super().__init__()
        num_bins = num_genes + 1
        self.encoder = nn.Sequential(nn.Linear(num_bins, hidden_size), nn.SiLU())
        self.to_mean = nn.Linear(hidden_size, num_programs)
        self.to_log_variance = nn.Linear(hidden_size, num_programs)
        nn.init.zeros_(self.to_log_variance.weight)
        nn.init.constant_(self.to_log_variance.bias, -2.0)
        self.decoder = nn.Linear(num_programs, num_bins)
        self.dispersion = nn.Linear(num_programs, num_bins)
        # Alike in all cells at the start
        nn.init.zeros_(self.dispersion.weight)
        nn.init.constant_(self.dispersion.bias, NEAR_POISSON)
        self.zero_inflation = nn.Linear(num_programs, num_bins)
        nn.init.zeros_(self.zero_inflation.weight)
        nn.init.constant_(self.zero_inflation.bias, -3.0)
        # Of the training cells' programs and log library size; standardise the latents.
        self.register_buffer("latents_mean", torch.zeros(num_programs + 1))
        self.register_buffer("latents_std", torch.ones(num_programs + 1))
        self.register_buffer("log_library_size_range", torch.tensor([0.0, math.inf]))

    @torch.no_grad()
    def fit_statistics(self, matrix: sparse.csr_matrix, library_size: np.ndarray):
        """
        Starts the decoder at the training cells' mean rates, and each gene's θ where cells of equal proportions would
        have its variance. From zeros, or from one θ for all genes, the fit is far worse.

        Args:
            matrix (`scipy.sparse.csr_matrix` of shape `(cells, genes)`): Counts of the modelled genes.
            library_size (`np.ndarray` of shape `(cells,)`): Total counts, all other genes included.
        """
        genes = np.asarray(matrix.sum(axis=0), dtype=np.float64).ravel()
        totals = np.append(genes, library_size.sum() - genes.sum()) + 0.5
        self.decoder.bias.copy_(torch.from_numpy(np.log(totals / totals.sum())).float())
        # Excess of the variance over a Poisson distribution's, (library_size * share)² / θ, summed over cells
        share = genes / library_size.sum()
        excess = (
            np.asarray(matrix.power(2, dtype=np.float64).sum(axis=0)).ravel()
            - 2 * share * (matrix.T @ library_size.astype(np.float64))
            + share**2 * (library_size**2).sum()
            - share * library_size.sum()
        )
        theta = share**2 * (library_size**2).sum() / np.maximum(excess, 1e-9)
        log_theta = np.log(np.maximum(theta, 1e-9)).clip(-2, NEAR_POISSON)
        self.dispersion.bias[:-1] = torch.from_numpy(log_theta).float()
        log_library_size = torch.from_numpy(np.log(library_size)).float()
        self.log_library_size_range.copy_(torch.stack([log_library_size.min(), log_library_size.max()]))

    @torch.no_grad()
    def standardize_latents(self, latents: torch.Tensor):
        """Gives the latents of the training cells, as `encode` returns them, mean 0 and variance 1."""
        latents = latents.to(self.latents_mean.device)
        self.latents_mean.add_(latents.mean(0) * self.latents_std)
        self.latents_std.mul_(latents.std(0).clamp(min=1e-3))

    @property
    def num_features(self) -> int:
        """Values per cell that the denoiser sees: the programs and the log library size."""
        return self.config.num_programs + 1

    def posterior(self, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            counts (`torch.Tensor` of shape `(cells, num_genes + 1)`): Counts; the last column holds all other genes.

        Returns:
            `tuple`: mean and log variance of the programs given the counts, each `(cells, num_programs)`.
        """
        hidden_states = self.encoder(torch.log1p(counts * (1e4 / counts.sum(1, keepdim=True))))
        return self.to_mean(hidden_states), self.to_log_variance(hidden_states).clamp(-8, 2)

    def programs(self, counts: torch.Tensor) -> torch.Tensor:
        """The programs of counts `(cells, num_genes + 1)`, their posterior mean: `(cells, num_programs)`."""
        return self.posterior(counts)[0]

    def log_proportions(self, programs: torch.Tensor) -> torch.Tensor:
        """Log share of each gene, and of the other bin, in the library: `(cells, num_genes + 1)`."""
        return F.log_softmax(self.decoder(programs).float(), dim=1)

    def log_theta(self, programs: torch.Tensor) -> torch.Tensor:
        """Log inverse dispersion of each gene and of the other bin: `(cells, num_genes + 1)`."""
        return self.dispersion(programs).float().clamp(-4, 8)  # beyond, the NB is all zeros or Poisson

    def forward(self, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            counts (`torch.Tensor` of shape `(cells, num_genes + 1)`): Counts; the last column holds all other genes.

        Returns:
            `tuple`: for each cell, `(cells,)`, the negative log-likelihood of its genes given programs drawn from the
            posterior, and the divergence of that from the standard normal distribution, both in nats.
        """
        mean, log_variance = self.posterior(counts)
        programs = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)
        return self.negative_log_likelihood(counts, programs), divergence

    def negative_log_likelihood(self, counts: torch.Tensor, programs: torch.Tensor) -> torch.Tensor:
        """
        Args:
            counts (`torch.Tensor` of shape `(cells, num_genes + 1)`): Counts; the last column holds all other genes.
            programs (`torch.Tensor` of shape `(cells, num_programs)`): Programs.

        Returns:
            `torch.Tensor` of shape `(cells,)`: of the genes, without the last column, in nats.
        """
        log_rates = (self.log_proportions(programs) + counts.sum(1, keepdim=True).log())[:, :-1]
        counts, log_theta = counts[:, :-1], self.log_theta(programs)[:, :-1]
        missed = self.zero_inflation(programs).float()[:, :-1]  # logits
        # log NB(count | mean=rate, θ) = θ log(θ / (θ + rate)), and where the count is not zero also
        # log Γ(count + θ) / (Γ(θ) Γ(count + 1)) + count log(rate / (θ + rate)). Most counts are zero.
        log_nb_zero = -(log_theta.exp() * F.softplus(log_rates - log_theta))  # (cells, genes)
        log_zero = torch.logaddexp(missed, log_nb_zero)
        log_likelihood = (log_zero - F.softplus(missed)).sum(1)  # (cells,)
        cells, genes = counts.nonzero(as_tuple=True)
        count, log_rate, log_theta = counts[cells, genes], log_rates[cells, genes], log_theta[cells, genes]
        theta = log_theta.exp()
        of_expressed = torch.lgamma(count + theta) - torch.lgamma(theta) - torch.lgamma(count + 1)
        of_expressed = of_expressed - count * F.softplus(log_theta - log_rate)
        of_expressed = of_expressed + log_nb_zero[cells, genes] - log_zero[cells, genes]
        return -log_likelihood.index_add(0, cells, of_expressed)

    @torch.no_grad()
    def encode(self, counts: torch.Tensor) -> torch.Tensor:
        """Counts `(cells, num_genes + 1)` to standardised latents `(cells, num_features)`."""
        latents = torch.cat([self.programs(counts), counts.sum(1, keepdim=True).log()], dim=1)
        return (latents - self.latents_mean) / self.latents_std

    @torch.no_grad()
    @apply_forward_hook
    def decode(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            latents (`torch.Tensor` of shape `(cells, num_features)`): Standardised programs and log library size.

        Returns:
            `tuple`: each gene's expected share of the library unless it is missed, its inverse dispersion θ, and the
            probability that it is not missed (each cells × genes); and the library size (cells,), within the range of
            the training cells'.
        """
        latents = latents.float() * self.latents_std + self.latents_mean
        log_library_size = latents[:, -1].clamp(*self.log_library_size_range.tolist())
        programs = latents[:, :-1].to(self.decoder.weight.dtype)
        proportions, theta = self.log_proportions(programs).exp(), self.log_theta(programs).exp()
        detection = torch.sigmoid(-self.zero_inflation(programs).float())
        return proportions[:, :-1], theta[:, :-1], detection[:, :-1], log_library_size.exp()

    @torch.no_grad()
    def sample(
        self,
        proportions: torch.Tensor,
        theta: torch.Tensor,
        detection: torch.Tensor,
        library_size: torch.Tensor,
        uniform: torch.Tensor,
    ) -> sparse.csr_matrix:
        """
        Draws counts by inverting their distribution at one random number per value: how many random numbers a
        Poisson sampler takes depends on its rate, so that cells drawn together would depend on each other.

        Args:
            proportions (`torch.Tensor` of shape `(cells, genes)`): Expected share of each gene, unless it is missed.
            theta (`torch.Tensor` of shape `(cells, genes)`): Inverse dispersions.
            detection (`torch.Tensor` of shape `(cells, genes)`): Probabilities that genes are not missed.
            library_size (`torch.Tensor` of shape `(cells,)`): Total counts.
            uniform (`torch.DoubleTensor` of shape `(cells, genes)`): Random numbers in [0, 1).

        Returns:
            `scipy.sparse.csr_matrix` of shape `(cells, genes)`, float32 with integer values.
        """
        rates = proportions * library_size.to(proportions.device)[:, None]  # (cells, genes)
        probability_above_zero = -detection * torch.expm1(-theta * torch.log1p(rates / theta))
        cells, genes = (uniform < probability_above_zero).nonzero(as_tuple=True)  # most counts are zero
        uniform, detection, theta, rates = (
            values[cells, genes].double().cpu().numpy() for values in (uniform, detection, theta, rates)
        )
        counts = _invert_negative_binomial(uniform / detection, theta, theta / (theta + rates))
        row_starts = np.append(0, np.bincount(cells.cpu(), minlength=len(proportions)).cumsum())
        matrix = (counts.astype(np.float32), genes.cpu().numpy(), row_starts)
        return sparse.csr_matrix(matrix, shape=tuple(proportions.shape))


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
