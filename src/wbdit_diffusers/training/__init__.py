"""Training: `train(source, config)` fits a codec and a denoiser, and gives a complete pipeline."""

from typing import TYPE_CHECKING

from .._lazy import lazy_exports
from .config import TrainingConfig, read_config


if TYPE_CHECKING:
    from .processes import TrainingInterrupted
    from .stages import train

__getattr__ = lazy_exports(__name__, {"TrainingInterrupted": "processes", "train": "stages"})

__all__ = ["TrainingConfig", "TrainingInterrupted", "read_config", "train"]
