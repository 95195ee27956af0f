"""Generation of single-cell RNA-seq data with a White-Box Diffusion Transformer (arXiv 2411.06785)."""

from ._registration import register
from .models.autoencoder_counts import CountAutoencoder
from .models.transformer_white_box_dit import WhiteBoxDiTModel
from .pipelines.pipeline_scrna_generation import ScRNAGenerationPipeline, ScRNAPipelineOutput
from .processing_scrna import ScRNAProcessor
from .version import __version__


register("WhiteBoxDiTModel", "CountAutoencoder", "ScRNAProcessor")

__all__ = [
    "CountAutoencoder",
    "ScRNAGenerationPipeline",
    "ScRNAPipelineOutput",
    "ScRNAProcessor",
    "WhiteBoxDiTModel",
    "__version__",
]
