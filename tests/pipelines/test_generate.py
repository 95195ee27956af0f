"""`wbdit generate`: parts over processes, interrupted and killed, give the cells of one call."""

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from conftest import make_pipeline

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.cli import main
from wbdit_diffusers.pipelines import generate as module
from wbdit_diffusers.pipelines.generate import GenerateConfig, generate


@pytest.fixture(scope="module")
def model(pbmc, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    make_pipeline(pbmc, codec="program", label_keys=["cell_type"], num_genes=20).save_pretrained(folder)
    return folder


@pytest.fixture
def config(model, tmp_path, monkeypatch):
    """A function that makes a request in three parts: 250 cells, in parts of 100."""
    monkeypatch.setattr(module, "CELLS_PER_PART", 100)

    def make(**values) -> GenerateConfig:
        given = {"model": str(model), "output": tmp_path / "a.h5ad", "num_cells": 250, "batch_size": 50}
        return GenerateConfig(**given | {"device": "cpu"} | values)

    return make


def assert_equal(path: Path, expected: ad.AnnData):
    cells = ad.read_h5ad(path)
    assert cells.shape == expected.shape and (cells.X != expected.X).nnz == 0
    assert cells.obs.equals(expected.obs) and cells.obs_names.equals(expected.obs_names)
    np.testing.assert_array_equal(cells.obsm["X_programs"], expected.obsm["X_programs"])
    np.testing.assert_array_equal(cells.varm["programs"], expected.varm["programs"])
    assert cells.uns["wbdit"] == expected.uns["wbdit"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def cells_of_a_call(model: Path, **arguments) -> ad.AnnData:
    pipe = ScRNAGenerationPipeline.from_pretrained(model)
    return pipe(**arguments, generator=torch.Generator().manual_seed(3)).cells


def test_the_cells_of_one_call(model, config, tmp_path):
    given = {"library_size": 900.0, "guidance_scale": 1.5, "num_inference_steps": 3}
    assert generate(config(**given, cell_types=["CD34+"], seed=3)) == (250, 20)
    expected = cells_of_a_call(model, num_cells=250, cell_types="CD34+", batch_size=50, **given)
    assert_equal(tmp_path / "a.h5ad", expected)


def test_several_types_take_turns(config, tmp_path):
    """Equally many of each, in one process or several."""
    types = ["CD34+", "CD19+ B", "Dendritic"]
    generate(config(cell_types=types, num_cells=120))
    cells = ad.read_h5ad(tmp_path / "a.h5ad")
    assert cells.obs["cell_type"].tolist() == types * 40


def interrupt(monkeypatch, part: str, error: BaseException | None = None):
    """Lets the writing of a part fail."""
    write = module.write_cells

    def interrupted(path, batches):
        if path.name.startswith(part):
            raise error or KeyboardInterrupt
        return write(path, batches)

    monkeypatch.setattr(module, "write_cells", interrupted)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("No space left on device")])
def test_an_interrupted_run_keeps_its_parts_and_continues(model, config, tmp_path, monkeypatch, error):
    write, folder = module.write_cells, tmp_path / "a.h5ad.parts"
    interrupt(monkeypatch, "000000000200", error)
    with pytest.raises(type(error), match=f"{error} ?200 of 250 cells are kept in {folder}: the same command"):
        generate(config(seed=3))
    with pytest.raises(OSError, match="holds cells of an unfinished command with another seed: run that command"):
        generate(config(seed=4))
    monkeypatch.setattr(module, "write_cells", write)
    before = (folder / "000000000000.h5ad").stat().st_mtime_ns
    monkeypatch.setattr(module, "remove", lambda path: None)  # look at the parts
    generate(config(seed=3))
    assert (folder / "000000000000.h5ad").stat().st_mtime_ns == before
    monkeypatch.undo()
    module.remove(folder)
    assert_equal(tmp_path / "a.h5ad", cells_of_a_call(model, num_cells=250, batch_size=50))


