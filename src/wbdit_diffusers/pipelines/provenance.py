"""How generated cells were made: the contents of `uns["wbdit"]`."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..version import __version__


def public_name(name_or_path: str | Path | None) -> str:
    """A Hub id as it is, and the last part of a local path: the rest of a path stays private."""
    name = str(name_or_path or "")
    return Path(name).name if Path(name).is_dir() or Path(name).is_absolute() else name


def provenance_of(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    guidance_scale: float,
    generator: torch.Generator | list[torch.Generator],
) -> dict[str, Any]:
    """
    Everything needed to make the same cells again, as plain values that an .h5ad file can hold.

    Args:
        pipe ([`ScRNAPipeline`]): The pipeline that makes the cells.
        num_inference_steps (`int`): Number of denoising steps.
        guidance_scale (`float`): Strength of the guidance.
        generator (`torch.Generator` or `list[torch.Generator]`): The generator before its first random number.

    Returns:
        `dict`: `model_id`, `scheduler`, `num_inference_steps`, `guidance_scale`, `version`, `X` (the unit of the
        matrix), and `seed`, one or one per cell. A generator that was used before has no `seed`, since its seed would
        give other cells.
    """
    provenance = {
        "model_id": public_name(pipe.config.get("_name_or_path")),
        "scheduler": type(pipe.scheduler).__name__,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "version": __version__,
        "X": "counts" if pipe.processor.config.values == "counts" else "log expression",
    }
    generators = generator if isinstance(generator, list) else [generator]
    fresh = [torch.Generator(one.device).manual_seed(one.initial_seed()) for one in generators]
    if all(torch.equal(one.get_state(), new.get_state()) for one, new in zip(generators, fresh)):
        seeds = np.array([one.initial_seed() for one in generators], dtype=np.uint64)
        provenance["seed"] = seeds if isinstance(generator, list) else int(seeds[0])
    return provenance
