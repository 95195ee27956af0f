"""Cells that follow from their latents without noise, as in arXiv 2411.06785."""

from dataclasses import dataclass

import torch

from ...processing.normalize import TARGET_SUM


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
