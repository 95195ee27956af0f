"""The request of a call, checked and encoded before the first step."""

from typing import Any

import numpy as np
import torch
from diffusers.utils import logging

from ..processing.processor import ScRNAProcessor
from ..sampling.noise import CellNoise


logger = logging.get_logger(__name__)


def encode_request(
    processor: ScRNAProcessor, num_cells: int | None, cell_types: Any, conditions: Any, library_size: Any, **lists: Any
) -> tuple[int, torch.Tensor, torch.Tensor | None, list[str]]:
    """
    Returns the number of cells, their label codes `(cells, num_label_keys)`, -1 where no label is asked for, their
    library sizes `(cells,)`, if they are given, and the combinations of labels that no training cell has. `lists` are
    other arguments that may have one entry per cell. Raises a `ValueError` if lengths differ, a label is unknown, or a
    library size is not positive.
    """
    conditions = dict(conditions or {})
    if cell_types is not None:
        if not processor.label_keys:
            raise ValueError("`cell_types` was given, but this model is unconditional (it has no label keys).")
        key = processor.label_keys[0]
        if key in conditions:
            raise ValueError(f"`cell_types` and conditions[{key!r}] both name the cell type: give one of them.")
        conditions[key] = cell_types
    lists |= {**conditions, "library_size": library_size}
    lengths = {name: len(value) for name, value in lists.items() if np.ndim(value)}
    expected = num_cells if num_cells is not None else max(lengths.values(), default=1)
    if expected != int(expected) or expected < 1:
        raise ValueError(f"`num_cells` is {num_cells}: ask for at least one cell.")
    for name, length in lengths.items():
        if length != expected:
            raise ValueError(f"`{name}` has {length} entries for {expected} cells: give one per cell.")
    class_labels = processor.encode_conditions(conditions, int(expected))
    tables = processor.label_keys, processor.config.categories
    unseen = [
        ", ".join(f"{key}={names[code]}" for key, names, code in zip(*tables, row.tolist()) if code >= 0)
        for row in (class_labels[: expected if lengths else 1].unique(dim=0) if processor.label_keys else [])
        if not ((row == processor.label_combinations) | (row < 0)).all(dim=1).any()
    ]
    # A part of a stream has `CellNoise`: the whole request was checked before.
    if unseen and not isinstance(lists.get("generator"), CellNoise):
        which = f"Combinations of labels that no training cell has: {len(unseen)} ({unseen[0]} first)"
        logger.warning(f"{which}. Compare such cells with real ones before you use them.")
    if library_size is None:
        return int(expected), class_labels, None, unseen
    if not processor.is_counts:
        raise ValueError("`library_size` was given, but this model was trained on log values, not on counts.")
    sizes = torch.as_tensor(np.asarray(library_size), dtype=torch.float32)
    if not (torch.isfinite(sizes) & (sizes > 0)).all():
        raise ValueError(f"`library_size` must be a positive number of counts, or one per cell, not {library_size}.")
    return int(expected), class_labels, sizes.expand(int(expected)), unseen


def take(value: Any, cells: slice) -> Any:
    """The part of an argument that belongs to some cells; an argument for all cells stays as it is."""
    if isinstance(value, dict):
        return {key: take(one, cells) for key, one in value.items()}
    return value[cells] if np.ndim(value) else value
