"""Training: `train(source, config)` fits a codec and a denoiser, and gives a complete pipeline."""

from .config import TrainingConfig, config_from_args
from .processes import TrainingInterrupted
from .train import train


__all__ = ["TrainingConfig", "TrainingInterrupted", "config_from_args", "train"]
