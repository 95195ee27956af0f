"""A training that the page starts: `wbdit train` in a process of its own."""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import yaml

from ..hub.publish import publish
from ..pipelines.pipeline_scrna_generation import ScRNAGenerationPipeline


WORKSPACE = tempfile.TemporaryDirectory(prefix="wbdit-app-")  # is removed when the page ends


class TrainingRun:
    """Starts `wbdit train` on a file, with columns of labels and a maximum number of minutes."""

    def __init__(self, dataset: str, label_keys: list[str], minutes: float):
        self.folder, self.start_time = Path(tempfile.mkdtemp(dir=WORKSPACE.name), "my-cells"), time.monotonic()
        self.messages, config = self.folder.with_suffix(".txt"), self.folder.with_suffix(".yaml")
        fields = {
            "dataset": dataset,
            "label_keys": label_keys,
            "max_train_minutes": minutes,
            "output_dir": str(self.folder),
            "validation_steps": 25,  # a point of the curve every few seconds
            "checkpointing_steps": 1_000_000,  # nobody resumes these runs
        }
        config.write_text(yaml.safe_dump(fields))
        command = [sys.executable, "-m", "wbdit_diffusers.cli", "train", "--config", str(config)]
        with self.messages.open("w") as file:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start_time

    def log(self) -> pd.DataFrame:
        """The training log so far."""
        path = self.folder / "training_log.csv"
        return pd.read_csv(path) if path.is_file() else pd.DataFrame()

    def stop(self):
        """Ends the process if it is running."""
        self.process.kill()  # SIGTERM would save a checkpoint first
        self.process.wait()

    def archive(self) -> Path:
        """The files that `wbdit push` would upload, as a .zip file. Raises a `ValueError` if the training failed."""
        if self.process.returncode != 0:
            *_, message = ["The training failed.", *self.messages.read_text().splitlines()]
            raise ValueError(message.removeprefix("wbdit train: "))
        public, name = self.folder.parent / "public", self.folder.name
        publish(ScRNAGenerationPipeline.from_pretrained(self.folder), self.folder, name, dry_run=public / name)
        return Path(shutil.make_archive(str(self.folder), "zip", public))
