"""From noise to latents: random numbers by cell, the reverse loop, the solvers."""

from .denoise import denoise
from .guidance import LabelBatch, predict_guided
from .noise import CellNoise, NoiseBatch
from .schedulers import SCHEDULERS, make_scheduler, training_scheduler


__all__ = [
    "SCHEDULERS",
    "CellNoise",
    "LabelBatch",
    "NoiseBatch",
    "denoise",
    "make_scheduler",
    "predict_guided",
    "training_scheduler",
]
