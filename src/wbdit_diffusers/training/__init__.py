"""Training: `train` gives a complete pipeline, `fit_codec` its first stage alone."""

from typing import TYPE_CHECKING

from .._lazy import lazy_exports
from .config import CodecConfig, TrainingConfig, read_config


if TYPE_CHECKING:
    from .processes import TrainingInterrupted
    from .stages import fit_codec, train

__getattr__ = lazy_exports(__name__, {"TrainingInterrupted": "processes", "fit_codec": "stages", "train": "stages"})

__all__ = ["CodecConfig", "TrainingConfig", "TrainingInterrupted", "fit_codec", "read_config", "train"]
