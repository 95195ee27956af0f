"""The request of a call, checked and encoded before the first step."""

from typing import Any

import numpy as np
import torch

from ..processing.processor import ScRNAProcessor


def count_cells(num_cells: int | None, arguments: dict[str, Any]) -> int:
    """
    The number of cells of a call: `num_cells`, or the length of the lists, which must agree.

    Raises:
        ValueError: If a list is empty, or its length differs from `num_cells` or from another list.
    """
    lengths = {name: len(value) for name, value in arguments.items() if _is_list(value)}
    expected = num_cells if num_cells is not None else max(lengths.values(), default=1)
    if expected != int(expected) or expected < 1:
        raise ValueError(f"`num_cells` is {num_cells}: ask for at least one cell.")
    for name, length in lengths.items():
        if length != expected:
            raise ValueError(f"`{name}` has {length} entries for {expected} cells: give one per cell.")
    return int(expected)


def merge_conditions(
    processor: ScRNAProcessor, cell_types: str | list[str] | None, conditions: dict[str, Any] | None
) -> dict[str, Any]:
    """`conditions` with `cell_types` under the first label key. Raises a `ValueError` if both name it."""
    merged = dict(conditions or {})
    if cell_types is not None:
        if not processor.label_keys:
            raise ValueError("`cell_types` was given, but this model is unconditional (it has no label keys).")
        key = processor.label_keys[0]
        if key in merged:
            raise ValueError(f"`cell_types` and conditions[{key!r}] both name the cell type: give one of them.")
        merged[key] = cell_types
    return {key: list(names) if _is_list(names) else names for key, names in merged.items()}


def encode_library_size(processor: ScRNAProcessor, library_size: Any, num_cells: int) -> torch.Tensor:
    """Library sizes `(num_cells,)`. Raises a `ValueError` unless they are positive numbers."""
    if not processor.is_counts:
        raise ValueError("`library_size` was given, but this model was trained on log values, not on counts.")
    sizes = torch.as_tensor(np.asarray(library_size), dtype=torch.float32).expand(num_cells)
    if not (torch.isfinite(sizes) & (sizes > 0)).all():
        raise ValueError(f"`library_size` must be a positive number of counts, or one per cell, not {library_size}.")
    return sizes


def take(value: Any, cells: slice) -> Any:
    """The part of an argument that belongs to some cells; an argument for all cells stays as it is."""
    if isinstance(value, dict):
        return {key: take(one, cells) for key, one in value.items()}
    return value[cells] if _is_list(value) else value


def _is_list(value: Any) -> bool:
    """Whether an argument has one entry per cell."""
    return hasattr(value, "__len__") and not isinstance(value, (str, dict)) and np.ndim(value) > 0
