"""Signals, errors and threads of the processes of a training."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..files import one_line


class TrainingInterrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C ended the training. During stage two a checkpoint is saved first."""

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal_number = signal_number


class StopSignal:
    """SIGTERM and Ctrl-C raise [`TrainingInterrupted`], or are noted until the current step has ended."""

    def __init__(self):
        self.number, self.is_deferred = 0, False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handles the signals. Python allows that in the main thread only."""
        self.number, self.is_deferred = 0, False
        in_main_thread = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
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
        try:
            yield
        finally:
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
    messages = gather_object([None if error is None else one_line(error)])
    if error is not None:
        raise error
    if any(messages):
        raise ValueError(next(message for message in messages if message))


def limit_threads():
    """Divides the CPUs that this process may use among the processes of the machine. OMP_NUM_THREADS is kept."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = max(1, cpus // num_processes)
    if num_processes > 1:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # otherwise Accelerate sets it from all CPUs of the machine
    if threads < torch.get_num_threads():
        torch.set_num_threads(threads)
