"""From noise to latents: random numbers by cell, the reverse loop, guidance, solvers."""

from .denoise import denoise
from .guidance import Conditions, GaussianGuide, Guide, predict
from .noise import CellNoise, NoiseBatch
from .schedulers import SCHEDULERS, from_clean, make_scheduler, signal_and_noise, to_clean, training_scheduler


__all__ = ["SCHEDULERS", "CellNoise", "Conditions", "GaussianGuide", "Guide", "NoiseBatch", "denoise", "from_clean"]
__all__ += ["make_scheduler", "predict", "signal_and_noise", "to_clean", "training_scheduler"]
