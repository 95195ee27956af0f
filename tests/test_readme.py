"""The README: its Python blocks run in order on a tiny pipeline, and its links and numbers are right."""

import json
import re
import tomllib

import anndata as ad
import numpy as np
import pytest
import race
from conftest import ROOT, make_pipeline

from wbdit_diffusers import ScRNAGenerationPipeline


README = (ROOT / "README.md").read_text()
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


def test_the_table_has_the_numbers_of_the_race():
    """Each cell is the highest AUC of three classifiers, as a mean over trainings, and bold is the best of a row."""
    columns = ["real reference", "wbdit_diffusers", "Gaussian mixture, same codec", "scVI"]  # at its best
    columns += ["scDesigner, copula by label", "Gaussian copula by label"]
    trainings = json.loads((ROOT / "lab" / "results" / "race_cpu.json").read_text())
    rows = re.findall(r"^\| (\w+) \(([\d,]+)\) \| (.*) \|$", README, re.MULTILINE)
    assert {name for name, _, _ in rows} == {training["dataset"] for training in trainings}
    for name, num_cells, numbers in rows:
        own = [training for training in trainings if training["dataset"] == name]
        assert own[0]["report"]["num_test"] == int(num_cells.replace(",", ""))
        ways = {column: [name for name in own[0]["costs"] if name.startswith("scVI")] for column in columns[3:4]}
        means = [min(race.mean_of(own, name, race.auc) for name in ways.get(one, [one])) for one in columns]
        expected = ["–" if np.isnan(mean) else f"{mean:.3f}" for mean in means]
        best = min(expected[1:])  # "–" sorts after numbers
        assert numbers.split(" | ") == [expected[0], *(f"**{x}**" if x == best else x for x in expected[1:])]


def test_it_is_short():
    assert len(README.splitlines()) <= 120
