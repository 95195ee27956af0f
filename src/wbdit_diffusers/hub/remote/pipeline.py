"""Where `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` finds the pipeline: in its package."""

try:
    from wbdit_diffusers import ScRNAGenerationPipeline
except ModuleNotFoundError as error:
    if error.name != "wbdit_diffusers":
        raise
    raise ImportError("This pipeline is one of the package wbdit_diffusers: pip install wbdit_diffusers") from None

__all__ = ["ScRNAGenerationPipeline"]
