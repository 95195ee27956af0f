"""Scripts that no test runs still import what the package has."""

import importlib
import re

import pytest
from conftest import ROOT


BY_HAND = {"explain_kang_cpu.json", "speed_narrow_cpu.json"}  # of `wbdit explain`, and with another checkout


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py")))
def test_every_script_can_be_imported(name):
    importlib.import_module(name)


def test_every_file_that_a_page_quotes_has_its_command():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    quoted = {name for page in pages for name in re.findall(r"\w+_cpu\.json", page.read_text())}
    assert len(quoted) > 15
    assert quoted - set(importlib.import_module("make_numbers").NUMBERS) == BY_HAND
    assert all((ROOT / "lab" / "results" / name).is_file() for name in quoted)
