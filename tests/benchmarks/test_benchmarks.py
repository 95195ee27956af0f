"""Scripts that no test runs still import what the package has."""

import importlib
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", sorted(path.stem for path in (Path(__file__).parents[2] / "benchmarks").glob("*.py")))
def test_every_script_can_be_imported(name):
    importlib.import_module(name)
