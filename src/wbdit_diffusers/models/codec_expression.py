"""`ExpressionCodec`: the space of arXiv 2411.06785, in which the latents are a cell's expression itself."""

import math

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from scipy import sparse

from ..processing.normalize import to_expression
from .likelihoods import CellDistribution, PointMass
from .loading import CheckedModel, check_integer


CHUNK_SIZE = 4096  # cells whose expression is summed up at once


class ExpressionCodec(CheckedModel, ConfigMixin):
    r"""
    Maps counts to log1p(CP10k), or log values to themselves, and back without any noise: all it learns are means and
    deviations. The denoisers that the authors published work in this space (`standardize=False`,
    `model_library_size=False`).

    Args:
        num_genes (`int`): Modelled genes.
        values (`str`, defaults to `"counts"`): What the cells hold: `"counts"`, or `"log"` (taken as they are).
        standardize (`bool`, defaults to `True`): Whether each latent gets mean 0 and variance 1.
        model_library_size (`bool`, defaults to `True`):
            Whether the log library size is one more latent. If not, counts need a library size from elsewhere.
    """

    @register_to_config
    def __init__(
        self, num_genes: int, values: str = "counts", standardize: bool = True, model_library_size: bool = True
    ):
        super().__init__()
        if values not in ("counts", "log"):
            raise ValueError(f"`values` is 'counts' or 'log', not {values!r}.")
        check_integer("num_genes", num_genes)
        self.register_buffer("latents_mean", torch.zeros(self.num_features))
        self.register_buffer("latents_std", torch.ones(self.num_features))
        self.register_buffer("log_library_size_range", torch.tensor([0.0, math.inf]))

    @property
    def num_features(self) -> int:
        """Values per cell that the denoiser sees: one for each gene, and the log library size where it is modelled."""
        return self.config.num_genes + self.models_library_size

    @property
    def models_library_size(self) -> bool:
        """Whether the latents hold the library size."""
        return self.config.values == "counts" and self.config.model_library_size

    @torch.no_grad()
    def fit_statistics(self, matrix: sparse.csr_matrix, library_size: np.ndarray):
        """
        Measures means and deviations of the training cells, and the range of their library sizes.

        Args:
            matrix (`scipy.sparse.csr_matrix` of shape `(cells, genes)`): Counts, or log values.
            library_size (`np.ndarray` of shape `(cells,)`): Total counts; of no use for log values.
        """
        if self.models_library_size:
            log_library_size = torch.from_numpy(np.log(library_size)).float()
            self.log_library_size_range.copy_(torch.stack([log_library_size.min(), log_library_size.max()]))
        if not self.config.standardize:
            return
        first, second = np.zeros(self.num_features), np.zeros(self.num_features)
        for start in range(0, matrix.shape[0], CHUNK_SIZE):
            rows = slice(start, start + CHUNK_SIZE)
            features = to_expression(matrix[rows], library_size[rows], self.config.values)
            if self.models_library_size:
                features = sparse.hstack([features, np.log(library_size[rows]).astype(np.float32)[:, None]])
            features = sparse.csr_matrix(features)
            first += np.asarray(features.sum(axis=0), dtype=np.float64).ravel()
            second += np.asarray(features.multiply(features).sum(axis=0), dtype=np.float64).ravel()
        mean = first / matrix.shape[0]
        std = np.sqrt(np.maximum(second / matrix.shape[0] - mean**2, 0))
        self.latents_mean.copy_(torch.from_numpy(mean))
        self.latents_std.copy_(torch.from_numpy(np.where(std > 0, std, 1)))  # a gene that is the same in all cells

    @apply_forward_hook
    def encode(self, matrix: torch.Tensor, library_size: torch.Tensor) -> torch.Tensor:
        """
        Args:
            matrix (`torch.Tensor` of shape `(cells, genes)`): Counts, or log values.
            library_size (`torch.Tensor` of shape `(cells,)`): Total counts; of no use for log values.

        Returns:
            `torch.Tensor` of shape `(cells, num_features)`: expression and, where it is modelled, log library size;
            standardised.
        """
        features = to_expression(matrix, library_size, self.config.values)
        if self.models_library_size:
            features = torch.cat([features, library_size[:, None].log()], dim=1)
        return (features - self.latents_mean) / self.latents_std

    @apply_forward_hook
    def decode(
        self,
        latents: torch.Tensor,
        library_size: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
    ) -> CellDistribution:
        """
        Args:
            latents (`torch.Tensor` of shape `(cells, num_features)`): Standardised expression and log library size.
            library_size (`torch.Tensor` of shape `(cells,)`, *optional*):
                Total counts, instead of those in `latents`, which are kept within the range of the training cells'.
            class_labels (`torch.LongTensor` of shape `(cells, num_label_keys)`, *optional*):
                Of no use: all that labels say is in the latents.

        Returns:
            [`CellDistribution`]: all of it at one value, expression clamped at zero.

        Raises:
            ValueError: If a library size is given for log values, which have none.
        """
        if library_size is not None and self.config.values == "log":
            raise ValueError("`library_size` was given, but the cells are log values, which have none.")
        features = latents.float() * self.latents_std + self.latents_mean
        if self.models_library_size:
            generated = features[:, -1].clamp(*self.log_library_size_range.tolist()).exp()
            library_size = generated if library_size is None else library_size
            features = features[:, :-1]
        return PointMass(features.clamp(min=0), library_size, is_counts=self.config.values == "counts")
