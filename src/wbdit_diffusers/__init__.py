"""Generation of single-cell RNA-seq data with a White-Box Diffusion Transformer (arXiv 2411.06785)."""

from typing import TYPE_CHECKING

from ._lazy import lazy_exports
from .version import __version__


if TYPE_CHECKING:
    from .models import ExpressionCodec, GaussianMixtureDenoiser, ProgramCodec, WhiteBoxDiTModel
    from .pipelines import ScRNAGenerationPipeline, ScRNAPipeline, ScRNAPipelineOutput
    from .processing import ScRNAProcessor

# Diffusers looks up the components of a saved pipeline here, by class name.
__getattr__ = lazy_exports(
    __name__,
    {
        "ExpressionCodec": "models",
        "GaussianMixtureDenoiser": "models",
        "ProgramCodec": "models",
        "WhiteBoxDiTModel": "models",
        "ScRNAGenerationPipeline": "pipelines",
        "ScRNAPipeline": "pipelines",
        "ScRNAPipelineOutput": "pipelines",
        "ScRNAProcessor": "processing",
    },
)

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
