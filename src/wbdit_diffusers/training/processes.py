"""How a training ends from outside, and how its processes end together."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


SAME_PRESS_SECONDS = 2.0  # a launcher hands Ctrl-C on, so that one press comes twice
ORPHAN_GRACE_SECONDS = 120.0  # in which a process whose launcher died saves
CGROUP_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


# ==================== SIGTERM and Ctrl-C ====================


class TrainingInterrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C ended the training. What can be gone on from was saved before this is raised."""

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal_number = signal_number

    @property
    def signal_name(self) -> str:
        return signal.Signals(self.signal_number).name


class Interruption:
    """
    Whether this process was asked to end. Where there is something to save the signal is noted, and the loop asks for
    it after each step; elsewhere, as while cells are read, it ends the training at once.
    """

    def __init__(self):
        self.signal_number: int | None = None
        self._is_deferred, self._since = False, 0.0

    @contextmanager
    def handled(self) -> Iterator[None]:
        """From here on signals are ours; afterwards they are whose they were. Only a main thread can have them."""
        self.signal_number = None
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals wait for `raise_if_asked`."""
        before, self._is_deferred = self._is_deferred, True
        try:
            yield
        finally:
            self._is_deferred = before

    def raise_if_asked(self):
        """Raises [`TrainingInterrupted`] if a signal came."""
        if self.signal_number is not None:
            raise TrainingInterrupted(self.signal_number)

    def _handle(self, number: int, frame):
        if self.signal_number is None:
            self.signal_number, self._since = number, time.monotonic()
            if not self._is_deferred:
                raise TrainingInterrupted(number)
        elif number == signal.SIGINT and time.monotonic() - self._since > SAME_PRESS_SECONDS:
            raise TrainingInterrupted(number)  # pressed again: without saving


interruption = Interruption()  # signals are the process's, of which there is one


def end_with_launcher():
    """
    Ends a process whose `accelerate launch` or `torchrun` has died: it would train on, and nobody would know. A
    training that was started without one goes on when its shell has ended, as with `nohup`.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()

    def watch():
        while os.getppid() == launcher:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        # One that waits for a process that is gone never comes to its next step.
        time.sleep(ORPHAN_GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


# ==================== Several processes ====================


def is_first_process() -> bool:
    """Whether this process speaks for all, also before they know of each other."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """
    Work that may fail in one process alone: each waits for all at its end, and all end with the same error. Inside,
    processes must not wait for each other.
    """
    error: BaseException | None = None
    try:
        yield
    except (ValueError, OSError, TrainingInterrupted) as raised:
        error = raised
    if accelerator.num_processes > 1:
        kinds = {"ValueError": ValueError, "OSError": OSError, "TrainingInterrupted": TrainingInterrupted}
        own = None
        if error is not None:
            kind = next(name for name, error_class in kinds.items() if isinstance(error, error_class))
            own = kind, error.signal_number if isinstance(error, TrainingInterrupted) else str(error)
        failed = [one for one in gather_object([own]) if one is not None]
        if failed and error is None:
            error = kinds[failed[0][0]](failed[0][1])
    if error is not None:
        raise error


# ==================== Threads ====================


def limit_threads():
    """
    As many threads as the process has CPUs, by its affinity and its container's limit; OMP_NUM_THREADS is kept.
    Left alone, Accelerate would take the machine's cores for processes on CPUs.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = max(1, available_cpus() // num_processes)
    if num_processes > 1:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # or Accelerate sets another number
    if threads < torch.get_num_threads():
        torch.set_num_threads(threads)


def available_cpus() -> int:
    """CPUs that this process may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP_CPU_LIMIT.read_text().split()
        cpus = min(cpus, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no control group, or one without a limit ("max")
        pass
    return max(1, cpus)
