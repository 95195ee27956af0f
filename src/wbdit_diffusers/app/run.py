"""A training that the page started: a process of its own, bounded in time, whose losses are read as they come."""

import csv
import functools
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd


MAX_CELLS = 5000
MAX_MINUTES = 10
GRACE_SECONDS = 120  # to import, to read the cells and to write the pipeline


@functools.cache
def workspace() -> tempfile.TemporaryDirectory:
    """Where the page keeps its files; removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="wbdit-app-")


class TrainingRun:
    """
    Starts `python -m wbdit_diffusers.training`.

    Args:
        dataset (`Path`): The cells.
        label_key (`str`, *optional*): Column of `obs` with the cell type.
        minutes (`float`): How long it may train.
    """

    def __init__(self, dataset: Path, label_key: str | None, minutes: float):
        self.parent = Path(tempfile.mkdtemp(dir=workspace().name))
        self.folder = self.parent / "my-cells"
        self.minutes, self.start_time = minutes, time.monotonic()
        self.is_stopped = False
        command = [sys.executable, "-m", "wbdit_diffusers.training", "--dataset", str(dataset)]
        command += ["--output_dir", str(self.folder), "--max_train_minutes", f"{minutes:g}"]
        # A line of the log, and so a point of the curve, every few seconds; and nothing that nobody resumes from.
        command += ["--validation_steps", "25", "--checkpointing_steps", "1000000"]
        if label_key is not None:
            command += ["--label_keys", label_key]
        with (self.parent / "messages.txt").open("w") as messages:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=messages, stderr=subprocess.STDOUT
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start_time

    def is_running(self) -> bool:
        """Also ends it where it takes much longer than it may."""
        if self.seconds > self.minutes * 60 + GRACE_SECONDS:
            self.stop()
        return self.process.poll() is None

    def losses(self) -> pd.DataFrame:
        """`step`, `loss` and `cells` ("training" or "held out") in long form, of what the log holds by now."""
        path = self.folder / "training_log.csv"
        rows = list(csv.DictReader(path.open())) if path.is_file() else []
        columns = {"loss": "training", "validation_loss": "held out"}
        points = [
            {"step": int(row["step"]), "loss": float(row[column]), "cells": name}
            for row in rows
            for column, name in columns.items()
            if row.get(column)  # the last line may be half written
        ]
        return pd.DataFrame(points, columns=["step", "loss", "cells"])

    def stop(self):
        """Ends the process, if it is running, and removes what it wrote."""
        if self.process.poll() is None:
            self.is_stopped = True
            self.process.kill()  # the gentler signals would first write a checkpoint that nobody wants
            self.process.wait()
            shutil.rmtree(self.parent, ignore_errors=True)

    def check(self):
        """Raises a `ValueError` with the training's own last words if it did not end well."""
        if self.process.returncode != 0:
            lines = re.split(r"[\r\n]+", (self.parent / "messages.txt").read_text().strip())
            raise ValueError(re.sub(r"^[\w ]*train\w*: ", "", lines[-1]) or "The training failed.")

    def archive(self) -> Path:
        """The pipeline as a .zip file, to take home."""
        return Path(shutil.make_archive(str(self.folder), "zip", self.parent, self.folder.name))
