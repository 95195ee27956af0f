"""Where Diffusers finds the pipeline's class: in the package wbdit_diffusers."""

from wbdit_diffusers import ScRNAGenerationPipeline


__all__ = ["ScRNAGenerationPipeline"]
