"""Interrupted trainings go on as if nothing had happened."""

import shutil
from pathlib import Path

import pytest
from tiny import assert_same_weights, read_log, tiny_config

from wbdit_diffusers.training import train
from wbdit_diffusers.training.checkpoints import find_checkpoints


STEPS = {"label_keys": ["cell_type", "phase"], "max_train_steps": 24, "checkpointing_steps": 12, "validation_steps": 4}


def rows_without_time(folder: Path) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_log(folder)]


@pytest.fixture(scope="module")
def trained(pbmc, tmp_path_factory) -> Path:
    """24 steps without interruption: 8 per epoch, a checkpoint in the middle of the second."""
    folder = tmp_path_factory.mktemp("trained")
    train(pbmc, tiny_config(folder, **STEPS))
    return folder


@pytest.fixture
def interrupted(trained, tmp_path) -> Path:
    """What an interruption after step 12 leaves; a run of 12 steps would have let the learning rate fall."""
    folder = tmp_path / "interrupted"
    shutil.copytree(trained, folder)
    for name in ("checkpoint-24", "denoiser", "processor", "scheduler"):
        shutil.rmtree(folder / name)
    for name in ("model_index.json", "README.md"):
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("resume_from", ["latest", "path"])
def test_a_resumed_training_gives_the_same_weights_and_log(resume_from, trained, interrupted, pbmc):
    checkpoint = "latest" if resume_from == "latest" else str(interrupted / "checkpoint-12")
    assert len(read_log(interrupted)) == 6  # the rows of steps 16, 20 and 24, which are taken once more, are forgotten
    train(pbmc, tiny_config(interrupted, resume_from_checkpoint=checkpoint, **STEPS))
    assert_same_weights(interrupted, trained)
    # The row of step 16 averages the losses since the checkpoint, as it does in the uninterrupted run.
    assert rows_without_time(interrupted) == rows_without_time(trained)
    assert (interrupted / "split.json").read_bytes() == (trained / "split.json").read_bytes()


def test_a_checkpoint_of_another_folder_brings_its_codec(trained, pbmc, tmp_path):
    train(pbmc, tiny_config(tmp_path, resume_from_checkpoint=str(trained / "checkpoint-12"), **STEPS))
    assert_same_weights(tmp_path, trained)


def test_a_finished_training_is_resumed_to_itself(trained, pbmc, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(trained, folder)
    train(pbmc, tiny_config(folder, resume_from_checkpoint="latest", **STEPS))
    assert_same_weights(folder, trained)
    assert read_log(folder) == read_log(trained)


def test_resuming_with_accumulated_gradients(pbmc, tmp_path):
    """3 batches per step: the step that ends an epoch begins the next one."""
    steps = {"gradient_accumulation_steps": 3, "max_train_steps": 6, "checkpointing_steps": 4, "validation_steps": 1}
    train(pbmc, tiny_config(tmp_path / "whole", codec="expression", **steps))
    assert [int(row["epoch"]) for row in read_log(tmp_path / "whole")] == [0, 0, 1, 1, 1, 2]
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "denoiser")
    checkpoint = str(tmp_path / "resumed" / "checkpoint-4")
    train(pbmc, tiny_config(tmp_path / "resumed", codec="expression", resume_from_checkpoint=checkpoint, **steps))
    assert_same_weights(tmp_path / "resumed", tmp_path / "whole")
    assert rows_without_time(tmp_path / "resumed") == rows_without_time(tmp_path / "whole")


def test_latest_without_a_checkpoint_starts_at_the_beginning(pbmc, tmp_path):
    config = tiny_config(tmp_path, codec="expression", max_train_steps=2, validation_steps=1)
    train(pbmc, config)
    first = rows_without_time(tmp_path)
    again = tiny_config(
        tmp_path, codec="expression", max_train_steps=2, validation_steps=1, resume_from_checkpoint="latest"
    )
    train(pbmc, again)
    assert rows_without_time(tmp_path) == first and len(first) == 2


def test_the_newest_checkpoints_are_kept(pbmc, tmp_path):
    changes = {"max_train_steps": 12, "checkpointing_steps": 1, "checkpoints_total_limit": 3}
    train(pbmc, tiny_config(tmp_path, codec="expression", **changes))
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-11", "checkpoint-12"]


def test_all_checkpoints_are_kept_without_a_limit(trained):
    assert [path.name for path in find_checkpoints(trained)] == ["checkpoint-12", "checkpoint-24"]


@pytest.mark.parametrize("name", ["absent", "empty", "pipeline"])
def test_a_folder_that_is_no_checkpoint_is_refused(name, trained, pbmc, tmp_path):
    (tmp_path / "empty").mkdir()
    folder = trained if name == "pipeline" else tmp_path / name
    config = tiny_config(tmp_path / "out", resume_from_checkpoint=str(folder), **STEPS)
    with pytest.raises(ValueError, match=f"--resume_from_checkpoint {folder}: this is no checkpoint"):
        train(pbmc, config)
    assert not (tmp_path / "out").exists()
