"""The documentation site is built without a warning, the code of its pages runs, and its messages exist."""

import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from wbdit_diffusers.cli import COMMANDS


CODE_CELL = re.compile(r"^```\{code-cell\} ipython3\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def run(*command, **settings) -> str:
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(command, capture_output=True, text=True, **settings)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    settings = ["-D", "nb_execution_mode=off"]  # the next test runs the tutorial
    run("-m", "sphinx", "-W", "--keep-going", "-q", *settings, ROOT / "docs", tmp_path / "html")

    def page(name: str) -> str:
        return (tmp_path / "html" / f"{name}.html").read_text()

    assert "excess" in page("tutorial")
    # A link between two files of the repository is a link between two pages.
    assert 'href="notebook/quality.html"' in page("quality")
    # Docstrings are converted: arguments have types, references have targets, and no Markdown is left over.
    pipelines = page("api/pipelines")
    assert "<strong>guidance_scale</strong>" in pipelines
    assert 'href="models.html#wbdit_diffusers.models.ProgramCodec"' in pipelines
    assert "viewcode-link" in pipelines
    for name in ("pipelines", "data", "models", "training", "evaluation", "interpretation"):
        assert "[<code" not in page(f"api/{name}") and "Args:" not in page(f"api/{name}")
    # The page of the commands has each command and its flags.
    commands = re.sub(r"<[^>]+>", "", page("command_line"))
    for name, (_, config) in COMMANDS.items():
        assert f"wbdit {name}" in commands
        assert all(field in commands for field in config.__pydantic_fields__)


@pytest.mark.slow
def test_the_tutorial_runs_twice_in_one_folder(tmp_path):
    text = (ROOT / "docs" / "tutorial.md").read_text()
    cells = CODE_CELL.findall(text)
    assert len(cells) == text.count("{code-cell}") > 10
    code = "\n".join(cells)
    for number, smaller in {"num_steps = 300": "num_steps = 10", "num_cells = 1000": "num_cells = 200"}.items():
        assert number in code, f"the tutorial has no {number} any more: fix this test"
        code = code.replace(number, smaller)
    (tmp_path / "tutorial.py").write_text(code)
    settings = {"cwd": tmp_path, "env": {**os.environ, "MPLBACKEND": "Agg"}}
    printed = run("tutorial.py", **settings)
    assert re.search(r"excess -?0\.\d+ \(by \w+\) on \d+ cells", printed)
    code = code.split("pipe = ScRNAGenerationPipeline")[0]  # the second run trains only
    (tmp_path / "tutorial.py").write_text(code)
    run("tutorial.py", **settings)
    assert len(list(tmp_path.glob("wbdit-tutorial-*/model_index.json"))) == 2


def test_the_code_for_developers_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall((ROOT / "docs" / "developers.md").read_text())
    names: dict = {}
    exec("\n".join(code for kind, code in blocks if kind == "python"), names)
    assert names["cells"].n_obs == 64 and names["reconstructed"].n_obs == 100


def test_messages_of_the_errors_page_exist():
    """Compares the parts of each message that have no placeholder with the strings of the source code."""
    strings = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    source = "\n".join(strings)
    messages = [
        text.strip() for kind, text in BLOCK.findall((ROOT / "docs" / "errors.md").read_text()) if kind == "text"
    ]
    assert len(messages) > 15
    for message in messages:
        parts = [part.strip(" .`") for part in re.split(r"…|: |, |\. ", message)]
        parts = [part for part in parts if len(part) > 12]
        assert parts, message
        for part in parts:
            assert part in source, f"{part!r} of {message!r} is no message any more: fix docs/errors.md"
