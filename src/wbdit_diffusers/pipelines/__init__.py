"""Noise in, cells out."""

from .pipeline_output import ScRNAPipelineOutput
from .pipeline_scrna_generation import ScRNAGenerationPipeline


__all__ = ["ScRNAGenerationPipeline", "ScRNAPipelineOutput"]
