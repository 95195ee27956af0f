"""A resumed run ends as if it had not been interrupted, a folder holds one run, and checkpoints are complete."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from tiny import assert_same_weights, content, read_log, rows_without_time, tiny_config

from wbdit_diffusers.data import CellSplit
from wbdit_diffusers.training import train
from wbdit_diffusers.training.checkpoints import find_checkpoints, written_files


STEPS = {"label_keys": ["cell_type", "phase"], "max_train_steps": 24, "checkpointing_steps": 12, "validation_steps": 8}
# Without stage one, for what does not depend on it
FEW = {"codec": "expression", "label_keys": ["cell_type"], "num_genes": 60}
FEW |= {"max_train_steps": 4, "checkpointing_steps": 2, "validation_steps": 2}


@pytest.fixture(scope="module")
def trained(pbmc, tmp_path_factory) -> Path:
    """24 steps without interruption: 8 per epoch, a checkpoint in the middle of the second."""
    folder = tmp_path_factory.mktemp("trained")
    train(pbmc, tiny_config(folder, **STEPS))
    return folder


@pytest.fixture(scope="module")
def begun(pbmc, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("begun")
    train(pbmc, tiny_config(folder, **FEW))
    return folder


@pytest.fixture
def run(begun, tmp_path) -> Path:
    return shutil.copytree(begun, tmp_path / "run")


def resume(cells, folder: Path, **changes):
    train(cells, tiny_config(folder, **{**FEW, "resume_from_checkpoint": "latest", **changes}))


# ==================== The same weights ====================


def test_a_resumed_run_gives_the_same_weights_and_log(trained, pbmc, tmp_path):
    """From a checkpoint between two lines of the log: steps after it are forgotten and taken again."""
    folder = shutil.copytree(trained, tmp_path / "run")
    for name in ("denoiser", "processor", "scheduler"):
        shutil.rmtree(folder / name)
    train(pbmc, tiny_config(folder, resume_from_checkpoint=str(folder / "checkpoint-12"), **STEPS))
    assert_same_weights(folder, trained)
    # The line of step 16 averages the losses since step 8. Half of them are from before the checkpoint.
    assert rows_without_time(folder) == rows_without_time(trained)
    assert (folder / "split.json").read_bytes() == (trained / "split.json").read_bytes()
    assert [path.name for path in find_checkpoints(folder)] == ["checkpoint-12", "checkpoint-24"]


def test_resuming_with_accumulated_gradients(pbmc, tmp_path):
    """3 batches per step: the step that ends an epoch begins the next one."""
    steps = {"gradient_accumulation_steps": 3, "max_train_steps": 6, "checkpointing_steps": 4, "validation_steps": 1}
    changes = {"codec": "expression", **steps}
    train(pbmc, tiny_config(tmp_path / "whole", **changes))
    assert [int(row["epoch"]) for row in read_log(tmp_path / "whole")] == [0, 0, 1, 1, 1, 2]
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "denoiser")
    train(pbmc, tiny_config(tmp_path / "resumed", resume_from_checkpoint="latest", **changes))
    assert_same_weights(tmp_path / "resumed", tmp_path / "whole")
    assert rows_without_time(tmp_path / "resumed") == rows_without_time(tmp_path / "whole")


def test_the_first_run_and_later_ones_may_have_the_same_flags(pbmc, tmp_path):
    """Without a checkpoint a run starts at the beginning; its minutes count from where they stopped."""
    changes = {**FEW, "checkpointing_steps": 100}
    for _ in range(2):
        resume(pbmc, tmp_path, **changes)
        assert [int(row["step"]) for row in read_log(tmp_path)] == [2, 4]
    resume(pbmc, tmp_path, **{**changes, "checkpointing_steps": 4})
    before = read_log(tmp_path)
    resume(pbmc, tmp_path, **{**changes, "max_train_steps": 1000, "max_train_minutes": 1e-5})
    rows = read_log(tmp_path)
    assert rows[:2] == before and int(rows[-1]["step"]) == 5  # the time was over
    assert float(rows[-1]["seconds"]) >= float(before[-1]["seconds"])


def test_the_split_of_the_run_is_used(pbmc, tmp_path):
    names = np.random.default_rng(7).permutation(pbmc.obs_names).tolist()
    CellSplit(names[:600], names[600:]).save(tmp_path)
    train(pbmc, tiny_config(tmp_path / "out", **FEW, split=tmp_path / "split.json"))
    before = (tmp_path / "out" / "split.json").read_bytes()
    CellSplit(names[:500], names[500:]).save(tmp_path)
    resume(pbmc, tmp_path / "out", max_train_steps=5, split=tmp_path / "split.json")  # of another run: not read
    assert (tmp_path / "out" / "split.json").read_bytes() == before
    with pytest.raises(ValueError, match="The data have no cell"):
        resume(pbmc[1:].copy(), tmp_path / "out", max_train_steps=5)


# ==================== Whose folder it is ====================

CHANGES = [
    ({"seed": 1}, "--seed 1: the run to continue has 0"),
    ({"label_keys": ["phase"]}, r"--label_keys \['phase'\]: the run to continue has \['cell_type'\]"),
    ({"max_train_steps": 3}, "--max_train_steps 3: the run to continue has 4"),
]


@pytest.mark.parametrize("changes, message", CHANGES, ids=[next(iter(changes)) for changes, _ in CHANGES])
def test_another_flag_is_refused_with_its_name(changes, message, begun, pbmc):
    before = content(begun)
    with pytest.raises(ValueError, match=message):
        resume(pbmc, begun, **changes)
    assert content(begun) == before


def test_outputs_and_duration_may_change(run, pbmc):
    changes = {"max_train_steps": 6, "checkpointing_steps": 3, "validation_steps": 3, "checkpoints_total_limit": 2}
    changes |= {"max_train_minutes": 5.0, "num_inference_steps": 7, "scheduler": "ddim"}
    resume(pbmc, run, **changes)
    assert [int(row["step"]) for row in read_log(run)] == [2, 4, 6]
    assert json.loads((run / "run.json").read_text())["max_train_steps"] == 6
    assert [path.name for path in find_checkpoints(run)] == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("spoiled", [False, True])
def test_another_run_is_not_written_over(spoiled, begun, pbmc):
    """Nor is it removed before the cells of a new run are known to be good."""
    before, cells = content(begun), pbmc.copy()
    cells.X.data[0] = np.nan if spoiled else cells.X.data[0]
    message = "NaN" if spoiled else "holds a run. Continue it with --resume_from_checkpoint latest"
    with pytest.raises(ValueError, match=message):
        train(cells, tiny_config(begun, overwrite_output_dir=spoiled, **FEW))
    assert content(begun) == before


def test_overwriting_removes_what_that_run_wrote_and_nothing_else(run, pbmc, tmp_path):
    assert {path.name for path in written_files(run)} == {path.name for path in run.iterdir()}
    (run / "notes.txt").write_text("mine")
    (run / "checkpoint-best").mkdir()
    changes = {**FEW, "seed": 1, "checkpointing_steps": 3}
    train(pbmc, tiny_config(run, overwrite_output_dir=True, **changes))
    train(pbmc, tiny_config(tmp_path / "fresh", **changes))
    assert_same_weights(run, tmp_path / "fresh")
    assert content(run).keys() - content(tmp_path / "fresh").keys() == {"notes.txt"}
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-best"}


def test_files_that_no_training_wrote_are_kept(pbmc, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"holds README.md, but no run.json of a training"):
        train(pbmc, tiny_config(tmp_path, overwrite_output_dir=True, **FEW))
    assert content(tmp_path) == {"README.md": b"mine"}


def test_one_training_writes_at_a_time(pbmc, tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="another training writes there"):
        train(pbmc, tiny_config(tmp_path, **FEW))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    train(pbmc, tiny_config(tmp_path, **FEW))
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(38, "Function not implemented")])
def test_a_file_system_without_locks_is_warned_of(error, pbmc, tmp_path, monkeypatch, caplog):
    def acquire(self):
        raise error

    monkeypatch.setattr(FileLock, "acquire", acquire)
    train(pbmc, tiny_config(tmp_path / "out", **FEW))
    assert (tmp_path / "out" / "model_index.json").is_file()
    assert "can't be locked" in caplog.text and "start no other training there" in caplog.text


# ==================== Checkpoints ====================


def test_an_incomplete_checkpoint_is_no_checkpoint(run, begun, pbmc):
    shutil.copytree(run / "checkpoint-2", run / ".checkpoint-6.partial")
    resume(pbmc, run)
    assert_same_weights(run, begun)
    assert not list(run.glob(".*.partial"))


@pytest.mark.parametrize("name", ["checkpoint-9", "elsewhere/checkpoint-2"])
def test_a_folder_that_is_no_checkpoint_of_the_run_is_refused(name, run, pbmc):
    (run / "elsewhere" / "checkpoint-2").mkdir(parents=True)
    before = content(run)
    with pytest.raises(ValueError, match="is no checkpoint of .*Use 'latest'"):
        resume(pbmc, run, resume_from_checkpoint=str(run / name))
    assert content(run) == before


def test_no_pickle_is_loaded(run, pbmc, monkeypatch):
    load, modes = torch.load, []

    def noting(*args, **kwargs):
        modes.append(kwargs.get("weights_only"))
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", noting)
    resume(pbmc, run, max_train_steps=5)
    assert modes and all(modes)


def test_a_full_disk_leaves_the_checkpoints_before(pbmc, tmp_path, monkeypatch):
    from wbdit_diffusers.training import checkpoints

    save, calls = checkpoints.save_file, []

    def full(tensors, path):
        calls.append(None)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            train(pbmc, tiny_config(tmp_path / "out", checkpoints_total_limit=1, **FEW))
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint-*")] == ["checkpoint-2"]


def test_weights_that_are_not_finite_are_not_saved(pbmc, tmp_path, monkeypatch):
    """The loss of the step is finite, but not the weights after it."""
    step, calls = torch.optim.AdamW.step, []

    def spoil(self, *args, **kwargs):
        step(self, *args, **kwargs)
        calls.append(None)
        if len(calls) == 4:
            self.param_groups[0]["params"][0].data[0] = torch.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(ValueError, match="at step 4, or its weights are not finite. Lower --learning_rate"):
        train(pbmc, tiny_config(tmp_path, **FEW))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert [row["step"] for row in read_log(tmp_path)] == ["2"] and not (tmp_path / "model_index.json").exists()
