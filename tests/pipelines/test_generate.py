"""`wbdit generate`: parts over processes, interrupted and killed, give the cells of one call."""

import multiprocessing
import resource
import shutil
import signal
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


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("No space left on device")])
def test_an_interrupted_run_keeps_its_parts_and_continues(model, config, tmp_path, monkeypatch, error):
    write, folder = module.write_cells, tmp_path / "a.h5ad.parts"

    def interrupted(path, batches):
        if path.name.startswith("000000000200"):
            raise error
        return write(path, batches)

    monkeypatch.setattr(module, "write_cells", interrupted)
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


def start(command: list[str]):
    """`wbdit` in a process that is forked from one that has imported it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["wbdit_diffusers.cli", "wbdit_diffusers.pipelines.generate"])
    process = context.Process(target=main, args=(command,))
    process.start()
    return process


@pytest.mark.slow  # it starts ten processes
def test_killed_five_times(model, tmp_path, monkeypatch):
    """SIGKILL meets the command alone: the processes that it started end by themselves."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the number of threads can change the last digit of a product
    command = ["generate", str(model), "--output", str(tmp_path / "a.h5ad"), "--device", "cpu", "--seed", "3"]
    command += ["--num_cells", "12000", "--batch_size", "2300", "--num_inference_steps", "2"]  # six parts
    for number, num_processes in enumerate([1, 2, 1, 1, 2]):
        process = start([*command, "--num_processes", str(num_processes)])
        while process.is_alive() and len(list(tmp_path.glob("a.h5ad.parts/*.h5ad"))) <= number:
            time.sleep(0.005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    process = start([*command, "--num_processes", "2"])
    process.join()
    assert process.exitcode == 0
    expected = cells_of_a_call(model, num_cells=12_000, batch_size=2300, num_inference_steps=2)
    assert_equal(tmp_path / "a.h5ad", expected)


@pytest.mark.slow
def test_the_error_of_one_process_is_that_of_the_command(config, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # like a full disk
    try:
        with pytest.raises(OSError, match=r"^.*00\.h5ad.* \(`accelerate launch` ended with code 1\)$"):
            generate(config(num_cells=9200, batch_size=4600, num_inference_steps=1, num_processes=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_continued_by_the_same_pipeline_alone(model, config, tmp_path, monkeypatch):
    """Its scheduler, its networks and its configuration."""
    write = module.write_cells

    def interrupted(path, batches):
        if path.name.startswith("000000000200"):
            raise KeyboardInterrupt
        return write(path, batches)

    monkeypatch.setattr(module, "write_cells", interrupted)
    own = shutil.copytree(model, tmp_path / "own")
    with pytest.raises(KeyboardInterrupt):
        generate(config(model=str(own)))
    path = own / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("trailing", "leading"))
    with pytest.raises(OSError, match="unfinished command with another scheduler"):
        generate(config(model=str(own)))
