"""How generated cells were made: what `uns["wbdit"]` says."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..version import __version__


def public_name(name_or_path: str | Path | None) -> str:
    """A Hub id as it is, and the name of a local folder: where that lies on a machine is nobody's business."""
    name = str(name_or_path or "")
    return Path(name).name if Path(name).is_dir() or Path(name).is_absolute() else name


def provenance_of(
    pipe: DiffusionPipeline,
    num_inference_steps: int,
    guidance_scale: float,
    generator: torch.Generator | list[torch.Generator],
) -> dict[str, Any]:
    """
    What is needed to make the same cells again, as plain values that an .h5ad file can hold.

    Args:
        pipe ([`ScRNAGenerationPipeline`]): What makes the cells.
        num_inference_steps (`int`): Denoising steps.
        guidance_scale (`float`): Strength of the guidance.
        generator (`torch.Generator` or `list[torch.Generator]`): As it is before the first random number is drawn.

    Returns:
        `dict`: `model_id`, `scheduler`, `num_inference_steps`, `guidance_scale`, `version`, `X` (what the matrix
        holds), and `seed` (one, or one for each cell), unless a generator has given numbers before, so that its seed
        would not give the same cells again.
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
