"""`ProgramCodec`: cells as a few linear gene programs, under a likelihood of counts or log values."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from scipy import sparse
from torch import nn

from ..processing.normalize import log_normalize
from .likelihoods import LIKELIHOODS, CellDistribution
from .loading import SafetensorsModel


MIN_COMPONENT = 1e-3  # smallest standard deviation of a principal component, as a fraction of the first one's
MAX_LATENT = 100.0  # beyond, a cell has counts in a few genes, or none
MAX_SLOPE = 0.5  # largest initial weight: one linear step goes too far on a log scale


class ProgramCodec(SafetensorsModel, ConfigMixin):
    r"""
    Maps cells to gene programs with a small variational encoder (arXiv 1312.6114), and back with a **linear** decoder
    of a likelihood's parameters. The latents are the programs and, for counts, the log library size, standardised.

    With `"nb_mixture"`, `log rates = W programs + b` over the modelled genes and one bin for all other genes, and
    `log θ = V programs + c`, because a gene may vary more in one cell type than in another. Row `g` of `W` is the
    effect of each program on the log rate of gene `g`. With `"quantile_hurdle"`, the log odds of a zero and the normal
    scores of other values are linear in the programs.

    Labels add effects to the log rates and log θ of each gene, under a strong prior: what the programs can't describe.

    The prior of the programs is the denoiser. The divergence from a normal distribution, with a small weight in the
    loss, keeps the encoder from fitting the noise of single counts.

    Args:
        num_genes (`int`): Number of modelled genes.
        num_encoder_genes (`int`, *optional*): Number of genes that the encoder reads. Default: all modelled genes.
        num_programs (`int`, defaults to 16): Number of gene programs.
        hidden_size (`int`, defaults to 256): Width of the encoder's hidden layer.
        likelihood (`str`, defaults to `"nb_mixture"`):
            Key of `LIKELIHOODS`: `"nb_mixture"` for counts, `"quantile_hurdle"` for log values.
        condition_sizes (`tuple[int, ...]`, defaults to `()`): Number of categories of each label key.
        num_levels (`int`, defaults to 0):
            Number of distinct log values to which draws are rounded; set by [`~ProgramCodec.fit_statistics`].
    """

    @register_to_config
    def __init__(
        self,
        num_genes: int,
        num_programs: int = 16,
        hidden_size: int = 256,
        likelihood: str = "nb_mixture",
        condition_sizes: tuple[int, ...] = (),
        num_levels: int = 0,
        num_encoder_genes: int | None = None,
    ):
        super().__init__()
        self.is_counts = self.models_library_size = LIKELIHOODS[likelihood].is_counts
        self.num_features = num_programs + self.is_counts  # for counts, the log library size is one more latent
        num_bins = num_genes + self.is_counts
        num_inputs = num_bins if num_encoder_genes is None else num_encoder_genes + self.is_counts
        self.encoder = nn.Sequential(nn.Linear(num_inputs, hidden_size), nn.SiLU())
        self.to_mean = nn.Linear(hidden_size, num_programs)
        self.to_log_variance = nn.Linear(hidden_size, num_programs)
        nn.init.zeros_(self.to_log_variance.weight)
        nn.init.constant_(self.to_log_variance.bias, -2.0)
        names = LIKELIHOODS[likelihood].HEADS
        self.heads = nn.ModuleDict({name: nn.Linear(num_programs, num_bins) for name in names})
        self.gene_parameters = nn.ParameterDict(
            {name: torch.zeros(num_bins) for name in LIKELIHOODS[likelihood].GENE_PARAMETERS}
        )
        self.label_effects = nn.ModuleDict()
        if condition_sizes:
            self.label_effects.update({name: nn.Embedding(sum(condition_sizes), num_bins) for name in names})
            for effects in self.label_effects.values():
                nn.init.zeros_(effects.weight)
        for name in names[1:]:  # all cells start with the same noise
            nn.init.zeros_(self.heads[name].weight)
        # Statistics of the programs and log library size of the training cells, which standardise the latents
        self.register_buffer("latents_mean", torch.zeros(self.num_features))
        self.register_buffer("latents_std", torch.ones(self.num_features))
        self.register_buffer("log_library_size_range", torch.tensor([0.0, math.inf]))
        if not self.is_counts:  # log values may have any base and scale
            self.register_buffer("values_mean", torch.zeros(num_genes))
            self.register_buffer("values_std", torch.ones(1))
            self.register_buffer("levels", torch.zeros(num_levels))
        for name, size in LIKELIHOODS[likelihood].TABLES.items():
            self.register_buffer(name, torch.zeros(num_genes, size))
        if num_encoder_genes is not None:
            self.register_buffer("encoder_genes", torch.zeros(num_encoder_genes, dtype=torch.long))  # their positions
        # Axes of the named programs in the space of the standardised ones, which keep the axes of the fit
        self.register_buffer("program_axes", torch.eye(num_programs))

    # ==================== Fitting ====================

    @torch.no_grad()
    def fit_statistics(self, matrix: sparse.csr_matrix, library_size: np.ndarray):
        """Initialises the decoder, and stores the range of library sizes, or the distinct log values."""
        values = LIKELIHOODS[self.config.likelihood].initial_values(matrix, library_size)
        if self.is_counts:
            log_library_size = torch.from_numpy(np.log(library_size)).float()
            self.log_library_size_range.copy_(torch.stack([log_library_size.min(), log_library_size.max()]))
        else:
            levels = values.pop("levels")
            self.register_buffer("levels", levels.to(self.values_mean))
            self.register_to_config(num_levels=len(levels))
            mean = np.asarray(matrix.mean(axis=0), dtype=np.float64).ravel()
            variance = np.asarray(matrix.power(2).mean(axis=0), dtype=np.float64).ravel() - mean**2
            self.values_mean.copy_(torch.from_numpy(mean))
            self.values_std.fill_(max(math.sqrt(max(variance.mean(), 0)), 1e-3))
        for name, value in values.items():
            if name in self.heads:
                self.heads[name].bias.copy_(value)
            elif name in self.gene_parameters:
                self.gene_parameters[name].copy_(value)
            else:
                getattr(self, name).copy_(value)

    @torch.no_grad()
    def start_programs(self, matrix: sparse.csr_matrix, library_size: np.ndarray, precision: float):
        """Starts the encoder at principal components, and the decoder at one step of Fisher scoring under a prior."""
        from sklearn.decomposition import PCA  # slow to import

        # A fit from random weights is slower, and its programs differ between seeds.
        number = min(self.config.num_programs, self.config.hidden_size // 2, *(size - 1 for size in matrix.shape))
        if number < 1:
            return
        expression = log_normalize(matrix, library_size) if self.is_counts else matrix
        pca = PCA(number, svd_solver="arpack", random_state=0)
        programs = pca.fit_transform(expression)
        scale = programs.std(axis=0)
        number = int((scale > MIN_COMPONENT * scale[0]).sum())  # similar cells have fewer components
        programs, scale = programs[:, :number], scale[:number]
        # Two hidden units per program, because silu(x) - silu(-x) = x. The others have no effect yet.
        encoder = self.encoder[0]
        projection = torch.from_numpy(pca.components_[:number] / scale[:, None]).to(encoder.weight)  # (number, genes)
        projection = torch.cat([projection, -projection])
        center = torch.from_numpy(pca.mean_).to(encoder.weight)
        if not self.is_counts:  # the encoder sees standardised values
            center = (center - self.values_mean) / self.values_std
            projection = projection * self.values_std
        units, places = 2 * number, torch.arange(number)
        encoder.weight[:units] = 0
        encoder.weight[:units, : len(center)] = projection
        encoder.bias[:units] = -projection @ center
        self.to_mean.weight[:number] = 0
        self.to_mean.weight[places, places] = 1
        self.to_mean.weight[places, number + places] = -1
        self.to_mean.bias[:number] = 0
        slopes = LIKELIHOODS[self.config.likelihood].initial_slopes(
            matrix, library_size, programs / scale, {name: head.bias for name, head in self.heads.items()}, precision
        )
        for name, slope in slopes.items():
            self.heads[name].weight[:, :number] = slope.clamp(-MAX_SLOPE, MAX_SLOPE).to(encoder.weight)

    @torch.no_grad()
    def standardize_latents(self, latents: torch.Tensor):
        """Standardises `encode`, which made these `latents` of the training cells, to mean 0 and variance 1."""
        latents = latents.to(self.latents_mean.device)
        self.latents_mean.add_(latents.mean(0) * self.latents_std)
        self.latents_std.mul_(latents.std(0).clamp(min=1e-3))

    def forward(self, matrix: torch.Tensor, library_size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Negative log-likelihood given drawn programs, and their posterior's divergence from N(0, 1), `(cells,)`."""
        mean, log_variance = self.posterior(matrix, library_size)
        programs = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)
        return self.decoder_loss(programs, matrix, library_size), divergence

    def decoder_loss(
        self,
        programs: torch.Tensor,
        matrix: torch.Tensor,
        library_size: torch.Tensor,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Negative log-likelihood `(cells,)` of cells `(cells, genes)` given programs and labels; see `decode`."""
        values = _bins(matrix, library_size) if self.is_counts else matrix
        return -self.decode_programs(programs, library_size, class_labels).log_prob(values)

    # ==================== Programs ====================

    def activities(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Program activities `(cells, num_programs)` of latents `(cells, num_features)`, in standard deviations of the
        training cells. They are the latents along `program_axes`; single latents have no meaning.
        """
        return latents[:, : self.config.num_programs].float() @ self.program_axes.float().T

    @property
    def loadings(self) -> torch.Tensor:
        """
        Effect `(genes, num_programs)` of one standard deviation of each program: the change of a gene's log rate
        relative to the average count, or for log values, the change of its mean in an average cell.
        """
        axes = torch.linalg.inv(self.program_axes.float())  # a column per program
        if not self.is_counts:
            step = 0.1
            raised, lowered = (self.decode(sign * step * axes.T).mean() for sign in (1, -1))
            return ((raised - lowered) / (2 * step)).detach().T
        weight = self.heads["log_rates"].weight.detach().float()  # (genes + 1, num_programs)
        loadings = weight * self.latents_std[:-1].float() @ axes
        mean_proportions = self.heads["log_rates"](self.latents_mean[:-1].to(self.dtype)).detach().float().softmax(0)
        return (loadings - mean_proportions @ loadings)[:-1]  # relative to the average count

    @property
    def weighted_loadings(self) -> torch.Tensor:
        """
        Loadings of counts times `sqrt(m / (1 + m))`, where `m` is the gene's count in an average cell: the square root
        of the information that a Poisson count has about its log rate. Loadings of log values are returned unchanged.
        """
        if not self.is_counts:
            return self.loadings
        mean_proportions = self.heads["log_rates"](self.latents_mean[:-1].to(self.dtype)).detach().float().softmax(0)
        mean_counts = mean_proportions[:-1] * self.latents_mean[-1].exp()
        return self.loadings * (mean_counts / (1 + mean_counts)).sqrt()[:, None]

    @property
    def metric(self) -> torch.Tensor:
        """
        Matrix `(num_features, num_programs)`: distances of latents times it are distances of genes' log rates, each
        weighted by its information ([`~ProgramCodec.weighted_loadings`]). The library size has no part in them.
        """
        loadings = (self.weighted_loadings @ self.program_axes.float()).double()  # (genes, num_programs)
        values, vectors = torch.linalg.eigh(loadings.T @ loadings)
        root = vectors * values.clamp(min=0).sqrt()
        return torch.cat([root, root.new_zeros(self.num_features - len(root), root.shape[1])])

    # ==================== Cells to latents ====================

    def posterior(self, matrix: torch.Tensor, library_size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance of the programs given the cells, `(cells, num_programs)` each; see `forward`."""
        if self.config.num_encoder_genes is not None:
            matrix = matrix[:, self.encoder_genes]
        if self.is_counts:
            expression = log_normalize(_bins(matrix, library_size), library_size)
        else:
            expression = (matrix - self.values_mean) / self.values_std
        hidden_states = self.encoder(expression.to(self.dtype))
        return self.to_mean(hidden_states), self.to_log_variance(hidden_states).clamp(-8, 2)

    @apply_forward_hook
    def encode(self, matrix: torch.Tensor, library_size: torch.Tensor) -> torch.Tensor:
        """
        Latents `(cells, num_features)` of cells `(cells, genes)` with total counts `(cells,)`: posterior means of the
        programs and, for counts, log library sizes, standardised.
        """
        latents = self.posterior(matrix, library_size)[0]
        if self.is_counts:
            latents = torch.cat([latents, library_size[:, None].log()], dim=1)
        return (latents - self.latents_mean) / self.latents_std

    # ==================== Latents to cells ====================

    def decode_programs(
        self, programs: torch.Tensor, library_size: torch.Tensor | None, class_labels: torch.Tensor | None = None
    ) -> CellDistribution:
        """Distribution of cells given programs `(cells, num_programs)`, not standardised; see `decode`."""
        likelihood = LIKELIHOODS[self.config.likelihood]
        parameters = {name: head(programs) for name, head in self.heads.items()}
        if class_labels is not None and self.label_effects:
            class_labels = class_labels.to(programs.device)
            first = torch.tensor([0, *self.config.condition_sizes[:-1]], device=programs.device).cumsum(0)
            is_known = (class_labels >= 0).to(programs.dtype)[..., None]
            for name, effects in self.label_effects.items():
                of_labels = effects(class_labels.clamp(min=0) + first) * is_known  # (cells, num_label_keys, genes)
                parameters[name] = parameters[name] + of_labels.sum(1)
        parameters |= dict(self.gene_parameters) | {name: getattr(self, name) for name in likelihood.TABLES}
        if not self.is_counts:
            parameters["levels"] = self.levels
        return likelihood(**{name: value.float() for name, value in parameters.items()}, library_size=library_size)

    @apply_forward_hook
    def decode(
        self, latents: torch.Tensor, library_size: torch.Tensor | None = None, class_labels: torch.Tensor | None = None
    ) -> CellDistribution:
        """
        Distribution of the counts or log values of the modelled genes, given latents `(cells, num_features)`. The
        library size `(cells,)` is by default that in the latents, clamped to the range of the training cells. Effects
        of class labels `(cells, num_label_keys)` are added; -1 is an unknown label.
        """
        if latents.abs().max() > MAX_LATENT:
            far = f"Latents are {latents.abs().max():.3g} standard deviations from the training cells"
            raise ValueError(f"{far}: lower `guidance_scale`, take more steps or another scheduler.")
        latents = latents.float() * self.latents_std + self.latents_mean
        if library_size is None and self.is_counts:
            library_size = latents[:, -1].clamp(*self.log_library_size_range.tolist()).exp()
        return self.decode_programs(latents[:, : self.config.num_programs].to(self.dtype), library_size, class_labels)

    @torch.no_grad()
    def information(self, distribution: Any, gene_mask: torch.Tensor) -> torch.Tensor:
        """
        Fisher information `(cells, num_features, num_features)` of some genes about the latents. `distribution` is
        what [`~ProgramCodec.decode`] returned for them, and `gene_mask` is `(genes,)`.
        """
        scale, total = self.latents_std[: self.config.num_programs], torch.zeros(())
        for name, weights in distribution.information().items():
            effects = self.heads[name].weight.float() * scale  # (genes, num_programs)
            average = torch.zeros(1, self.num_features, device=self.device)
            if self.is_counts:  # the rates of all genes add up to the library size
                average = F.pad(distribution.log_proportions.exp() @ effects, (0, 1))  # (cells, num_features)
                effects = torch.cat([effects, self.latents_std[-1].expand(len(effects), 1)], dim=1)
            effects, weights = effects[: len(gene_mask)][gene_mask], weights[:, gene_mask]  # (cells, genes)
            products = weights @ (effects[:, :, None] * effects[:, None]).flatten(1)
            cross = average[:, :, None] * (weights @ effects)[:, None]  # (cells, num_features, num_features)
            squares = average[:, :, None] * average[:, None] * weights.sum(1)[:, None, None]
            total = total + products.unflatten(1, (self.num_features, -1)) - cross - cross.mT + squares
        return total


def _bins(counts: torch.Tensor, library_size: torch.Tensor) -> torch.Tensor:
    """Counts of the genes, with a last column for all other genes: `(cells, genes + 1)`."""
    return torch.cat([counts, (library_size - counts.sum(1))[:, None]], dim=1)
