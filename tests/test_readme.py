"""The README: its Python blocks run in order on a tiny pipeline, and its links and numbers are right."""

import json
import re
import tomllib

import anndata as ad
import numpy as np
import pytest
from conftest import ROOT, make_pipeline

from wbdit_diffusers import ScRNAGenerationPipeline


README = (ROOT / "README.md").read_text()
JUDGES = ("forest", "boosting", "regression")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# The same calls with fewer cells
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
    code = BLOCK.findall(README)[0]
    assert len([line for line in code.splitlines() if line.strip()]) == 3
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict = {}
    exec(compile(code.replace("num_cells=5000", "num_cells=50"), "README.md", "exec"), names)
    assert names["cells"].shape == (50, 765)


def test_python_blocks_run(readme_pipeline, tmp_path, monkeypatch):
    code = "\n".join(BLOCK.findall(README))
    assert "ScRNAGenerationPipeline.from_pretrained(" in code
    for number, smaller in SMALLER.items():
        assert number in code, f"README has no {number} any more: fix this test"
        code = code.replace(number, smaller)
    load = ScRNAGenerationPipeline.from_pretrained
    monkeypatch.setattr(ScRNAGenerationPipeline, "from_pretrained", lambda model: load(readme_pipeline))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert ad.read_h5ad("generated.h5ad").n_obs == 60


def test_links_are_absolute_and_lead_to_files():
    """The package page shows the README outside the repository. Its links and images have the repository's address."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    files = f"{urls['Repository']}/blob/main/"
    images = files.replace("//github.com/", "//raw.githubusercontent.com/").replace("/blob/", "/")
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", README)
    assert len(links) > 15
    for mark, address in [*links, *(("", urls[name]) for name in ("Documentation", "Changelog"))]:
        assert address.startswith("https://"), f"{address} is not absolute"
        base = images if mark else files
        if address.startswith(base):
            path, _, anchor = address.removeprefix(base).partition("#")
            assert (ROOT / path).is_file(), f"README.md links to {address}"
            headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE) if anchor else []
            assert not anchor or anchor in [
                re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in headings
            ]
        else:
            assert "github" not in address, f"{address} is not in {urls['Repository']}"


def test_links_of_other_pages_lead_to_files():
    for path in [*(ROOT / "docs").glob("*.md"), ROOT / "training" / "README.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            pages = {
                "project/training.md",
                "project/contributing.md",
                "project/model_card.md",
            }  # built from other files
            assert target in pages or (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_table_has_the_numbers_of_the_results():
    """Each cell is the highest AUC of three classifiers, as a mean over samples, and bold is the best of a row."""
    files = {"": "quality_all_genes_cpu.json", ", 2,000 genes, one sample": "scvi_pbmc3k_cpu.json"}
    names = {"pollen_smartseq, no labels": "pollen_smartseq", "brain_e18, no labels": "brain_e18_10k_unlabelled"}
    columns = ["real reference", "generated", "Gaussian mixture per label", "scvi-by-type"]
    rows = re.findall(r"^\| ([^|]+) \(([\d,]+)\)([^|]*) \| (.*) \|$", README, re.MULTILINE)
    assert len(rows) == 6
    for name, num_cells, which, numbers in rows:
        file = "quality_narrow_cpu.json" if name.startswith("brain") else files[which]
        report = json.loads((ROOT / "lab" / "results" / file).read_text())[names.get(name, name)]["report"]
        assert report["num_test"] == int(num_cells.replace(",", ""))
        expected = []
        for column in columns:
            values = report["metrics"].get(column)
            judges = [] if values is None else [np.mean(values[f"auc_{name}"]) for name in JUDGES]
            expected.append(f"{max(judges):.3f}" if judges else "–")
        best = min(expected[1:])  # "–" sorts after numbers
        assert numbers.split(" | ") == [expected[0], *(f"**{x}**" if x == best else x for x in expected[1:])]


def test_it_is_short():
    assert len(README.splitlines()) <= 120
