"""Where Diffusers finds the class of a component: in its package. `pipeline.py` has said so if that is missing."""

from wbdit_diffusers import ExpressionCodec, GaussianMixtureDenoiser, ProgramCodec, ScRNAProcessor, WhiteBoxDiTModel


__all__ = ["ExpressionCodec", "GaussianMixtureDenoiser", "ProgramCodec", "ScRNAProcessor", "WhiteBoxDiTModel"]
