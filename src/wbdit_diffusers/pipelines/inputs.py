"""What a call asks for, checked before the first step."""

import reprlib
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..models.loading import check_integer, check_number
from ..processing.processor import ScRNAProcessor


OUTPUT_TYPES = ("anndata", "np", "pt", "latent")
MAX_GUIDANCE_SCALE = 100.0
MAX_LIBRARY_SIZE = 1e9
MAX_CELLS = 2**53  # beyond which no file format counts
LISTS = (list, tuple, np.ndarray, pd.Series, pd.Categorical, pd.Index)


@dataclass(frozen=True)
class AskedCells:
    """
    The cells that a call asks for: each batch takes its part, so that nothing is made for all cells at once.

    Args:
        num_cells (`int`): How many.
        conditions (`dict[str, str | list[str]]`): For some label keys, one label for all cells or one for each.
        library_size (`float` or `np.ndarray` of shape `(num_cells,)`, *optional*): Expected total counts.
    """

    num_cells: int
    conditions: dict[str, str | list[str]]
    library_size: float | np.ndarray | None

    def class_labels(self, processor: ScRNAProcessor, start: int, stop: int) -> torch.Tensor:
        """Codes of the labels of some cells, -1 where none was asked for: `(stop - start, num_label_keys)`."""
        conditions = {
            key: names if isinstance(names, str) else names[start:stop] for key, names in self.conditions.items()
        }
        return processor.encode_conditions(conditions, stop - start)

    def library_sizes(self, start: int, stop: int) -> torch.Tensor | None:
        """The library sizes of some cells, `(stop - start,)`; `None` if none were asked for."""
        if self.library_size is None:
            return None
        sizes = self.library_size[start:stop] if isinstance(self.library_size, np.ndarray) else self.library_size
        return torch.as_tensor(np.broadcast_to(sizes, stop - start).copy(), dtype=torch.float32)


def check_cells(
    processor: ScRNAProcessor,
    num_features: int,
    num_cells: int,
    cell_types: str | list[str] | None,
    conditions: dict[str, str | list[str]] | None,
    library_size: float | list[float] | None,
    generator: torch.Generator | list[torch.Generator] | None,
    latents: torch.Tensor | None,
    output_type: str,
) -> AskedCells:
    """
    What is asked of each cell. The arguments are those of a call, and `num_features`, values per cell.

    Raises:
        ValueError: If something is not of its type, unknown to the model, or not one for each cell.
    """
    check_integer("num_cells", num_cells, largest=MAX_CELLS)
    asked = _all_conditions(processor, cell_types, conditions)
    lengths = {key: len(names) for key, names in asked.items() if not isinstance(names, str)}
    _check_generator(generator)
    if isinstance(generator, list):
        lengths["generator"] = len(generator)
    sizes = None
    if library_size is not None:
        sizes = _check_library_size(processor, library_size, output_type)
        if isinstance(sizes, np.ndarray):
            lengths["library_size"] = len(sizes)
    if latents is not None:
        _check_latents(latents, num_cells, num_features)
        lengths["latents"] = len(latents)
    if num_cells == 1 and lengths:  # a list makes as many cells as it is long
        num_cells = max(lengths.values())
    if num_cells == 0:
        raise ValueError("An empty list was given: give one entry per cell.")
    for argument, length in lengths.items():
        if length != num_cells:
            raise ValueError(f"{argument} has {length} entries for {num_cells} cells: give one per cell.")
    processor.encode_conditions(asked, max([1, *lengths.values()]))  # raises on labels that the model does not know
    return AskedCells(int(num_cells), asked, sizes)


