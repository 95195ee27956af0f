"""`ProgramCodec`: cells as a few linear gene programs under a likelihood of their counts."""

import math

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from scipy import sparse
from torch import nn

from ..processing.normalize import log_normalize
from .likelihoods import LIKELIHOODS, CellDistribution


class ProgramCodec(ModelMixin, ConfigMixin):
    r"""
    Maps counts to gene programs and back: a small variational encoder (arXiv 1312.6114), and a **linear** decoder
    whose heads are the parameters of a likelihood. What the denoiser models is a cell's programs and its log library
    size, standardised.

    With the mixture of negative binomials `log rates = W programs + b` over the modelled genes and one bin for all
    others, and `log θ = V programs + c` (a gene that varies much in one cell type need not in another); what outliers
    are like is a property of the gene. Row `g` of `W` says how much each program raises the log rate of gene `g`: see
    [`~ProgramCodec.loadings`].

    The prior of the programs is the denoiser, not the standard normal distribution: the divergence from that enters
    the loss with a small weight, only to keep the encoder from fitting the noise of single counts.

    Args:
        num_genes (`int`): Modelled genes; the bin of all other genes is not counted.
        num_programs (`int`, defaults to 16): Gene programs.
        hidden_size (`int`, defaults to 256): Width of the encoder's hidden layer.
        likelihood (`str`, defaults to `"nb_mixture"`): Name of the counts' distribution, a key of `LIKELIHOODS`.
    """

    @register_to_config
    def __init__(self, num_genes: int, num_programs: int = 16, hidden_size: int = 256, likelihood: str = "nb_mixture"):
        super().__init__()
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"`likelihood` is one of {', '.join(LIKELIHOODS)}, not {likelihood!r}.")
        num_bins = num_genes + 1
        self.encoder = nn.Sequential(nn.Linear(num_bins, hidden_size), nn.SiLU())
        self.to_mean = nn.Linear(hidden_size, num_programs)
        self.to_log_variance = nn.Linear(hidden_size, num_programs)
        nn.init.zeros_(self.to_log_variance.weight)
        nn.init.constant_(self.to_log_variance.bias, -2.0)
        names = LIKELIHOODS[likelihood].HEADS
        self.heads = nn.ModuleDict({name: nn.Linear(num_programs, num_bins) for name in names})
        self.gene_parameters = nn.ParameterDict(
            {name: torch.zeros(num_bins) for name in LIKELIHOODS[likelihood].GENE_PARAMETERS}
        )
        for name in names[1:]:  # the shape of the noise is the same in all cells until training says otherwise
            nn.init.zeros_(self.heads[name].weight)
        # Mean and deviation of the training cells' programs and log library size, with which latents are standardised
        self.register_buffer("latents_mean", torch.zeros(num_programs + 1))
        self.register_buffer("latents_std", torch.ones(num_programs + 1))
        self.register_buffer("log_library_size_range", torch.tensor([0.0, math.inf]))
        # The axes along which programs are read, of the standardised ones; the latents keep those of the fit
        self.register_buffer("program_axes", torch.eye(num_programs))

    @property
    def num_features(self) -> int:
        """Values per cell that the denoiser sees: the programs and the log library size."""
        return self.config.num_programs + 1

    @property
    def models_library_size(self) -> bool:
        """Whether the latents hold the library size."""
        return True

    # ==================== Fitting ====================

    @torch.no_grad()
    def fit_statistics(self, counts: sparse.csr_matrix, library_size: np.ndarray):
        """
        Starts the decoder where the likelihood says (see its `initial_values`), and notes the range of library sizes.

        Args:
            counts (`scipy.sparse.csr_matrix` of shape `(cells, genes)`): Counts of the training cells.
            library_size (`np.ndarray` of shape `(cells,)`): Total counts, all other genes included.
        """
        for name, value in LIKELIHOODS[self.config.likelihood].initial_values(counts, library_size).items():
            (self.heads[name].bias if name in self.heads else self.gene_parameters[name]).copy_(value)
        log_library_size = torch.from_numpy(np.log(library_size)).float()
        self.log_library_size_range.copy_(torch.stack([log_library_size.min(), log_library_size.max()]))

    @torch.no_grad()
    def standardize_latents(self, latents: torch.Tensor):
        """Gives the latents of the training cells, as `encode` returns them, mean 0 and variance 1."""
        latents = latents.to(self.latents_mean.device)
        self.latents_mean.add_(latents.mean(0) * self.latents_std)
        self.latents_std.mul_(latents.std(0).clamp(min=1e-3))

    def forward(self, counts: torch.Tensor, library_size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            counts (`torch.Tensor` of shape `(cells, genes)`): Counts.
            library_size (`torch.Tensor` of shape `(cells,)`): Total counts, all other genes included.

        Returns:
            `tuple`: for each cell, `(cells,)`, the negative log-likelihood of its genes, and of all others together,
            given programs drawn from the posterior, and the divergence of that from the standard normal distribution,
            both in nats.
        """
        mean, log_variance = self.posterior(counts, library_size)
        programs = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)
        return self.decoder_loss(programs, counts, library_size), divergence

    def decoder_loss(self, programs: torch.Tensor, counts: torch.Tensor, library_size: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood `(cells,)` of counts `(cells, genes)` given programs `(cells, num_programs)`."""
        return -self.decode_programs(programs, library_size).log_prob(_bins(counts, library_size))

    # ==================== What the programs are ====================

    def activities(self, latents: torch.Tensor) -> torch.Tensor:
        """
        How much of each program cells have, in standard deviations of the training cells': `(cells, num_programs)`,
        for latents `(cells, num_features)`.

        Read along `program_axes`, which the training sets: linear in the latents, whose own axes mean nothing.
        """
        return latents[:, :-1].float() @ self.program_axes.float().T

    @property
    def loadings(self) -> torch.Tensor:
        """
        How much one standard deviation of each program (see [`~ProgramCodec.activities`]) raises a gene's log rate,
        `(genes, num_programs)`, against the average of all counts: a program that raises all genes alike would change
        no cell.
        """
        weight = self.heads["log_rates"].weight.detach().float() * self.latents_std[:-1]  # (genes + 1, num_programs)
        loadings = weight @ torch.linalg.inv(self.program_axes.float())
        return (loadings - self._mean_proportions() @ loadings)[:-1]

    @property
    def weighted_loadings(self) -> torch.Tensor:
        """
        The loadings times `sqrt(m / (1 + m))`, where `m` is the gene's count in an average cell: the root of the
        information that a count of Poisson noise, on a log scale with one count added, holds of its log rate.
        """
        mean_counts = self._mean_proportions()[:-1] * self.latents_mean[-1].exp()
        return self.loadings * (mean_counts / (1 + mean_counts)).sqrt()[:, None]

    def _mean_proportions(self) -> torch.Tensor:
        """Each bin's share of the library of a cell with average programs, `(genes + 1,)`."""
        log_rates = self.heads["log_rates"](self.latents_mean[:-1].to(self.dtype))
        return torch.softmax(log_rates.detach().float(), dim=0)

    # ==================== Cells to latents ====================

    def posterior(self, counts: torch.Tensor, library_size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance of the programs given a cell, each `(cells, num_programs)`; see `forward`."""
        hidden_states = self.encoder(log_normalize(_bins(counts, library_size), library_size).to(self.dtype))
        return self.to_mean(hidden_states), self.to_log_variance(hidden_states).clamp(-8, 2)

    @apply_forward_hook
    def encode(self, counts: torch.Tensor, library_size: torch.Tensor) -> torch.Tensor:
        """
        Args:
            counts (`torch.Tensor` of shape `(cells, genes)`): Counts.
            library_size (`torch.Tensor` of shape `(cells,)`): Total counts, all other genes included.

        Returns:
            `torch.Tensor` of shape `(cells, num_features)`: standardised posterior means of the programs, and log
            library size.
        """
        programs = self.posterior(counts, library_size)[0]
        return (torch.cat([programs, library_size[:, None].log()], dim=1) - self.latents_mean) / self.latents_std

    # ==================== Latents to cells ====================

    def decode_programs(self, programs: torch.Tensor, library_size: torch.Tensor) -> CellDistribution:
        """The distribution of cells with programs `(cells, num_programs)` and library sizes `(cells,)`."""
        parameters = {name: head(programs) for name, head in self.heads.items()} | dict(self.gene_parameters)
        return LIKELIHOODS[self.config.likelihood].from_heads(parameters, library_size)

    @apply_forward_hook
    def decode(self, latents: torch.Tensor, library_size: torch.Tensor | None = None) -> CellDistribution:
        """
        Args:
            latents (`torch.Tensor` of shape `(cells, num_features)`): Standardised programs and log library size.
            library_size (`torch.Tensor` of shape `(cells,)`, *optional*):
                Total counts, instead of those in `latents`, which are kept within the range of the training cells'.

        Returns:
            [`CellDistribution`]: of the counts of the modelled genes.
        """
        latents = latents.float() * self.latents_std + self.latents_mean
        if library_size is None:
            library_size = latents[:, -1].clamp(*self.log_library_size_range.tolist()).exp()
        return self.decode_programs(latents[:, :-1].to(self.dtype), library_size)


def _bins(counts: torch.Tensor, library_size: torch.Tensor) -> torch.Tensor:
    """The counts of the genes, and in one more column those of all others: `(cells, genes + 1)`."""
    return torch.cat([counts, (library_size - counts.sum(1))[:, None]], dim=1)
