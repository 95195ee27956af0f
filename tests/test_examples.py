"""The examples, run as a user runs them but shorter."""

import json
import subprocess
import sys

import anndata as ad
import numpy as np
import pytest
from conftest import ROOT

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.evaluation.table import NOT_FIT


@pytest.mark.slow
def test_own_training_loop(tmp_path):
    script = ROOT / "examples" / "own_training_loop.py"
    assert len(script.read_text().splitlines()) <= 40
    result = subprocess.run([sys.executable, script, "3"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "Epoch 2: loss" in result.stdout
    cells = ad.read_h5ad(tmp_path / "own_cells.h5ad")
    assert cells.shape == (100, 765) and set(cells.obs["cell_type"]) == {"CD19+ B"}
    assert 50 < cells.obs["library_size"].median() < 50_000


@pytest.mark.slow
def test_unseen_condition(tmp_path):
    command = [sys.executable, ROOT / "examples" / "unseen_condition.py", "--max_train_minutes", "0.05"]
    result = subprocess.run([*command, "--output_dir", tmp_path / "out"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "composed_from: cell_type=CD14+ Monocyte, phase=G" in result.stdout
    assert "No training cell has cell_type=CD14+ Monocyte, phase=S" in result.stderr
    for name in ("generated", "translated"):
        cells = ad.read_h5ad(tmp_path / "out" / f"{name}.h5ad")
        assert set(cells.obs["phase"]) == {"S"} and cells.obs["unseen_combination"].all()
        assert cells.uns["wbdit"]["unseen_combinations"]["error"] > 0
    assert set(cells.obs["input_phase"]) == {"G1"}


@pytest.mark.slow
def test_quickstart(tmp_path):
    command = [sys.executable, ROOT / "examples" / "quickstart.py", "--output_dir", tmp_path]
    command += ["--max_train_minutes", "0.05", "--num_cells", "150", "--num_samples", "1"]
    command += ["--no-inside"]  # tests/interpretation/test_explain.py looks inside
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]

    cells = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert cells.shape == (150, 765)
    assert (cells.X.data == np.rint(cells.X.data)).all()
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    report = json.loads((tmp_path / "wbdit-pbmc" / "report.json").read_text())
    columns = report["metrics"]
    assert {"generated", "real reference", "Gaussian mixture per label"} < set(columns)
    assert all(len(values) == 1 for column in columns.values() for values in column.values())
    # After three seconds of training the cells are bad, and the metrics say so.
    assert report["excess"]["generated"]["mean"] > 0.2
    assert columns["generated"]["auc_forest"][0] > 0.75 > columns["real reference"]["auc_forest"][0]
    assert (tmp_path / "metrics.md").read_text().startswith(f"**{NOT_FIT}**")
    card = (tmp_path / "wbdit-pbmc" / "README.md").read_text()
    assert f"{report['excess']['generated']['mean']:.3f}" in card and "Not measured" not in card
    ScRNAGenerationPipeline.from_pretrained(tmp_path / "wbdit-pbmc")
