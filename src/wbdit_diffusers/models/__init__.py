"""The denoiser, and the codecs between cells and what it denoises."""

from .codec_expression import ExpressionCodec
from .codec_programs import ProgramCodec
from .gaussian_mixture import GaussianMixtureDenoiser
from .likelihoods import LIKELIHOODS, CellDistribution
from .transformer_white_box_dit import WhiteBoxDiTModel


__all__ = ["LIKELIHOODS", "CellDistribution", "ExpressionCodec", "GaussianMixtureDenoiser", "ProgramCodec"]
__all__ += ["WhiteBoxDiTModel"]