def check_sampling(
    processor: ScRNAProcessor,
    scheduler: SchedulerMixin,
    guidance_scale: float,
    num_inference_steps: int,
    batch_size: int | None,
    output_type: str,
):
    """Raises a `ValueError` on arguments of a call that say how cells are made, not which."""
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` is one of {', '.join(OUTPUT_TYPES)}, not {reprlib.repr(output_type)}.")
    if batch_size is not None:
        check_integer("batch_size", batch_size)
    check_number("guidance_scale", guidance_scale, 0, MAX_GUIDANCE_SCALE)
    if guidance_scale != 1.0 and not processor.label_keys:
        raise ValueError("`guidance_scale` was given, but this model is unconditional (it has no label keys).")
    check_integer("num_inference_steps", num_inference_steps)
    num_train_timesteps = scheduler.config.get("num_train_timesteps")
    if num_train_timesteps is not None and num_inference_steps > num_train_timesteps:
        raise ValueError(
            f"`num_inference_steps` is {num_inference_steps}, but the model was trained on {num_train_timesteps}"
            f" timesteps: take at most as many steps ({type(scheduler).__name__})."
        )


def check_callback(callback: Any, tensor_inputs: Any, known: list[str]):
    """Raises a `ValueError` on a callback that can't be called, or that wants tensors that there are not."""
    if callback is not None and not callable(callback):
        raise ValueError(f"`callback_on_step_end` is a function, not {reprlib.repr(callback)}.")
    if not isinstance(tensor_inputs, (list, tuple)) or not set(map(str, tensor_inputs)) <= set(known):
        raise ValueError(f"`callback_on_step_end_tensor_inputs` knows {known}, not {reprlib.repr(tensor_inputs)}.")


def check_returned(tensors: Any, latents: torch.Tensor) -> torch.Tensor:
    """The latents that a callback returned. Raises a `ValueError` if it returned something else."""
    if not isinstance(tensors, dict):
        raise ValueError(f"`callback_on_step_end` returns a dict of tensors, not {reprlib.repr(tensors)}.")
    returned = tensors.get("latents", latents)
    if not isinstance(returned, torch.Tensor) or returned.shape != latents.shape:
        shape = tuple(getattr(returned, "shape", ())) or type(returned).__name__
        raise ValueError(f"`callback_on_step_end` returned latents {shape}, expected {tuple(latents.shape)}.")
    return returned


def check_decoded(values: torch.Tensor, library_size: torch.Tensor | None = None) -> torch.Tensor:
    """Decoded cells as they are. Raises a `ValueError` if they, or their library sizes, are not finite."""
    for tensor in (values, library_size):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(
                "Decoded cells hold NaN or infinite values: lower `guidance_scale` or `library_size`, take another"
                " scheduler or number of steps, or train the model anew."
            )
    return values


def _all_conditions(processor: ScRNAProcessor, cell_types: Any, conditions: Any) -> dict[str, str | list[str]]:
    """`conditions` with the cell types under the first label key, each one name or a list of them."""
    if conditions is not None and not isinstance(conditions, dict):
        raise ValueError(
            f"`conditions` is a dict from label keys to labels, like {{'phase': 'S'}}, not {reprlib.repr(conditions)}."
        )
    asked = dict(conditions or {})
    if cell_types is not None:
        if not processor.label_keys:
            raise ValueError("`cell_types` was given, but this model is unconditional (it has no label keys).")
        key = processor.label_keys[0]
        if key in asked:
            raise ValueError(f"`cell_types` and conditions[{key!r}] say the same thing: give one of them.")
        asked[key] = cell_types
    for key, names in asked.items():
        if isinstance(names, str):
            continue
        if not isinstance(names, LISTS) or np.ndim(names) != 1:
            raise ValueError(f"{key} is one label, or a list with one for each cell, not {reprlib.repr(names)}.")
        asked[key] = list(names)
        wrong = next((name for name in asked[key] if name is None or isinstance(name, (bytes, float, bool))), "")
        if wrong != "":
            raise ValueError(f"{key} holds {wrong!r}, which is no label: leave {key} out to have it drawn.")
    return asked


def _check_generator(generator: Any):
    if generator is None or isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, list) or not all(isinstance(one, torch.Generator) for one in generator):
        raise ValueError(
            f"`generator` is a torch.Generator, or a list with one for each cell, not {reprlib.repr(generator)}: for"
            " cells of seed 0, give torch.Generator().manual_seed(0)."
        )


def _check_library_size(processor: ScRNAProcessor, library_size: Any, output_type: str) -> float | np.ndarray:
    if not processor.has_library_size:
        raise ValueError("`library_size` was given, but this model was trained on log values, not on counts.")
    if output_type != "anndata":
        raise ValueError(f"`library_size` has no effect on output_type={output_type!r}: leave it out.")
    is_number = isinstance(library_size, Real) and not isinstance(library_size, bool)
    if isinstance(library_size, torch.Tensor):
        library_size = library_size.cpu().numpy()
    if is_number or isinstance(library_size, LISTS):
        sizes = np.asarray(library_size)
        if sizes.dtype.kind in "iuf" and sizes.ndim <= 1:
            sizes = sizes.astype(np.float64)
            if np.all((sizes > 0) & (sizes <= MAX_LIBRARY_SIZE)):
                return sizes if sizes.ndim else float(sizes)
    raise ValueError(
        f"`library_size` is a positive number of counts (up to {MAX_LIBRARY_SIZE:g}), or one per cell, not"
        f" {reprlib.repr(library_size)}."
    )


def _check_latents(latents: Any, num_cells: int, num_features: int):
    if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
        kind = latents.dtype if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise ValueError(f"`latents` is a torch.Tensor of floating-point numbers, not {kind}.")
    if latents.ndim != 2 or latents.shape[1] != num_features:
        raise ValueError(f"`latents` has shape {tuple(latents.shape)}, expected {(num_cells, num_features)}.")
    if not torch.isfinite(latents).all():
        raise ValueError("`latents` hold NaN or infinite values: give Gaussian noise.")
