"""The folder of a run: whether it may be written, what it was told (run.json), and its checkpoints."""

import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file

from ..data.split import CellSplit
from ..files import one_line, partial_path, remove, write_whole
from ..hub.facts import TRAINING_NAME
from .config import OutputConfig, TrainingConfig, config_without_places
from .processes import sync_errors


logger = logging.get_logger(__name__)

RUN_NAME, LATENTS_NAME, STAGE_ONE_NAME = "run.json", "latents.npy", "stage_one"
# All outputs of a training but its checkpoints. run.json is removed last, because it permits to remove the others.
FILES = ["README.md", "model_index.json", CellSplit.FILE_NAME, TRAINING_NAME, "training_log.csv", LATENTS_NAME]
FILES += [STAGE_ONE_NAME, "codec", "denoiser", "processor", "scheduler", "logs/wbdit_diffusers", RUN_NAME]
# Fields that change neither the cells nor the steps of a run
MAY_CHANGE = {*OutputConfig.__annotations__, "max_train_minutes", "num_inference_steps", "scheduler"}


def find_run(config: TrainingConfig) -> tuple[Path | None, list[Path]]:
    """The checkpoint to resume from, and the files of the folder that this run replaces. Writes nothing."""
    folder, resume_from = config.output_dir, config.resume_from_checkpoint
    checkpoints, files = find_checkpoints(folder), written_files(folder)
    has_run = folder / RUN_NAME in files
    checkpoint = checkpoints[-1] if checkpoints else None
    if resume_from not in (None, "latest"):
        checkpoint = folder / Path(resume_from).name
        if checkpoint not in checkpoints or checkpoint.resolve() != Path(resume_from).resolve():
            raise ValueError(f"--resume_from_checkpoint {resume_from} is no checkpoint of {folder}. Use 'latest'.")
    if resume_from is not None and has_run:
        old = json.loads((folder / RUN_NAME).read_text())
        for name, value in config_without_places(config).items():
            may_change = name in MAY_CHANGE or (name == "max_train_steps" and value >= old.get(name, value))
            if value != old.get(name) and not may_change:
                raise ValueError(f"--{name} {value}: the run to continue has {old.get(name)}. Use the same value.")
        # Steps after the checkpoint are taken again.
        return checkpoint, checkpoints[checkpoints.index(checkpoint) + 1 :] if checkpoint else []
    if files and not (has_run and config.overwrite_output_dir):
        how = "Continue it with --resume_from_checkpoint latest, or replace it with --overwrite_output_dir"
        holds = f"a run. {how}" if has_run else f"{files[0].name}, but no {RUN_NAME} of a training. Use another one"
        raise ValueError(f"--output_dir {folder} holds {holds}.")
    return None, files


@contextmanager
def start_run(config: TrainingConfig, split: CellSplit, replaced: list[Path]) -> Iterator[None]:
    """Locks the folder, removes what the run replaces, and writes run.json and split.json."""
    folder = config.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    lock: AbstractContextManager = nullcontext()
    try:
        lock = FileLock(folder / ".lock", timeout=0).acquire()
    except Timeout as error:
        raise ValueError(f"--output_dir {folder}: another training writes there. Use another one.") from error
    except (OSError, NotImplementedError) as error:  # of some network file systems
        logger.warning(f"{folder} can't be locked ({one_line(error)}): start no other training there.")
    with lock:
        _discard(replaced)
        for path in folder.glob(".*.partial"):
            remove(path)
        record = json.dumps(config_without_places(config), indent=1)
        write_whole(folder / RUN_NAME, lambda path: path.write_text(record))
        split.save(folder)
        try:
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)


def written_files(folder: Path) -> list[Path]:
    """The files and folders that a training has written, those that depend on others first."""
    return find_checkpoints(folder) + [folder / name for name in FILES if (folder / name).exists()]


def find_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folders = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]))


def _discard(paths: list[Path]):
    """Removes files and folders. They are renamed first, so that a checkpoint is never removed in part."""
    for path in paths:
        remove(partial_path(path))
        path.replace(partial_path(path))
        remove(partial_path(path))


@dataclass
class Progress:
    """The progress of stage two."""

    step: int = 0  # of the optimizer
    num_seen: int = 0  # cells that all processes together have seen
    seconds: float = 0.0  # stage one included
    losses: list[float] = field(default_factory=list)  # since the last line of the log, averaged over processes


def save_checkpoint(accelerator: Accelerator, ema: EMAModel, progress: Progress, folder: Path, limit: int | None):
    """Saves model, optimizer, averaged weights and progress, and removes the oldest checkpoints beyond the limit."""

    def write(path: Path):
        accelerator.save_state(str(path))
        # Objects that are registered with Accelerate would be pickled, and loaded with `weights_only=False`.
        save_file({str(i): value for i, value in enumerate(ema.shadow_params)}, path / "ema.safetensors")
        (path / "progress.json").write_text(json.dumps(asdict(progress)))

    with sync_errors(accelerator):
        # One process is enough: the state is the same in all, and random numbers follow from the step.
        if accelerator.is_main_process:
            write_whole(folder / f"checkpoint-{progress.step}", write)
            # Accelerate's own limit removes the only complete checkpoint before the new one exists.
            if limit is not None:
                _discard(find_checkpoints(folder)[:-limit])


def load_checkpoint(accelerator: Accelerator, ema: EMAModel, checkpoint: Path) -> Progress:
    """Loads what [`save_checkpoint`] saved, and returns the progress."""
    accelerator.load_state(str(checkpoint))
    averaged = load_file(checkpoint / "ema.safetensors")
    progress = Progress(**json.loads((checkpoint / "progress.json").read_text()))
    ema.shadow_params = [averaged[str(i)].to(accelerator.device) for i in range(len(ema.shadow_params))]
    ema.optimization_step = progress.step
    return progress
