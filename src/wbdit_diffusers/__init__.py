"""Generation of single-cell RNA-seq data with a White-Box Diffusion Transformer (arXiv 2411.06785)."""

from ._threads import share_cores


share_cores()  # before PyTorch is imported

from ._quiet import drop_empty_warnings  # noqa: E402
from ._registration import register  # noqa: E402
from .models import ExpressionCodec, GaussianMixtureDenoiser, ProgramCodec, WhiteBoxDiTModel  # noqa: E402
from .pipelines import ScRNAGenerationPipeline, ScRNAPipeline, ScRNAPipelineOutput  # noqa: E402
from .processing import ScRNAProcessor  # noqa: E402
from .version import __version__  # noqa: E402


drop_empty_warnings()
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
