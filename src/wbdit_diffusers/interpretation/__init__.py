"""What a trained pipeline has learnt, to be read."""

from ..pipelines.programs import program_table
from .explain import explain
from .interventions import fit_mixture, hold_program, program_direction
from .layers import record_blocks


# `interpretation.page` is imported where it is used: it needs matplotlib.
__all__ = [
    "explain",
    "fit_mixture",
    "hold_program",
    "program_direction",
    "program_table",
    "record_blocks",
]
