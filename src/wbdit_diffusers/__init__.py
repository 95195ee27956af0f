"""Generation of single-cell RNA-seq data with a White-Box Diffusion Transformer (arXiv 2411.06785)."""

from ._registration import register
from .models import ExpressionCodec, GaussianMixtureDenoiser, ProgramCodec, WhiteBoxDiTModel
from .pipelines import ScRNAGenerationPipeline, ScRNAPipeline, ScRNAPipelineOutput
from .processing import ScRNAProcessor
from .version import __version__


register("WhiteBoxDiTModel", "GaussianMixtureDenoiser", "ProgramCodec", "ExpressionCodec", "ScRNAProcessor")

__all__ = [
    "ExpressionCodec",
    "GaussianMixtureDenoiser",
    "ProgramCodec",
    "ScRNAGenerationPipeline",
    "ScRNAPipeline",
    "ScRNAPipelineOutput",
    "ScRNAProcessor",
    "WhiteBoxDiTModel",
    "__version__",
]
