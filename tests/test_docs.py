"""The documentation site is built without a warning, and the cells of its tutorial run."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT


CODE_CELL = re.compile(r"^```\{code-cell\} ipython3\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def run(*command, **environment) -> str:
    result = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    settings = ["-D", "nb_execution_mode=off"]  # the tutorial's cells are the next test's
    run("-m", "sphinx", "-W", "--keep-going", "-q", *settings, ROOT / "docs", tmp_path / "html")

    def page(name: str) -> str:
        return (tmp_path / "html" / f"{name}.html").read_text()

    assert "excess" in page("tutorial")
    # A link between two files of the repository is one between two pages.
    assert 'href="notebook/quality.html"' in page("quality")
    # Docstrings are read as such: arguments have types, references lead somewhere, and no mark is left over.
    pipelines = page("api/pipelines")
    assert "<strong>guidance_scale</strong>" in pipelines
    assert 'href="models.html#wbdit_diffusers.models.ProgramCodec"' in pipelines
    for name in ("pipelines", "data", "models", "training", "evaluation", "interpretation"):
        assert "[<code" not in page(f"api/{name}") and "Args:" not in page(f"api/{name}")


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path):
    text = (ROOT / "docs" / "tutorial.md").read_text()
    cells = CODE_CELL.findall(text)
    assert len(cells) == text.count("{code-cell}") > 10
    notebook = tmp_path / "tutorial.py"
    notebook.write_text("\n".join(cells))
    printed = run(
        *(notebook,),
        WBDIT_TUTORIAL_STEPS="10",
        WBDIT_TUTORIAL_CELLS="200",
        WBDIT_TUTORIAL_DIR=str(tmp_path / "wbdit-pbmc"),
        MPLBACKEND="Agg",
    )
    assert re.search(r"excess 0\.\d+ \(by \w+\) on \d+ cells", printed)
