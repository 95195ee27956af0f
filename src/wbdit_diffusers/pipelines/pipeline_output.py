"""What [`ScRNAGenerationPipeline`] returns."""

from dataclasses import dataclass

import anndata as ad
import numpy as np
import torch
from diffusers.utils import BaseOutput


@dataclass
class ScRNAPipelineOutput(BaseOutput):
    """
    Output of [`ScRNAGenerationPipeline`].

    Args:
        cells (`AnnData`, `np.ndarray` or `torch.Tensor`):
            The generated cells. With `output_type="anndata"`: integer counts (CSR) when the training data were counts,
            else expression, with gene names, conditions and `library_size`.
    """

    cells: ad.AnnData | np.ndarray | torch.Tensor
