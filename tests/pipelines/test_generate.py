"""`generate_cells`: parts over processes, killed and resumed, give the file of one run that nothing disturbed."""

import multiprocessing
import os
import random
import re
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
from wbdit_diffusers.pipelines import generate
from wbdit_diffusers.pipelines.generate import GenerationRequest, generate_cells


NUM_CELLS = 12_000  # in six parts, the last of them not full
ARGUMENTS = ["--num_cells", str(NUM_CELLS), "--num_inference_steps", "2", "--batch_size", "2300", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(pbmc, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    make_pipeline(pbmc, codec="program", label_keys=["cell_type"], num_genes=20).save_pretrained(folder)
    return folder


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(generate, "CELLS_PER_PART", 100)


def assert_equal(path: Path, other: Path):
    cells, expected = ad.read_h5ad(path), ad.read_h5ad(other)
    assert cells.shape == expected.shape and (cells.X != expected.X).nnz == 0
    assert cells.obs.equals(expected.obs) and cells.obs_names.equals(expected.obs_names)
    np.testing.assert_array_equal(cells.obsm["X_programs"], expected.obsm["X_programs"])
    np.testing.assert_array_equal(cells.varm["programs"], expected.varm["programs"])
    assert cells.uns["wbdit"] == expected.uns["wbdit"]


def test_parts_are_the_cells_of_one_call(model, small_parts, tmp_path):
    request = GenerationRequest(str(model), num_cells=250, batch_size=50, cell_types="CD34+", seed=3, device="cpu")
    assert generate_cells(request, tmp_path / "a.h5ad") == (250, 20)
    pipe = ScRNAGenerationPipeline.from_pretrained(model)
    expected = pipe(num_cells=250, batch_size=50, cell_types="CD34+", generator=torch.Generator().manual_seed(3)).cells
    cells = ad.read_h5ad(tmp_path / "a.h5ad")
    assert (cells.X != expected.X).nnz == 0 and cells.obs_names.equals(expected.obs_names)
    assert cells.uns["wbdit"]["seed"] == 3 and set(cells.obs["cell_type"]) == {"CD34+"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5ad"]


def test_one_more_part_does_not_change_those_before(model, small_parts, tmp_path):
    for num_cells in (100, 130):
        generate_cells(GenerationRequest(str(model), num_cells, device="cpu"), tmp_path / f"{num_cells}.h5ad")
    few, more = ad.read_h5ad(tmp_path / "100.h5ad"), ad.read_h5ad(tmp_path / "130.h5ad")
    assert more.n_obs == 130 and (few.X != more[:100].X).nnz <= 1


def interrupt_at(monkeypatch, part: int, error: BaseException):
    """The writing of a part ends with an error."""
    write = generate.write_cells

    def interrupted(path, batches):
        if Path(path).name == f"{part:08d}.h5ad":
            raise error
        return write(path, batches)

    monkeypatch.setattr(generate, "write_cells", interrupted)
    return lambda: monkeypatch.setattr(generate, "write_cells", write)


@pytest.mark.parametrize(
    "error, message, code",
    [
        (
            KeyboardInterrupt(),
            "wbdit generate: interrupted. 200 of 250 cells are kept in .*the same command goes on",
            130,
        ),
        (OSError("No space left on device"), "wbdit generate: No space left on device 200 of 250 cells are kept", 2),
    ],
)
def test_what_is_done_is_kept_and_said(model, small_parts, tmp_path, monkeypatch, capsys, error, message, code):
    command = ["generate", str(model), "--num_cells", "250", "--batch_size", "100", "--device", "cpu", "--output"]
    main([*command, str(tmp_path / "expected.h5ad")])
    mend = interrupt_at(monkeypatch, 2, error)
    with pytest.raises(SystemExit) as end:
        main([*command, str(tmp_path / "a.h5ad")])
    assert end.value.code == code
    assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5ad.parts", "expected.h5ad"]
    mend()
    with pytest.raises(SystemExit):  # not with the cells of another command
        main([*command, str(tmp_path / "a.h5ad"), "--seed", "1"])
    assert "holds cells of an unfinished command with another seed" in capsys.readouterr().err
    done = tmp_path / "a.h5ad.parts" / "00000001.h5ad"
    done.write_bytes(done.read_bytes()[:-1000])  # a part that did not survive is made again
    main([*command, str(tmp_path / "a.h5ad")])
    assert_equal(tmp_path / "a.h5ad", tmp_path / "expected.h5ad")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5ad", "expected.h5ad"]


@pytest.mark.parametrize("part, error", [(0, KeyboardInterrupt()), (0, OSError("disk")), (1, ValueError("NaN"))])
def test_nothing_is_left_where_nothing_is_of_use(model, small_parts, tmp_path, monkeypatch, part, error):
    interrupt_at(monkeypatch, part, error)
    with pytest.raises(type(error)):
        generate_cells(GenerationRequest(str(model), 250, batch_size=100, device="cpu"), tmp_path / "a.h5ad")
    assert list(tmp_path.iterdir()) == []


def test_one_writer_at_a_time(model, small_parts, tmp_path, monkeypatch):
    request = GenerationRequest(str(model), 250, batch_size=100, device="cpu")
    write = generate.write_cells

    def with_another_at_work(path, batches):
        monkeypatch.setattr(generate, "write_cells", write)
        with pytest.raises(OSError, match="Another process is writing to .*a.h5ad.parts"):
            generate_cells(request, tmp_path / "a.h5ad")
        return write(path, batches)

    monkeypatch.setattr(generate, "write_cells", with_another_at_work)
    assert generate_cells(request, tmp_path / "a.h5ad") == (250, 20)


# ==================== Processes of their own ====================


def run(command: list[str]):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which whoever started the tests may have ignored
    main(command)


def start(command: list[str]):
    """`wbdit` in a process that is forked from one that has imported it already, but not computed anything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["wbdit_diffusers.cli", "wbdit_diffusers.pipelines.generate"])
    process = context.Process(target=run, args=(command,))
    process.start()
    return process


@pytest.mark.slow
def test_killed_at_random_and_resumed(model, tmp_path):
    command = ["generate", str(model), *ARGUMENTS, "--output"]
    reference = start([*command, str(tmp_path / "expected.h5ad")])
    reference.join()
    assert reference.exitcode == 0
    moments, kills = random.Random(0), 0
    parts = tmp_path / "a.h5ad.parts"
    while True:
        process = start([*command, str(tmp_path / "a.h5ad")])
        before = len(list(parts.glob("*.h5ad")))
        while process.is_alive() and len(list(parts.glob("*.h5ad"))) <= before and kills < 6:
            time.sleep(0.01)
        if kills < 6 and process.is_alive():
            time.sleep(moments.uniform(0, 0.3))
            process.kill()
            kills += 1
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert kills >= 2
    assert_equal(tmp_path / "a.h5ad", tmp_path / "expected.h5ad")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5ad", "expected.h5ad"]


@pytest.mark.slow
def test_two_processes_make_the_cells_of_one_also_when_they_are_killed(model, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # how many threads share a product may change its last digit
    command = ["generate", str(model), *ARGUMENTS, "--output"]
    alone = start([*command, str(tmp_path / "expected.h5ad")])
    alone.join()
    two = start([*command, str(tmp_path / "a.h5ad"), "--num_processes", "2"])
    parts = tmp_path / "a.h5ad.parts"
    while two.is_alive() and not list(parts.glob("*.h5ad")):
        time.sleep(0.01)
    two.kill()
    two.join()
    again = start([*command, str(tmp_path / "a.h5ad"), "--num_processes", "2"])
    again.join()
    assert alone.exitcode == again.exitcode == 0
    assert_equal(tmp_path / "a.h5ad", tmp_path / "expected.h5ad")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5ad", "expected.h5ad"]


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_with_one_line(model, tmp_path):
    # So many cells that a busy machine is not done with them before the signal comes
    many = ["--num_cells", "200000", "--num_processes", "2"]
    process = start(["generate", str(model), *ARGUMENTS, "--output", str(tmp_path / "a.h5ad"), *many])
    parts = tmp_path / "a.h5ad.parts"
    while process.is_alive() and not list(parts.glob("*.h5ad")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    assert not list(tmp_path.rglob("*.partial")) and not (tmp_path / "a.h5ad").exists()


@pytest.mark.slow
def test_a_failure_of_one_process_is_that_of_the_command(model, small_parts, tmp_path):
    """A worker that can't load the model says why, and nothing is left."""
    request = GenerationRequest(str(tmp_path / "absent"), 250, batch_size=100, device="cpu")
    parts = generate.Parts(tmp_path / "parts", 250, 100, 20)
    with pytest.raises(OSError, match="absent is no pipeline"):
        generate._run_processes(request, parts, 2)
