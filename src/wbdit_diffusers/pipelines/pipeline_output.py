"""The output of all pipelines."""

from dataclasses import dataclass

import anndata as ad
import numpy as np
import torch
from diffusers.utils import BaseOutput


@dataclass
class ScRNAPipelineOutput(BaseOutput):
    """
    Output of a pipeline. With `output_type="anndata"`, cells are integer counts (CSR) if the training
    data were counts, else expression, with gene names, conditions and `library_size`.
    """

    cells: ad.AnnData | np.ndarray | torch.Tensor
