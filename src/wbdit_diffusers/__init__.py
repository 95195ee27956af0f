"""Generation of single-cell RNA-seq data with a White-Box Diffusion Transformer (arXiv 2411.06785)."""

from typing import TYPE_CHECKING

from ._lazy import lazy_exports
from ._registration import register
from .version import __version__


if TYPE_CHECKING:
    from .models import ExpressionCodec, GaussianMixtureDenoiser, ProgramCodec, WhiteBoxDiTModel  # noqa: F401
    from .pipelines import (  # noqa: F401
        ScRNAGenerationPipeline,
        ScRNAInpaintPipeline,
        ScRNAPipeline,
        ScRNAPipelineOutput,
        ScRNAToScRNAPipeline,
    )
    from .processing import ScRNAProcessor  # noqa: F401

_MODELS = ("ExpressionCodec", "GaussianMixtureDenoiser", "ProgramCodec", "WhiteBoxDiTModel")
_PIPELINES = (
    "ScRNAGenerationPipeline",
    "ScRNAInpaintPipeline",
    "ScRNAPipeline",
    "ScRNAPipelineOutput",
    "ScRNAToScRNAPipeline",
)
_HOMES = dict.fromkeys(_MODELS, "models") | dict.fromkeys(_PIPELINES, "pipelines") | {"ScRNAProcessor": "processing"}

# Diffusers looks up the classes of a saved pipeline here, and their base class.
__getattr__ = lazy_exports(__name__, _HOMES | {"ModelMixin": "models.loading"})
register()
__all__ = [*_HOMES, "__version__"]


def __dir__() -> list[str]:
    return __all__
