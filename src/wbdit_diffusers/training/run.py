"""The folder of a run: whose it is, what was trained there on which cells, and whether a resumed run is the same."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from accelerate import Accelerator
from accelerate.logging import get_logger
from filelock import FileLock, Timeout
from scipy import sparse

from ..data.split import CellSplit
from ..hub.facts import TRAINING_NAME
from ..version import __version__
from .checkpoints import (
    find_checkpoints,
    latest_checkpoint,
    read_state,
    remove,
    remove_checkpoint,
    step_of,
    write_whole,
)
from .config import TrainingConfig, config_without_places
from .processes import together


logger = get_logger(__name__)

FORMAT_VERSION = 3
RECORD_NAME = "run.json"
STAGE_ONE_NAME = "stage_one"  # the finished codec, or what an unfinished one goes on from
LOCK_NAME = ".lock"
# What a training writes besides checkpoints, and all that --overwrite_output_dir removes.
FILES = ["README.md", "model_index.json", CellSplit.FILE_NAME, RECORD_NAME, TRAINING_NAME, "training_log.csv"]
FILES += [STAGE_ONE_NAME, "codec", "denoiser", "processor", "scheduler", "latents", "logs/wbdit_diffusers"]

# What a resumed run may have otherwise. The number of processes is no field.
MAY_CHANGE = {
    *("max_train_minutes", "report_to", "checkpointing_steps", "checkpoints_total_limit", "validation_steps"),
    *("push_to_hub", "hub_model_id", "data_name", "data_license", "data_source", "num_inference_steps", "scheduler"),
}


# ==================== What was trained, on which cells ====================


def describe_cells(adata: ad.AnnData, config: TrainingConfig, chunk_size: int = 4096) -> dict[str, Any]:
    """
    A fingerprint of the cells: their number, and hashes of names, labels, and each cell's and gene's total. It is the
    same however the matrix is stored.
    """
    totals, genes = [np.zeros(0)], np.zeros(adata.n_vars)
    for start in range(0, adata.n_obs, chunk_size):
        chunk = adata[start : start + chunk_size]
        matrix = sparse.csr_matrix(chunk.X if config.layer is None else chunk.layers[config.layer])
        totals.append(np.asarray(matrix.sum(axis=1, dtype=np.float64)).ravel())
        genes += np.asarray(matrix.sum(axis=0, dtype=np.float64)).ravel()
    return describe(adata.obs, adata.var_names, np.concatenate(totals), genes, config)


def describe(
    obs: pd.DataFrame, var_names: pd.Index, totals: np.ndarray, genes: np.ndarray, config: TrainingConfig
) -> dict[str, Any]:
    """The fingerprint, of the totals of each cell `(cells,)` and gene `(genes,)`."""
    return {
        "number of cells": len(obs),
        "number of genes": len(var_names),
        "names of the cells": _hash(obs.index),
        "names of the genes": _hash(var_names),
        # As float32: the last digits of a sum depend on how the matrix is stored.
        "values": _hash([totals.astype(np.float32).tobytes(), genes.astype(np.float32).tobytes()]),
        **{f"labels in {key!r}": _hash(obs[key]) for key in config.label_keys},
    }


def make_record(
    config: TrainingConfig,
    cells: dict[str, Any],
    split: CellSplit,
    var_names: list[str],
    categories: list[list[str]],
) -> dict:
    """What is written to run.json. It names no path. `categories` are the labels of each label key in their order."""
    return {
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "config": config_without_places(config),  # the cells and the split themselves are compared
        "cells": cells,
        "split": _hash([*sorted(split.train), "", *sorted(split.test)]),
        "genes": _hash(var_names),
        "labels": [_hash(names) for names in categories],
    }


def _hash(values: Any) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update((value if isinstance(value, bytes) else str(value).encode()) + b"\0")
    return digest.hexdigest()[:32]


def read_record(folder: Path) -> dict[str, Any]:
    """
    What a run has written about itself.

    Raises:
        ValueError: If the folder has none, or it is damaged or of another version of this file.
    """
    path = folder / RECORD_NAME
    if not path.is_file():
        raise ValueError(
            f"--resume_from_checkpoint: {folder} has no {RECORD_NAME}, which says what was trained there; give a"
            " checkpoint in the folder of its run."
        )
    try:
        record = json.loads(path.read_text())
        version = record["format_version"]
        if version == FORMAT_VERSION:
            assert {"config", "cells", "split", "genes", "labels"} <= record.keys()
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{path} is damaged: train again, with --overwrite_output_dir.") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} was written by wbdit_diffusers {record.get('package_version')} (format {version}), this is"
            f" {__version__} (format {FORMAT_VERSION}): go on with that version, or train again."
        )
    if record["package_version"] != __version__:
        logger.warning(f"The run was begun with wbdit_diffusers {record['package_version']}, this is {__version__}.")
    return record


def check_config(record: dict[str, Any], config: TrainingConfig):
    """Raises a `ValueError` that names the first flag that a resumed run may not have otherwise."""
    for name, new in json.loads(json.dumps(make_record(config, {}, CellSplit([], []), [], [])["config"])).items():
        old = record["config"].get(name)
        if name in MAY_CHANGE or old == new or (name == "max_train_steps" and old is not None and new > old):
            continue
        mend = "a resumed run can take more steps, not fewer" if name == "max_train_steps" else "leave it as it was"
        raise ValueError(
            f"--{name} {_shown(new)}: the run to go on with has {_shown(old)}; {mend}, or train in another folder."
        )


def check_cells(record: dict[str, Any], new_record: dict[str, Any]):
    """Raises a `ValueError` that says in what the cells are others than those of the run to go on with."""
    old, new = record["cells"], new_record["cells"]
    for name in new:
        if old.get(name) != new[name]:
            numbers = f": {old.get(name)} then, {new[name]} now" if name.startswith("number") else ""
            raise ValueError(
                f"--dataset: these are not the cells of the run to go on with; they differ in the {name}{numbers}."
                " Give the file that it was begun with, or train in another folder."
            )
    if record["split"] != new_record["split"]:
        raise ValueError("--split: it holds out other cells than the run to go on with; leave it as it was.")
    if record["genes"] != new_record["genes"]:
        raise ValueError("Other genes are chosen from these cells than in the run to go on with; train anew.")
    if record["labels"] != new_record["labels"]:
        raise ValueError(
            "--label_keys: the labels stand in another order than in the run to go on with, which numbered them by it;"
            " give the columns of obs the categories that they had, by `adata.obs[key].cat.set_categories`."
        )


def _shown(value: Any) -> str:
    return "none" if value is None or value == [] else " ".join(value) if isinstance(value, list) else str(value)


# ==================== The folder ====================


@dataclass
class Run:
    """
    One run in its folder, which no other process writes to.

    Args:
        folder (`Path`): The output folder.
        origin (`Path`, *optional*): The folder of the run to go on with; `None` for a new one.
        checkpoint (`Path`, *optional*): What to go on from; `None` if that run had not come to one.
        is_new_folder (`bool`): Whether nothing was there.
    """

    folder: Path
    origin: Path | None = None
    checkpoint: Path | None = None
    is_new_folder: bool = False

    @property
    def stage_one(self) -> Path:
        return self.folder / STAGE_ONE_NAME

    def seconds(self) -> float:
        """What the run to go on with has taken."""
        path = self.stage_one / "seconds.json"
        if self.checkpoint is not None:
            return float(read_state(self.checkpoint)["seconds"])
        return float(json.loads(path.read_text())) if self.origin is not None and path.is_file() else 0.0

    def start(self, record: dict[str, Any], split: CellSplit):
        """Writes what the run is. What an earlier one left, as far as it is not gone on with, is removed."""
        if self.origin != self.folder:
            for path in written_files(self.folder):
                remove(path)
            if self.origin is not None:
                shutil.copytree(self.origin / STAGE_ONE_NAME, self.stage_one)
        for path in self.folder.glob(".*.partial"):
            remove(path)
        step = -1 if self.checkpoint is None else int(read_state(self.checkpoint)["step"])
        if self.origin == self.folder:
            for checkpoint in find_checkpoints(self.folder):
                if step_of(checkpoint) > step:  # or the next `latest` would not be of this run
                    remove_checkpoint(checkpoint)
        # The record last: what has one was begun.
        write_whole(self.folder / CellSplit.FILE_NAME, lambda path: _write_split(split, path))
        write_whole(self.folder / RECORD_NAME, lambda path: path.write_text(json.dumps(record, indent=1)))


def _write_split(split: CellSplit, path: Path):
    path.write_text(json.dumps(asdict(split)))


def written_files(folder: Path) -> list[Path]:
    """What a training has written into a folder."""
    files = [folder / name for name in FILES if (folder / name).exists()]
    return files + find_checkpoints(folder) + sorted(folder.glob(".checkpoint-*.partial"))


@contextmanager
def open_run(config: TrainingConfig, accelerator: Accelerator) -> Iterator[Run]:
    """
    The run that a configuration asks for. While it is open no other process can open its folder; the lock dies with
    its process. If nothing was begun, nothing is left.

    Raises:
        ValueError: If the folder holds another run, is being written to, or the checkpoint is none of such a run.
        OSError: If the folder can't be written.
    """
    folder = config.output_dir
    lock = FileLock(folder / LOCK_NAME)
    run = Run(folder, is_new_folder=not folder.exists())
    try:
        with together(accelerator):
            if accelerator.is_main_process:
                _take(lock, folder)
        with together(accelerator):
            _find_origin(run, config)
        yield run
    finally:
        if lock.is_locked:
            (folder / LOCK_NAME).unlink(missing_ok=True)
            lock.release()
            if run.is_new_folder and not any(folder.iterdir()):
                folder.rmdir()


def _take(lock: FileLock, folder: Path):
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file: give a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"--output_dir {folder}: another training is writing there; wait until it ends, or give another folder."
        ) from error
    except OSError as error:
        raise OSError(f"--output_dir {folder} can't be written: {error.strerror or error}.") from error


def _find_origin(run: Run, config: TrainingConfig):
    """Which run is gone on with, if one is."""
    asked, written = config.resume_from_checkpoint, written_files(run.folder)
    names = [path.name for path in written if not path.name.startswith(".")]
    if asked is not None and asked != "latest":
        read_state(Path(asked))
    if asked is None or (asked != "latest" and Path(asked).resolve().parent != run.folder.resolve()):
        if names and not config.overwrite_output_dir:
            raise ValueError(
                f"--output_dir {run.folder} holds a run ({', '.join(names[:3])}): go on with it by"
                " --resume_from_checkpoint latest, give another folder, or remove it by --overwrite_output_dir."
            )
        if names and RECORD_NAME not in names:
            raise ValueError(
                f"--overwrite_output_dir: {run.folder} holds {', '.join(names[:3])}, but no {RECORD_NAME}: no training"
                " wrote them there. Give another folder."
            )
    elif asked != "latest" and config.overwrite_output_dir:
        raise ValueError("--overwrite_output_dir removes what --resume_from_checkpoint goes on from: leave one out.")
    if asked is None:
        return
    if asked != "latest":
        run.checkpoint = Path(asked)
        origin = run.checkpoint.resolve().parent
        run.origin = run.folder if origin == run.folder.resolve() else origin
        if not (run.origin / STAGE_ONE_NAME / "codec").is_dir():
            raise ValueError(f"--resume_from_checkpoint {asked}: {run.origin} has no {STAGE_ONE_NAME}/codec.")
    elif set(names) - {CellSplit.FILE_NAME}:  # without a record, a run has written its split at most
        run.origin, run.checkpoint = run.folder, latest_checkpoint(run.folder)
    if run.origin is not None:
        check_config(read_record(run.origin), config)
