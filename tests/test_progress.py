"""Bars become lines where the output is no terminal."""

import sys

import pytest
from tqdm.auto import tqdm

from wbdit_diffusers import progress


@pytest.mark.parametrize("seconds, lines", [(0, 6), (30, 0)])
def test_a_pipe_gets_plain_lines(seconds, lines, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", seconds)
    for _ in tqdm(range(4), **progress.bar_options(desc="Working", mininterval=0)):
        pass
    text = capsys.readouterr().err
    assert "\r" not in text and text.count("\n") == lines
    assert all(line.startswith("Working: ") for line in text.splitlines())


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert progress.bar_options(desc="Working") == {"desc": "Working"}


@pytest.mark.parametrize("seconds, text", [(41.4, "41 s"), (300, "5 min")])
def test_durations(seconds, text):
    assert progress.duration(seconds) == text
