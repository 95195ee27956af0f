"""The pipeline that comes with the package, as someone meets it who has trained nothing."""

import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT

from wbdit_diffusers import ProgramCodec, ScRNAGenerationPipeline
from wbdit_diffusers.data import CellSplit
from wbdit_diffusers.pretrained import FOLDER, PBMC, locate


@pytest.fixture(scope="module")
def pipe() -> ScRNAGenerationPipeline:
    pipe = ScRNAGenerationPipeline.from_pretrained("pbmc68k_reduced")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_cells_without_training(pipe, pbmc):
    cells = pipe(num_cells=200, generator=torch.Generator().manual_seed(0)).cells
    assert cells.shape == (200, pbmc.n_vars) and set(cells.var_names) == set(pbmc.var_names)
    assert (cells.X.data == np.rint(cells.X.data)).all()
    assert cells.obs["cell_type"].cat.categories.equals(pbmc.obs["cell_type"].cat.categories)
    assert cells.uns["wbdit"]["model_id"] == PBMC
    # Types are those that are asked for: B cells have their marker, and others have not.
    b, t = (pipe(num_cells=50, cell_types=name).cells for name in ("CD19+ B", "CD8+ Cytotoxic T"))
    assert b[:, "CD79A"].X.mean() > 5 * t[:, "CD79A"].X.mean()


def test_it_knows_which_cells_were_held_out(pbmc):
    train, test = CellSplit.load(PBMC).apply(pbmc)
    assert train.n_obs + test.n_obs == pbmc.n_obs and test.n_obs == 142


def test_its_card_says_what_its_report_says():
    report = json.loads((FOLDER / PBMC / "report.json").read_text())
    card = (FOLDER / PBMC / "README.md").read_text()
    assert f"{report['excess']['generated']['mean']:.3f} ± {report['excess']['generated']['sd']:.3f}" in card
    assert "CC BY 4.0" in card and "10.1038/ncomms14049" in card and f'from_pretrained("{PBMC}")' in card
    assert report["excess"]["generated"]["mean"] < 0.2


def test_it_is_small_and_holds_no_pickle():
    files = [path for path in (FOLDER / PBMC).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4 * 2**20
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md", ".png"}


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate(PBMC) == str(FOLDER / PBMC) and locate("me/cells") == "me/cells"
    (tmp_path / PBMC).mkdir()
    assert locate(PBMC) == PBMC


@pytest.mark.slow
def test_it_needs_no_writable_home(tmp_path):
    (tmp_path / "file").touch()
    home = str(tmp_path / "file")  # root may write to every folder
    code = f"from wbdit_diffusers import ScRNAGenerationPipeline as P; P.from_pretrained({PBMC!r})(num_cells=2)"
    environment = {**os.environ, "HOME": home, "XDG_CACHE_HOME": f"{home}/cache"}
    environment.pop("HF_HOME", None)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_it_is_in_the_wheel(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    if "No matching distribution found for hatchling" in built.stderr:
        pytest.skip("what builds the wheel can't be fetched")
    assert built.returncode == 0, built.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    files = [path.relative_to(FOLDER).as_posix() for path in (FOLDER / PBMC).rglob("*") if path.is_file()]
    assert {f"wbdit_diffusers/pretrained/{name}" for name in files} <= set(names) and len(files) > 10
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


@pytest.mark.parametrize("name", ["wbdit-pbmx", "./wbdit-pbmx", "models/wbdit-pbmx", "/no/such/model", "a/b/c"])
@pytest.mark.parametrize("loader", [ScRNAGenerationPipeline, ProgramCodec, CellSplit])
def test_a_mistyped_folder_fails_at_once(name, loader, tmp_path, monkeypatch):
    """The Hub is not asked, and similar folders are named."""
    monkeypatch.chdir(tmp_path)
    for folder in ("wbdit-pbmc", "models/wbdit-pbmc"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.utils._http.get_session", lambda: 1 / 0)
    hint = r"Did you mean (models/)?wbdit-pbmc\?" if "pbmx" in name else "A Hub id has the form user/name"
    with pytest.raises(FileNotFoundError, match=f"There is no folder or file {name}. {hint}"):
        (loader.load if loader is CellSplit else loader.from_pretrained)(name)


def test_a_hub_that_cannot_be_reached_is_not_asked_again_and_again(monkeypatch, caplog):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="no folder me/absent, .* cannot be loaded as a pipeline: .*onnection refused"):
        ScRNAGenerationPipeline.from_pretrained("me/absent")
    assert "Retrying" not in caplog.text
