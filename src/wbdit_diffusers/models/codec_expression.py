"""`ExpressionCodec`: the latents are the cell's expression, as in arXiv 2411.06785."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from scipy import sparse

from ..processing.normalize import TARGET_SUM, to_expression
from .likelihoods import CellDistribution
from .loading import SafetensorsModel


@dataclass(eq=False)
class PointMass:
    """The distribution that puts all probability on one value: log values, or the counts that they stand for."""

    log_values: torch.Tensor  # (cells, genes), log1p(CP10k) of counts
    library_size: torch.Tensor | None = None  # (cells,), for counts
    is_counts: bool = False

    def __post_init__(self):
        self.num_values = self.log_values.shape[1]  # per draw: the genes

    def mean(self) -> torch.Tensor:
        """Counts before rounding, or log values: `(cells, genes)`. Raises `ValueError` without a library size."""
        if not self.is_counts:
            return self.log_values
        if self.library_size is None:
            raise ValueError("These latents hold no library size, which counts need: pass `library_size`.")
        return torch.expm1(self.log_values) * self.library_size.to(self.log_values.device)[:, None] / TARGET_SUM

    def expression(self) -> torch.Tensor:
        """The denoised expression, `(cells, genes)`."""
        return self.log_values

    def log_prob(self, x: torch.Tensor, gene_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Raises `ValueError`: without noise there is no likelihood."""
        raise ValueError("ExpressionCodec has no likelihood, because its cells have no noise. Use ProgramCodec.")

    def icdf(self, uniform: torch.Tensor) -> torch.Tensor:
        """The mean, on the CPU; counts are rounded. Raises a `ValueError` if it is not finite."""
        values = self.mean().float().cpu()
        if not torch.isfinite(values).all():
            raise ValueError("Decoded cells hold NaN or infinite values: lower `guidance_scale` or `library_size`.")
        return values.round() if self.is_counts else values


class ExpressionCodec(SafetensorsModel, ConfigMixin):
    r"""
    Maps counts to log1p(CP10k), or keeps log values as they are, and maps them back without noise. It learns means and
    standard deviations only. The authors' denoisers use it with `standardize=False` and `model_library_size=False`.

    Args:
        num_genes (`int`): Number of modelled genes.
        values (`str`, defaults to `"counts"`): Kind of the values, `"counts"` or `"log"`.
        standardize (`bool`, defaults to `True`): Whether each latent gets mean 0 and variance 1.
        model_library_size (`bool`, defaults to `True`):
            Whether the log library size is one more latent. Otherwise, decoding counts needs a library size.
    """

    @register_to_config
    def __init__(
        self, num_genes: int, values: str = "counts", standardize: bool = True, model_library_size: bool = True
    ):
        super().__init__()
        self.models_library_size = values == "counts" and model_library_size
        self.num_features = num_genes + self.models_library_size
        self.register_buffer("latents_mean", torch.zeros(self.num_features))
        self.register_buffer("latents_std", torch.ones(self.num_features))
        self.register_buffer("log_library_size_range", torch.tensor([0.0, math.inf]))

    @torch.no_grad()
    def fit_statistics(self, matrix: sparse.csr_matrix, library_size: np.ndarray):
        """Measures means, standard deviations and the range of library sizes of the training cells."""
        if self.models_library_size:
            log_library_size = torch.from_numpy(np.log(library_size)).float()
            self.log_library_size_range.copy_(torch.stack([log_library_size.min(), log_library_size.max()]))
        if not self.config.standardize:
            return
        from sklearn.preprocessing import StandardScaler  # slow to import

        features = to_expression(matrix, library_size, self.config.values)
        if self.models_library_size:
            features = sparse.hstack([features, log_library_size.numpy()[:, None]])
        scaler = StandardScaler(with_mean=False).fit(sparse.csr_matrix(features, dtype=np.float64))
        self.latents_mean.copy_(torch.from_numpy(scaler.mean_))
        self.latents_std.copy_(torch.from_numpy(scaler.scale_))  # 1 for a constant gene

    @apply_forward_hook
    def encode(self, matrix: torch.Tensor, library_size: torch.Tensor) -> torch.Tensor:
        """Latents `(cells, num_features)` of cells `(cells, genes)` with total counts `(cells,)`, standardised."""
        features = to_expression(matrix, library_size, self.config.values)
        if self.models_library_size:
            features = torch.cat([features, library_size[:, None].log()], dim=1)
        return (features - self.latents_mean) / self.latents_std

    @apply_forward_hook
    def decode(
        self, latents: torch.Tensor, library_size: torch.Tensor | None = None, class_labels: torch.Tensor | None = None
    ) -> CellDistribution:
        """A [`PointMass`] at the expression, clamped at zero; see [`ProgramCodec.decode`]. Labels have no effect."""
        features = latents.float() * self.latents_std + self.latents_mean
        if self.models_library_size:
            generated = features[:, -1].clamp(*self.log_library_size_range.tolist()).exp()
            library_size = generated if library_size is None else library_size
            features = features[:, :-1]
        return PointMass(features.clamp(min=0), library_size, is_counts=self.config.values == "counts")
