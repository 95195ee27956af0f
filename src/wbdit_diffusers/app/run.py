"""A training that the page starts: `wbdit train` in a process of its own."""

import functools
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pandas as pd
import yaml

from ..data.split import CellSplit
from ..training.checkpoints import STAGE_ONE_NAME


@functools.cache
def workspace() -> tempfile.TemporaryDirectory:
    """The folder of all trainings, which is removed when the page ends."""
    return tempfile.TemporaryDirectory(prefix="wbdit-app-")


class TrainingRun:
    """
    Starts `wbdit train --config FILE`.

    Args:
        dataset (`str`): File of cells.
        label_key (`str`): Column of `obs` with the cell type, or `""`.
        minutes (`float`): Maximum number of minutes.
    """

    def __init__(self, dataset: str, label_key: str, minutes: float):
        self.parent = Path(tempfile.mkdtemp(dir=workspace().name))
        self.folder, self.messages, config = (
            self.parent / name for name in ("my-cells", "messages.txt", "train.yaml")
        )
        self.start_time = time.monotonic()
        fields = {
            "dataset": str(dataset),
            "label_keys": [label_key] if label_key else [],
            "max_train_minutes": minutes,
            "output_dir": str(self.folder),
            "validation_steps": 25,  # a point of the curve every few seconds
            "checkpointing_steps": 1_000_000,  # nobody resumes these runs
        }
        config.write_text(yaml.safe_dump(fields))
        command = [sys.executable, "-m", "wbdit_diffusers.cli", "train", "--config", str(config)]
        with self.messages.open("w") as messages:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=messages, stderr=subprocess.STDOUT
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start_time

    def log(self) -> pd.DataFrame:
        """The training log so far: `step`, `loss`, `validation_loss` and other columns."""
        path = self.folder / "training_log.csv"
        return pd.read_csv(path) if path.is_file() else pd.DataFrame()

    def stop(self):
        """Ends the process if it is running, and removes its files."""
        if self.process.poll() is None:
            self.process.kill()  # SIGTERM would save a checkpoint first
            self.process.wait()
            shutil.rmtree(self.parent, ignore_errors=True)

    def archive(self) -> Path:
        """
        The trained pipeline as a .zip file without the names of cells. Raises a `ValueError` with the last message of
        the training if it failed.
        """
        if self.process.returncode != 0:
            lines = self.messages.read_text().splitlines() or ["The training failed."]
            raise ValueError(lines[-1].removeprefix("wbdit train: "))
        path = self.folder.with_suffix(".zip")
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(self.folder.rglob("*")):
                name = file.relative_to(self.parent)
                if name.parts[1] not in (CellSplit.FILE_NAME, STAGE_ONE_NAME):
                    archive.write(file, name)
        return path
