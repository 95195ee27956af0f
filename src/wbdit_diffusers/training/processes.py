"""Signals, errors and threads of the processes of a training."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import ModelMixin

from ..files import one_line, write_whole


Model = TypeVar("Model", bound=ModelMixin)


class TrainingInterrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C ended the training. During stage two a checkpoint is saved first."""

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal_number = signal_number


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a [`TrainingInterrupted`], or notes them until the current step has ended."""

    number, is_deferred = 0, False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handles the signals. Python allows that in the main thread only."""
        self.number, self.is_deferred = 0, False
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        previous = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, signals are noted in `number` and nothing is raised."""
        self.is_deferred = True
        yield
        self.is_deferred = False

    def _handle(self, number: int, frame):
        self.number = number
        if not self.is_deferred:
            raise TrainingInterrupted(number)


stop_signal = StopSignal()


@contextmanager
def sync_errors(accelerator: Accelerator) -> Iterator[None]:
    """Ends all processes with an error if one fails. Inside the block, processes must not wait for each other."""
    error = None
    try:
        yield
    except (ValueError, OSError) as raised:
        error = raised
    messages = [message for message in gather_object([error and one_line(error)]) if message]
    if messages:
        raise error or ValueError(messages[0])


def fit_once(accelerator: Accelerator, path: Path, model_class: type[Model], fit: Callable[[], Model]) -> Model:
    """Fits a model in the main process, which saves it for the others and for resumed runs."""
    with sync_errors(accelerator):
        if accelerator.is_main_process and not path.is_dir():
            write_whole(path, fit().save_pretrained)
    return model_class.from_pretrained(path)
