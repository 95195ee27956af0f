"""Training: `train(source, config)` fits a codec and a denoiser, and gives a complete pipeline."""

from .config import TrainingConfig, read_config
from .processes import TrainingInterrupted
from .train import train


__all__ = ["TrainingConfig", "TrainingInterrupted", "read_config", "train"]
