"""Where `ModularPipeline.from_pretrained(..., trust_remote_code=True)` finds the blocks: in their package."""

try:
    from wbdit_diffusers.modular import ScRNABlocks
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "wbdit_diffusers":
        raise
    raise ImportError("These blocks are of the package wbdit_diffusers: pip install wbdit_diffusers") from None

__all__ = ["ScRNABlocks"]
