"""What a processor's files must hold, before any of it is used: they may come from anywhere."""

import math
import reprlib
from typing import Any

import torch

from .library_size import QUANTILES


def check_config(
    values: Any, label_keys: Any, num_genes: Any, min_cells: Any, var_names: Any, categories: Any, log_scale: Any
):
    """Raises a `ValueError` on a configuration that is no [`ScRNAProcessor`]'s."""
    if values not in ("counts", "log"):
        raise ValueError(f"`values` is 'counts' or 'log', not {values!r}.")
    if isinstance(label_keys, str):
        raise ValueError(f"`label_keys` is a list of obs keys: write [{label_keys!r}].")
    _check_names("label_keys", label_keys)
    for name, number in (("num_genes", num_genes), ("min_cells", min_cells)):
        is_whole = isinstance(number, int) and not isinstance(number, bool) and number >= 0
        if not is_whole and not (name == "num_genes" and number is None):
            raise ValueError(f"`{name}` is a whole number, not {reprlib.repr(number)}.")
    if (var_names is None) != (categories is None):
        raise ValueError("`var_names` and `categories` are set together, by `fit`: one of them is missing.")
    if var_names is None:
        return
    _check_names("var_names", var_names)
    if not var_names:
        raise ValueError("`var_names` is empty: a model of no gene makes no cells.")
    if not isinstance(categories, (list, tuple)) or len(categories) != len(label_keys):
        raise ValueError(f"`categories` has a list of labels for each of the label keys {list(label_keys)}.")
    for key, names in zip(label_keys, categories):
        _check_names(f"categories of {key!r}", names)
        if not names:
            raise ValueError(f"`categories` of {key!r} are empty.")
    if log_scale is not None:
        _check_log_scale(log_scale)


def check_statistics(arrays: dict[str, torch.Tensor], categories: list[list[str]]):
    """Raises a `ValueError` on tables that are not those of a fitted [`ScRNAProcessor`] with such categories."""
    quantiles, combinations, frequencies = (
        arrays[name] for name in ("library_size_quantiles", "label_combinations", "label_frequencies")
    )
    shapes = {
        "library_size_quantiles": (len(frequencies), len(QUANTILES)),
        "label_combinations": (len(frequencies), len(categories)),
        "label_frequencies": (len(frequencies),),
    }
    for name, shape in shapes.items():
        if tuple(arrays[name].shape) != shape or not len(frequencies):
            raise ValueError(f"{name} has shape {tuple(arrays[name].shape)}, expected {shape}")
        if not torch.isfinite(arrays[name].double()).all():
            raise ValueError(f"{name} holds NaN or infinite values")
    if combinations.dtype != torch.int64:
        raise ValueError(f"label_combinations are {combinations.dtype}, expected torch.int64")
    sizes = torch.tensor([len(names) for names in categories])
    if (combinations < 0).any() or (combinations >= sizes).any():
        raise ValueError("label_combinations name labels that the configuration has not")
    if (frequencies < 0).any() or not math.isclose(float(frequencies.double().sum()), 1, abs_tol=1e-3):
        raise ValueError("label_frequencies are no shares that add up to 1")
    if (quantiles.diff(dim=1) < 0).any() or quantiles.abs().max() > 100:
        raise ValueError("library_size_quantiles are no ascending log library sizes")


def _check_names(name: str, names: Any):
    if not isinstance(names, (list, tuple)) or not all(isinstance(one, str) for one in names):
        raise ValueError(f"`{name}` is a list of names, not {reprlib.repr(names)}.")
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(one for one in names if one in seen or seen.add(one))  # type: ignore[func-returns-value]
        raise ValueError(f"`{name}` holds {reprlib.repr(twice)} more than once.")


def _check_log_scale(log_scale: Any):
    known = {"ln_base", "target_sum", "factor", "knows_library_size", "decimals"}
    if not isinstance(log_scale, dict) or not {"ln_base"} <= set(log_scale) <= known:
        raise ValueError(f"`log_scale` has ln_base, target_sum or factor, not {reprlib.repr(log_scale)}.")
    for name in ("ln_base", "target_sum", "factor"):
        value = log_scale.get(name)
        if value is None and name != "ln_base":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"`log_scale` has a {name} above zero, not {reprlib.repr(value)}.")
    if (log_scale.get("target_sum") is None) == (log_scale.get("factor") is None):
        raise ValueError("`log_scale` has either a target_sum or a factor.")
