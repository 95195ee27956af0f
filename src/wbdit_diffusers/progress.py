"""Progress: a bar at a terminal or in a notebook, plain lines in a log file."""

import sys
from typing import Any

from tqdm import autonotebook, std


SECONDS_BETWEEN_LINES = 30


def bar_options(**options: Any) -> dict[str, Any]:
    """Arguments of `tqdm` for a bar. Without a terminal or notebook it becomes one line every 30 seconds."""
    is_bar = sys.stderr.isatty() or autonotebook.tqdm is not std.tqdm
    lines = {"file": _Lines(), "mininterval": SECONDS_BETWEEN_LINES, "delay": SECONDS_BETWEEN_LINES}
    return options if is_bar else options | lines


def duration(seconds: float) -> str:
    """A duration for people, such as 41 s or 4 min."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


class _Lines:
    """A file in which each update of a bar is a line."""

    def write(self, text: str):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self):
        """Does nothing: lines are flushed when they are written."""
