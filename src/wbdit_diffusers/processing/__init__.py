"""AnnData in, tensors for the codec; counts out of the codec, AnnData out."""

from .normalize import TARGET_SUM, log_normalize
from .processor import ScRNAProcessor


__all__ = ["TARGET_SUM", "ScRNAProcessor", "log_normalize"]
