"""Judging cells: [`evaluate`] a pipeline, [`evaluate_cells`] of any generator, [`compare_cells`] of several."""

from .comparison import compare_cells, comparison_to_markdown
from .report import evaluate, evaluate_cells
from .samples import draw_baselines, draw_samples
from .table import to_json, to_markdown


# `evaluation.figure` is imported where it is used: it needs matplotlib.
__all__ = [
    "compare_cells",
    "comparison_to_markdown",
    "draw_baselines",
    "draw_samples",
    "evaluate",
    "evaluate_cells",
    "to_json",
    "to_markdown",
]
