"""What a trained pipeline has learnt, to be read."""

from .programs import program_table


__all__ = ["program_table"]
