"""Judging generated cells: [`evaluate`] a pipeline, or [`evaluate_cells`] of any generator."""

from .report import evaluate, evaluate_cells
from .samples import draw_baselines, draw_samples
from .table import to_markdown


# `evaluation.figure` is imported where it is used: it needs matplotlib.
__all__ = ["draw_baselines", "draw_samples", "evaluate", "evaluate_cells", "to_markdown"]
