"""The request of a call, checked and encoded before the first step."""

import math
from typing import Any

import anndata as ad
import numpy as np
import torch
from diffusers.utils import logging

from ..models.gaussian_mixture import GaussianMixtureDenoiser
from ..processing.processor import ScRNAProcessor


logger = logging.get_logger(__name__)


def encode_request(
    processor: ScRNAProcessor, num_cells: int | None, cell_types: Any, conditions: Any, library_size: Any, **lists: Any
) -> tuple[int, torch.Tensor, torch.Tensor | None]:
    """
    Returns the number of cells, their label codes `(cells, num_label_keys)`, -1 where no label is asked for, and their
    library sizes `(cells,)`, if they are given. `lists` are other arguments that may have one entry per cell. Raises a
    `ValueError` if lengths differ, a label is unknown, or a library size is not positive.
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
    if library_size is None:
        return int(expected), class_labels, None
    if not processor.is_counts:
        raise ValueError("`library_size` was given, but this model was trained on log values, not on counts.")
    sizes = torch.as_tensor(np.asarray(library_size), dtype=torch.float32)
    if not (torch.isfinite(sizes) & (sizes > 0)).all():
        raise ValueError(f"`library_size` must be a positive number of counts, or one per cell, not {library_size}.")
    return int(expected), class_labels, sizes.expand(int(expected))


def find_unseen(
    processor: ScRNAProcessor, mixture: GaussianMixtureDenoiser | None, class_labels: torch.Tensor, warn: bool = True
) -> dict[str, np.ndarray]:
    """
    The combinations of labels `(cells, num_label_keys)` that no training cell has, with a warning for the first. Those
    that were composed have the measured combination from which they start, the size of the change from there, and its
    error when measured combinations are left out. An unknown size or error is infinite.
    """
    keys, categories = processor.label_keys, processor.config.categories

    def name(row: torch.Tensor) -> str:
        return ", ".join(f"{key}={names[i]}" for key, names, i in zip(keys, categories, row.tolist()) if i >= 0)

    rows: list[tuple[str, str, float, float]] = []
    asked = class_labels[:1] if class_labels.stride(0) == 0 else class_labels  # one row for all cells
    combinations = asked.unique(dim=0)
    for row in combinations[~processor.is_measured(combinations)] if keys else []:
        place = None if mixture is None else mixture.find_composed(row)
        if mixture is None or place is None:
            rows.append((name(row), "", math.inf, math.inf))
        else:
            sizes = mixture.composed_changes[place].item(), mixture.composed_errors[place].item()
            rows.append((name(row), name(mixture.composed_bases[place]), *sizes))
    columns = "combination", "composed_from", "change", "error"
    unseen = {column: np.array(values) for column, values in zip(columns, zip(*rows))}
    if unseen and warn:
        logger.warning(describe_unseen(unseen))
    return unseen


def mark_unseen(cells: ad.AnnData, processor: ScRNAProcessor):
    """Adds `obs["unseen_combination"]`: whether no training cell has the labels of a cell together."""
    cells.obs["unseen_combination"] = ~processor.is_measured(processor.encode_labels(cells)).numpy()


def describe_unseen(unseen: dict[str, np.ndarray]) -> str:
    """Says in words how dependable the first of some unseen combinations is, and that of others if there are any."""
    first, base, change, error = (column[0] for column in unseen.values())
    message = f"No training cell has {first}."
    if not base:
        message += " Nothing that was measured shows it: treat the cells as unknown."
    elif np.isinf(error):
        message += f" It is composed from {base}. No measured combination could be left out to find its error."
    else:
        message += f" It is composed from {base}, with a change of {change:.1f} ± {error:.1f}."
        message += " The change is within its error: treat it as unknown." if change <= error else ""
    number = len(unseen["combination"]) - 1
    more = f" {number} more combinations are new." if number else ""
    return f"{message}{more} Compare such cells with real ones before you use them."


def take(value: Any, cells: slice) -> Any:
    """The part of an argument that belongs to some cells; an argument for all cells stays as it is."""
    if isinstance(value, dict):
        return {key: take(one, cells) for key, one in value.items()}
    return value[cells] if np.ndim(value) else value
