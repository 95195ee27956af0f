"""Progress: a bar at a terminal or in a notebook, plain lines in a log file."""

import sys
import time
from typing import Any

from tqdm import autonotebook, std


SECONDS_BETWEEN_LINES = 30


def bar_options(**options: Any) -> dict[str, Any]:
    """Arguments of `tqdm` for a bar. Without a terminal or notebook it becomes one line every 30 seconds."""
    is_bar = sys.stderr.isatty() or autonotebook.tqdm is not std.tqdm
    return options if is_bar else {"file": _Lines(), **options}


def duration(seconds: float) -> str:
    """A duration for people, such as 41 s or 4 min."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


class _Lines:
    """A file that turns the updates of a bar into a few lines."""

    def __init__(self):
        self.due = time.monotonic() + SECONDS_BETWEEN_LINES

    def write(self, text: str):
        if text.strip() and time.monotonic() >= self.due:
            self.due = time.monotonic() + SECONDS_BETWEEN_LINES
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self):
        """Does nothing: lines are flushed when they are written."""
