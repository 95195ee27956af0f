"""Judging generated cells: [`evaluate`] for a pipeline, [`evaluate_cells`] for one or several generators."""

from .report import evaluate, evaluate_cells
from .samples import draw_baselines, draw_samples
from .table import to_json, to_markdown


# Import `evaluation.figure` where it is used: it needs matplotlib.
__all__ = ["draw_baselines", "draw_samples", "evaluate", "evaluate_cells", "to_json", "to_markdown"]
