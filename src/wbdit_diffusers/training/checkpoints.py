"""Checkpoints of the denoiser's training, to go on from after an interruption."""

import shutil
from pathlib import Path

from accelerate import Accelerator
from diffusers.training_utils import EMAModel


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(output_dir.glob("checkpoint-*"), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of steps after which a checkpoint was written."""
    return int(checkpoint.name.split("-")[1])


def resolve_checkpoint(resume_from_checkpoint: str | None, output_dir: Path) -> Path | None:
    """
    The folder to go on from; `None` when none is asked for, or `"latest"` finds none.

    Raises:
        ValueError: If the folder is no checkpoint.
    """
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint == "latest":
        checkpoints = find_checkpoints(output_dir)
        return checkpoints[-1] if checkpoints else None
    path = Path(resume_from_checkpoint)
    if not (path / "model.safetensors").is_file():
        raise ValueError(
            f"--resume_from_checkpoint {path}: this is no checkpoint; give a checkpoint-N folder, or 'latest'."
        )
    return path


def save_checkpoint(accelerator: Accelerator, ema: EMAModel, output_dir: Path, step: int, total_limit: int | None):
    """Writes model, optimizer, random states and averaged weights, and removes the oldest beyond the limit."""
    checkpoint = output_dir / f"checkpoint-{step}"
    accelerator.save_state(str(checkpoint))
    if accelerator.is_main_process:
        ema.save_pretrained(checkpoint / "ema")
        if total_limit is not None:
            for old in find_checkpoints(output_dir)[:-total_limit]:
                shutil.rmtree(old)
