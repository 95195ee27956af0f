"""Where Diffusers finds the pipeline's class: in the package wbdit_diffusers."""

try:
    from wbdit_diffusers import ScRNAGenerationPipeline
except ModuleNotFoundError as error:
    if error.name != "wbdit_diffusers":
        raise
    raise ImportError("This pipeline needs the package wbdit_diffusers: pip install wbdit_diffusers") from None

__all__ = ["ScRNAGenerationPipeline"]
