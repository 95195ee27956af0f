"""The `wbdit` command: flags, help, results and exit codes. What each command does is tested next to its function."""

import json
import logging
import signal
import subprocess
import sys
from typing import Literal

import anndata as ad
import pytest
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from wbdit_diffusers import __version__, cli
from wbdit_diffusers.flags import FlagParser, add_flags, make_config, pydantic_config
from wbdit_diffusers.training import TrainingInterrupted


@dataclass(config=pydantic_config, kw_only=True)
class Part:
    """A part."""

    step: float = 0.5
    """Size of a step."""


@dataclass(config=pydantic_config, kw_only=True)
class Example(Part):
    files: list[str]
    """Files to read."""
    output: str
    """File to write."""
    num_cells: PositiveInt | None = None
    """Number of cells, 100% of them by default."""
    kind: Literal["a", "b"] = "a"
    """Kind of cells."""
    is_quick: bool = False
    """Whether to be quick."""
    is_good: bool = True
    """Whether to be good."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels of the cells."""


def parse(*argv: str) -> Example:
    parser = FlagParser("example", "%(prog)s [flags]", allow_abbrev=False)
    add_flags(parser, Example, ["files"], ["kind"])
    return make_config(Example, parser.parse(argv), ["files"])


@pytest.mark.parametrize(
    "flags, values",
    [
        ("", {}),
        ("--num_cells 1e6", {"num_cells": 10**6}),
        (
            "--kind b --is_quick --no-is_good --step 2e-1",
            {"kind": "b", "is_quick": True, "is_good": False, "step": 0.2},
        ),
        ("--labels phase=S cell=a=b", {"labels": {"phase": "S", "cell": "a=b"}}),
    ],
)
def test_flags_make_a_config(flags, values):
    assert parse("x", "y", "--output", "z", *flags.split()) == Example(files=["x", "y"], output="z", **values)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("x", "--output is required"),
        ("--output z", "files"),
        ("x --output z --num-cells 3", "--num-cells is unknown: did you mean --num_cells?"),
        ("x --output z --num 3", "--num is unknown"),  # no abbreviations
        ("x --output z --quite=3", "--quite is unknown: see --help"),
        ("x --output z --num_cells 1.5", "--num_cells 1.5: Input should be a valid integer"),
        ("x --output z --num_cells 1e400", "--num_cells 1e400: Input should be"),
        ("x --output z --kind c", "--kind c: Input should be 'a' or 'b'"),
        ("x --output z --labels phase", "--labels phase: write KEY=NAME"),
    ],
)
def test_a_mistake_names_the_flag(flags, message):
    with pytest.raises(ValueError) as error:
        parse(*flags.split())
    assert message in str(error.value)


def test_the_help_of_flags(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: example [flags] files --output OUTPUT ")
    places = [
        text.index(part) for part in ("--output OUTPUT File", "--kind {a,b}", "--num_cells NUM_CELLS", "A part:")
    ]
    assert places == sorted(places)
    assert "Kind of cells. Default: a." in text and "Size of a step. Default: 0.5." in text and "100% of them" in text
    assert "--is_quick Whether to be quick. -" in text and "--no-is_good" in text and "[KEY=NAME ...]" in text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_help_of_a_command_explains_each_flag(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "\n    wbdit " in text and text.startswith(f"usage: wbdit {name} ")
    words = " ".join(text.split())
    for part in cli.COMMANDS[name][1].__mro__[:-1]:
        for key in part.__annotations__:
            assert " ".join(part.__pydantic_fields__[key].description.split()) in words, key


def test_the_help_and_the_version(capsys):
    cli.main([])
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in cli.COMMANDS)
    cli.main(["--version"])
    assert capsys.readouterr().out == f"wbdit {__version__}\n"


def test_json_is_the_only_output(tmp_path, capsys):
    flags = "--num_cells 5 --num_inference_steps 2 --output".split()
    cli.main(["generate", "pbmc68k_reduced", *flags, str(tmp_path / "cells.h5ad"), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result == {"output": str(tmp_path / "cells.h5ad"), "num_cells": 5, "num_genes": 765}
    assert ad.read_h5ad(tmp_path / "cells.h5ad").shape == (5, 765)


@pytest.mark.parametrize(
    "error, code, message",
    [
        (TrainingInterrupted(signal.SIGTERM), 143, "interrupted. Run the same command with --resume_from_checkpoint"),
        (KeyboardInterrupt(), 130, "interrupted."),
        (MemoryError("8 GB"), 2, "out of memory: use a smaller batch size or fewer genes (8 GB)."),
        (ValueError("two\n  lines"), 2, "two lines"),
        (FileNotFoundError(2, "No such file", "cells.h5ad"), 2, "cells.h5ad: No such file"),
    ],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_exit_codes(error, code, message, rank, monkeypatch, capsys):
    """Only the first of several processes prints the line."""

    def train(source, config):
        raise error

    monkeypatch.setattr("wbdit_diffusers.training.train", train)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--output_dir", "out"])
    assert end.value.code == code
    output = capsys.readouterr().err
    assert output.startswith(f"wbdit train: {message}") if rank == "0" else output == ""
    assert output.count("\n") == (rank == "0")


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("wbdit_diffusers.training.train", lambda source, config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "--output_dir", "out"])


@pytest.mark.parametrize(
    "words", [["--help"], ["generate", "--help"], ["train", "--sed", "3"], ["evaluate", "--seed", "x"]]
)
def test_help_and_mistakes_of_flags_need_no_slow_imports(words):
    code = (
        "import sys; from wbdit_diffusers import cli\ntry:\n    cli.main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
    )
    code += "assert not sys.modules.keys() & {'torch', 'diffusers', 'anndata', 'numpy'}"
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)
