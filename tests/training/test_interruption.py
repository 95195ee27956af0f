"""SIGTERM and Ctrl-C: a checkpoint is saved, and a message says how to continue."""

import os
import pkgutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny import assert_same_weights, rows_without_time, tiny_config

from wbdit_diffusers.cli import main
from wbdit_diffusers.training import TrainingInterrupted, train
from wbdit_diffusers.training.checkpoints import find_checkpoints


STEPS = {"label_keys": ["cell_type"], "max_train_steps": 12, "checkpointing_steps": 100, "validation_steps": 5}
LEARNING_RATE = "wbdit_diffusers.training.denoiser.learning_rate"
WHERE = {  # the function at whose call the signal comes, at which call, and the checkpoints that are left
    "reading": ("wbdit_diffusers.training.stages.sample_cells", 1, []),
    "stage one": ("wbdit_diffusers.models.ProgramCodec.decoder_loss", 20, []),
    "seventh step": (LEARNING_RATE, 7, ["checkpoint-7"]),
    "writing": ("wbdit_diffusers.training.stages.write_model_card", 1, []),
}


def interrupt_at(monkeypatch, name: str, call: int, number: int):
    """Sends this process a signal at the given call of a function."""
    path, attribute = name.rsplit(".", 1)
    owner = sys.modules.get(path) or pkgutil.resolve_name(path)
    function, calls = getattr(owner, attribute), []

    def counting(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, attribute, counting)


@pytest.fixture(scope="module")
def trained(pbmc, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(pbmc, tiny_config(folder, **STEPS))
    return folder


@pytest.mark.parametrize("where", WHERE)
def test_an_interrupted_training_continues_to_the_same_weights(where, trained, pbmc, tmp_path, monkeypatch):
    function, call, checkpoints = WHERE[where]
    number = signal.SIGINT if where == "stage one" else signal.SIGTERM
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        interrupt_at(patch, function, call, number)
        if where == "writing":  # it ends anyway
            train(pbmc, tiny_config(tmp_path, **STEPS))
        else:
            with pytest.raises(TrainingInterrupted) as interrupted:
                train(pbmc, tiny_config(tmp_path, **STEPS))
            assert interrupted.value.signal_number == number and isinstance(interrupted.value, KeyboardInterrupt)
            assert not (tmp_path / "model_index.json").exists()
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [path.name for path in find_checkpoints(tmp_path)] == checkpoints
    if where == "seventh step":  # the finished codec is loaded
        monkeypatch.setattr("wbdit_diffusers.training.codec.fit_programs", lambda *_: pytest.fail("fitted again"))
    if where != "writing":
        train(pbmc, tiny_config(tmp_path, resume_from_checkpoint="latest", **STEPS))
    assert_same_weights(tmp_path, trained)
    assert rows_without_time(tmp_path) == rows_without_time(trained)
    assert not list(tmp_path.rglob(".*.partial"))


def test_a_training_in_another_thread_leaves_signals_alone(pbmc, tmp_path):
    config = tiny_config(tmp_path, codec="expression", max_train_steps=1)
    thread = threading.Thread(target=train, args=(pbmc, config))
    thread.start()
    thread.join()
    assert (tmp_path / "model_index.json").is_file()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_program_says_how_to_continue(number, code, pbmc_path, tmp_path, monkeypatch, capsys):
    flags = ["--dataset", str(pbmc_path), "--output_dir", str(tmp_path / "out"), "--codec", "expression"]
    flags += "--num_genes 50 --num_layers 1 --num_attention_heads 2 --attention_head_dim 8 --max_train_steps 3".split()
    with monkeypatch.context() as patch:
        interrupt_at(patch, LEARNING_RATE, 2, number)
        with pytest.raises(SystemExit) as exit_:
            main(["train", *flags])
    assert exit_.value.code == code
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("wbdit train: ") and "--resume_from_checkpoint latest" in line
    main(["train", *flags, "--resume_from_checkpoint", "latest"])
    assert (tmp_path / "out" / "model_index.json").is_file()


ENDLESS = "--codec expression --num_genes 50 --num_layers 1 --num_attention_heads 2 --attention_head_dim 8"
ENDLESS += " --train_batch_size 64 --max_train_steps 1000000 --max_train_epochs 1000000 --mixed_precision no"


@pytest.mark.slow
def test_two_processes_save_and_end_with_their_launcher(pbmc_path, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += ["wbdit_diffusers.cli", "train", "--dataset", str(pbmc_path), "--output_dir", str(tmp_path)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    log, log_path = tmp_path / "log.txt", tmp_path / "training_log.csv"
    with log.open("w") as output:
        process = subprocess.Popen([*command, *ENDLESS.split()], env=environment, stdout=output, stderr=output)
    try:
        end = time.monotonic() + 120
        while not (log_path.is_file() and log_path.read_text().count("\n") > 1) and time.monotonic() < end:
            time.sleep(0.1)
        process.terminate()  # the launcher alone
        process.wait(60)
    finally:
        process.kill()
    (checkpoint,) = find_checkpoints(tmp_path)
    last_row = log_path.read_text().splitlines()[-1]
    assert int(checkpoint.name.split("-")[1]) >= int(last_row.split(",")[0])
    assert log.read_text().count("--resume_from_checkpoint latest") == 1
