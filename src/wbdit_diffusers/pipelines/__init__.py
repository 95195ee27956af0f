"""Noise in, cells out."""

from .._registration import register
from .pipeline_output import ScRNAPipelineOutput
from .pipeline_scrna_generation import ScRNAGenerationPipeline
from .pipeline_utils import ScRNAPipeline


register("WhiteBoxDiTModel", "GaussianMixtureDenoiser", "ProgramCodec", "ExpressionCodec", "ScRNAProcessor")

__all__ = ["ScRNAGenerationPipeline", "ScRNAPipeline", "ScRNAPipelineOutput"]
