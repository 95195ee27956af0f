"""What a fit of stage one goes on from after an interruption, with the same result as without one."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger

from .checkpoints import write_whole
from .processes import interruption


logger = get_logger(__name__)

SECONDS_BETWEEN_SAVES = 30.0


class FitProgress:
    """
    Weights, optimizer, random states and numbers of one fit, in one file.

    Args:
        path (`Path`, *optional*): The file; without one nothing is saved, and an interruption ends the fit.
        module (`torch.nn.Module`): What is fitted.
        optimizer (`torch.optim.Optimizer`): Its optimizer.
        generator (`torch.Generator`): Draws the cells.
        start_time (`float`): Time of `time.monotonic()` at which the training began.
    """

    def __init__(
        self,
        path: Path | None,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        start_time: float,
    ):
        self.path, self.module, self.optimizer, self.generator = path, module, optimizer, generator
        self.start_time, self._last_save = start_time, time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """Restores what was saved, and returns its numbers; `None` if nothing was, or the file is damaged."""
        if self.path is None or not self.path.is_file():
            return None
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # of torch and pickle
            logger.warning(f"{self.path} is damaged ({type(error).__name__}): this fit begins anew, from its seed.")
            return None
        self.module.load_state_dict(saved["module"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.generator.set_state(saved["generator"])
        torch.set_rng_state(saved["random_state"])
        if "cuda_random_state" in saved and torch.cuda.is_available():
            torch.cuda.set_rng_state(saved["cuda_random_state"])
        return saved["numbers"]

    def step(self, numbers: dict[str, Any], must_save: bool = False):
        """After each step: saves now and then, and when the process is to end, which it then does."""
        asked = interruption.signal_number is not None
        if asked or must_save or time.monotonic() - self._last_save > SECONDS_BETWEEN_SAVES:
            self.save(numbers)
        if asked:
            interruption.raise_if_asked()

    def save(self, numbers: dict[str, Any]):
        """Writes the file, with numbers that the fit needs besides."""
        if self.path is None:
            return
        saved = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "random_state": torch.get_rng_state(),
            "numbers": numbers,
        }
        if torch.cuda.is_available():
            saved["cuda_random_state"] = torch.cuda.get_rng_state()
        write_whole(self.path, lambda path: torch.save(saved, path))
        save_seconds(self.path.parent, time.monotonic() - self.start_time)
        self._last_save = time.monotonic()


def save_seconds(folder: Path, seconds: float):
    """Notes what stage one has taken, for the clock of a resumed run."""
    write_whole(folder / "seconds.json", lambda path: path.write_text(json.dumps(seconds)))