def test_a_request_that_fails_at_once_leaves_nothing(config, tmp_path, monkeypatch):
    for values, message in (({"cell_types": ["none"]}, "none"), ({"device": "cuda:99"}, "no such device")):
        with pytest.raises(ValueError, match=message):
            generate(config(**values))
    monkeypatch.setattr(module, "write_cells", lambda path, batches: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="^disk$"):
        generate(config(seed=1))
    assert list(tmp_path.iterdir()) == []


def run(command: list[str], rank: int, num_processes: int, port: int):
    """One process of `wbdit`, started as a launcher would start it."""
    os.environ |= {"ACCELERATE_USE_CPU": "true", "RANK": str(rank), "WORLD_SIZE": str(num_processes)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(num_processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    main(command)


def start(command: list[str], num_processes: int) -> list:
    """Processes that are forked from one that has imported `wbdit`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["wbdit_diffusers.cli", "wbdit_diffusers.pipelines.generate"])
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    ranks = range(num_processes)
    processes = [context.Process(target=run, args=(command, rank, num_processes, port)) for rank in ranks]
    for process in processes:
        process.start()
    return processes


def launch(*command: str | Path) -> subprocess.CompletedProcess:
    """Runs two processes on the CPU, as docs/scaling.md does."""
    words = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*words, *map(str, command)], env=environment, capture_output=True, text=True)


@pytest.mark.slow  # it starts ten processes
def test_killed_five_times(model, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the number of threads can change the last digit of a product
    command = ["generate", str(model), "--output", str(tmp_path / "a.h5ad"), "--device", "cpu", "--seed", "3"]
    command += ["--num_cells", "12000", "--batch_size", "2300", "--num_inference_steps", "2"]  # six parts
    for number, num_processes in enumerate([1, 2, 1, 1, 2]):
        processes = start(command, num_processes)
        while processes[0].is_alive() and len(list(tmp_path.glob("a.h5ad.parts/*.h5ad"))) <= number:
            time.sleep(0.005)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
            assert process.exitcode == -signal.SIGKILL
    result = launch("-m", "wbdit_diffusers.cli", *command)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("12000 cells × 20 genes in") == 1
    expected = cells_of_a_call(model, num_cells=12_000, batch_size=2300, num_inference_steps=2)
    assert_equal(tmp_path / "a.h5ad", expected)


FAILING = """
    import os
    import sys

    from wbdit_diffusers.cli import main
    from wbdit_diffusers.pipelines import generate

    write = generate.write_cells


    def write_or_fail(path, batches):
        if os.environ["RANK"] == "1":
            raise OSError("No space left on device")
        return write(path, batches)


    generate.write_cells = write_or_fail
    main(["generate", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_the_error_of_any_process_is_shown_once(model, tmp_path):
    """The other processes make their share first."""
    script, output = tmp_path / "failing.py", tmp_path / "a.h5ad"
    script.write_text(textwrap.dedent(FAILING))
    flags = "--num_cells 9200 --batch_size 4600 --num_inference_steps 1 --device cpu".split()
    result = launch(script, model, "--output", output, *flags)
    assert result.returncode == 1
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("wbdit "))
    assert line.startswith("wbdit generate: No space left on device 4,600 of 9,200 cells are kept in")
    assert [path.name for path in (tmp_path / "a.h5ad.parts").glob("*.h5ad")] == ["000000000000.h5ad"]


def test_a_run_is_continued_by_the_same_pipeline_alone(model, config, tmp_path, monkeypatch):
    """Its scheduler, its networks and its configuration."""
    interrupt(monkeypatch, "000000000200")
    own = shutil.copytree(model, tmp_path / "own")
    with pytest.raises(KeyboardInterrupt):
        generate(config(model=str(own)))
    path = own / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("trailing", "leading"))
    with pytest.raises(OSError, match="unfinished command with another scheduler"):
        generate(config(model=str(own)))
