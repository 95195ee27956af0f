"""Checkpoints of the denoiser's training, to go on from after an interruption.

Each is written into `.checkpoint-N.partial` and renamed last: what is called `checkpoint-N` is complete.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError

from .processes import together


logger = get_logger(__name__)

STATE_NAME = "state.json"  # written last: its step, its seconds, and the sizes of all other files


def write_whole(path: Path, write: Callable[[Path], Any]):
    """
    Writes a file or folder beside its place, and renames it when it is complete.

    Raises:
        OSError: If it can't be written. Nothing is left of it, and what was at its place stays.
    """
    partial = partial_path(path)
    remove(partial)
    try:
        write(partial)
    except BaseException as error:
        remove(partial)
        if isinstance(error, (SafetensorError, RuntimeError)):  # what torch and safetensors make of a full disk
            raise OSError(f"{path} could not be written: {error}") from error
        raise
    if path.is_dir():
        remove(path)
    partial.replace(path)


def partial_path(path: Path) -> Path:
    """Where it is written before it is complete."""
    return path.with_name(f".{path.name}.partial")


def remove(path: Path):
    """A file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_checkpoint(checkpoint: Path):
    """Renamed first, so that one that is removed in part is no checkpoint."""
    partial = partial_path(checkpoint)
    remove(partial)
    checkpoint.replace(partial)
    remove(partial)


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of steps after which a checkpoint was written."""
    return int(checkpoint.name.split("-")[1])


def read_state(checkpoint: Path) -> dict[str, Any]:
    """
    Step, seconds and files of a checkpoint.

    Raises:
        ValueError: If the folder is no checkpoint, or a file is missing or not as long as it was.
    """
    if not checkpoint.is_dir() or not re.fullmatch(r"checkpoint-\d+", checkpoint.resolve().name):
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint}: this is no checkpoint; give a checkpoint-N folder, or 'latest'."
        )
    try:
        state = json.loads((checkpoint / STATE_NAME).read_text())
        sizes, _ = dict(state["sizes"]), (int(state["step"]), int(state["num_seen"]), float(state["seconds"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint}: this is no checkpoint, or an incomplete one ({STATE_NAME} is"
            " missing or damaged); give another one, or 'latest'."
        ) from error
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(
                f"--resume_from_checkpoint {checkpoint}: {name} is missing or truncated; give another checkpoint."
            )
    return state


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete one; damaged ones are passed over with a warning."""
    for checkpoint in reversed(find_checkpoints(output_dir)):
        try:
            read_state(checkpoint)
        except ValueError as error:
            logger.warning(f"{error} It is passed over.")
            continue
        return checkpoint
    return None


def save_checkpoint(
    accelerator: Accelerator,
    ema: EMAModel,
    output_dir: Path,
    step: int,
    num_seen: int,
    seconds: float,
    losses: list[float],
    total_limit: int | None,
):
    """
    Writes model, optimizer, random states and averaged weights, and removes the oldest beyond the limit.

    Args:
        accelerator (`Accelerator`): Has what is saved.
        ema (`EMAModel`): Averaged weights.
        output_dir (`Path`): The run's folder.
        step (`int`): Steps that were taken.
        num_seen (`int`): Cells that all processes together have seen in them.
        seconds (`float`): What they took, stage one included.
        losses (`list[float]`): Of this process, since the last line of the log.
        total_limit (`int`, *optional*): Checkpoints to keep.

    Raises:
        OSError: If it can't be written. Older checkpoints are kept.
    """
    checkpoint = output_dir / f"checkpoint-{step}"
    partial = partial_path(checkpoint)
    with together(accelerator):
        if accelerator.is_main_process:
            remove(partial)
            partial.mkdir()
    try:
        with together(accelerator):
            try:
                accelerator.save_state(str(partial))
                (partial / f"losses_{accelerator.process_index}.json").write_text(json.dumps(losses))
            except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
                raise OSError(f"{checkpoint} could not be written: {error}") from error
        with together(accelerator):
            if accelerator.is_main_process:
                ema.save_pretrained(partial / "ema")
                files = [path for path in partial.rglob("*") if path.is_file()]
                sizes = {str(path.relative_to(partial)): path.stat().st_size for path in sorted(files)}
                state: dict[str, Any] = {"step": step, "num_seen": num_seen, "seconds": seconds}
                state |= {"num_processes": accelerator.num_processes, "sizes": sizes}
                (partial / STATE_NAME).write_text(json.dumps(state, indent=1))
                remove(checkpoint)
                partial.replace(checkpoint)
    except BaseException:
        if accelerator.is_main_process:
            remove(partial)
        raise
    with together(accelerator):
        if accelerator.is_main_process and total_limit is not None:
            for old in find_checkpoints(output_dir)[:-total_limit]:
                remove_checkpoint(old)


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, model_class: type) -> tuple[EMAModel, list[float]]:
    """
    Reads model, optimizer and random states.

    Args:
        accelerator (`Accelerator`): Gets them.
        checkpoint (`Path`): A complete one, of the same network.
        model_class (`type`): Class of the network.

    Returns:
        `tuple[EMAModel, list[float]]`: the averaged weights, and this process's losses since the last line of the log.

    Raises:
        ValueError: If a file is damaged or of another network.
    """
    try:
        accelerator.load_state(str(checkpoint))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # Diffusers' own call of its deprecated `from_config(path)`
            ema = EMAModel.from_pretrained(checkpoint / "ema", model_class, foreach=True)
        losses_path = checkpoint / f"losses_{accelerator.process_index}.json"  # none of a process that was not there
        losses = [float(loss) for loss in json.loads(losses_path.read_text())] if losses_path.is_file() else []
    except Exception as error:  # of torch, pickle, safetensors, json and Diffusers
        raise ValueError(
            f"--resume_from_checkpoint {checkpoint} is damaged, or of another network ({type(error).__name__}:"
            f" {str(error).splitlines()[0] if str(error) else ''}); give another checkpoint."
        ) from error
    return ema, losses


def check_finite(what: str, tensors: dict[str, torch.Tensor], mend: str):
    """Raises a `ValueError` if a weight is not finite: a model of such weights is of no use."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{what} has weights that are not finite ({name}). {mend}")
