"""Measurements of a trained pipeline: programs, layers, denoising and interventions."""

from ..pipelines.programs import program_table
from .explain import explain
from .interventions import fit_gaussian_mixture, hold_direction, hold_program, program_direction
from .layers import record_blocks


# `interpretation.page` is imported where it is used: it needs matplotlib.
__all__ = ["explain", "fit_gaussian_mixture", "hold_direction", "hold_program", "program_direction"]
__all__ += ["program_table", "record_blocks"]
