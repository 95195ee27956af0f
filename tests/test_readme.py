"""The Python blocks of the README, run in their order on a tiny pipeline."""

import re

import anndata as ad
import numpy as np
import pytest
from conftest import ROOT, make_pipeline

from wbdit_diffusers import ScRNAGenerationPipeline


BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# The same calls, with fewer cells and steps.
SMALLER = {"num_cells=5000": "num_cells=50", "num_cells=500": "num_cells=20", "1_000_000": "60"}


@pytest.fixture
def readme_pipeline(pbmc, tmp_path) -> str:
    """A folder with a tiny pipeline that knows the labels which the README asks for."""
    cells = pbmc.copy()
    types = cells.obs["cell_type"].astype(str)
    types[:20] = "B"
    cells.obs["cell_type"] = types.astype("category")
    cells.obs["condition"] = np.resize(["STIM", "CTRL"], cells.n_obs)
    pipe = make_pipeline(cells, codec="program", label_keys=["cell_type", "condition"])
    pipe.save_pretrained(tmp_path / "pipeline")
    return str(tmp_path / "pipeline")


def test_the_first_block_needs_nothing_but_the_package(monkeypatch, tmp_path):
    """No training, no network, three lines."""
    code = BLOCK.findall((ROOT / "README.md").read_text())[0]
    assert len([line for line in code.splitlines() if line.strip()]) == 3
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict = {}
    exec(compile(code.replace("num_cells=5000", "num_cells=50"), "README.md", "exec"), names)
    assert names["cells"].shape == (50, 765)


def test_python_blocks_run(readme_pipeline, tmp_path, monkeypatch):
    code = "\n".join(BLOCK.findall((ROOT / "README.md").read_text()))
    assert "ScRNAGenerationPipeline.from_pretrained(" in code
    for number, smaller in SMALLER.items():
        assert number in code, f"README has no {number} any more: fix this test"
        code = code.replace(number, smaller)
    load = ScRNAGenerationPipeline.from_pretrained
    monkeypatch.setattr(ScRNAGenerationPipeline, "from_pretrained", lambda model: load(readme_pipeline))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert ad.read_h5ad("cells.h5ad").n_obs == 60  # the last block that writes it


def test_links_lead_to_files():
    """Links of the README and of pages that are read on their own."""
    for name in ("README.md", "training/README.md", "docs/quality.md", "docs/white_box.md", "docs/speed.md"):
        folder = (ROOT / name).parent
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text()):
            assert (folder / target).exists(), f"{name} links to {target}"
