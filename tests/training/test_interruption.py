"""SIGTERM and Ctrl-C: what was done is saved, and how to go on is said."""

import csv
import os
import pkgutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from tiny import assert_same_weights, read_log, tiny_config

from wbdit_diffusers.training import TrainingInterrupted, train
from wbdit_diffusers.training.__main__ import main, resuming_flags
from wbdit_diffusers.training.checkpoints import find_checkpoints
from wbdit_diffusers.training.config import config_from_args
from wbdit_diffusers.training.processes import available_cpus, limit_threads


STEPS = {"label_keys": ["cell_type"], "max_train_steps": 12, "checkpointing_steps": 100, "validation_steps": 5}
SEARCH = {"num_programs": None, "min_programs": 4, "max_programs": 8, "min_program_gain": 0.0, "decoder_steps": 10}
SEARCH |= {"codec_max_steps": 30}
WHERE = {  # the function at whose call the signal comes, and at which call
    "reading": ("wbdit_diffusers.training.train.split_cells", 1),
    "first fit": ("wbdit_diffusers.training.codec._loss_of", 20),
    "second fit": ("wbdit_diffusers.training.codec._loss_of", 45),
    "decoder": ("wbdit_diffusers.models.ProgramCodec.decoder_loss", 70),
    "first step": ("wbdit_diffusers.training.denoiser.learning_rate", 1),
    "seventh step": ("wbdit_diffusers.training.denoiser.learning_rate", 7),
    "writing": ("wbdit_diffusers.training.train.write_model_card", 1),
}


def rows(folder: Path) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_log(folder)]


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
    train(pbmc, tiny_config(folder, **STEPS, **SEARCH))
    return folder


@pytest.mark.parametrize("where", WHERE)
def test_an_interrupted_training_goes_on_to_the_same_weights(where, trained, pbmc, tmp_path, monkeypatch):
    number = signal.SIGINT if where == "decoder" else signal.SIGTERM
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        interrupt_at(patch, *WHERE[where], number)
        if where == "writing":  # what is written is finished first
            train(pbmc, tiny_config(tmp_path, **STEPS, **SEARCH))
        else:
            with pytest.raises(TrainingInterrupted) as interrupted:
                train(pbmc, tiny_config(tmp_path, **STEPS, **SEARCH))
            assert interrupted.value.signal_number == number and isinstance(interrupted.value, KeyboardInterrupt)
            assert not (tmp_path / "model_index.json").exists()
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    saved = {"first step": ["checkpoint-1"], "seventh step": ["checkpoint-7"]}.get(where, [])
    assert [path.name for path in find_checkpoints(tmp_path)] == saved
    if where in ("second fit", "decoder"):
        assert (tmp_path / "stage_one" / "programs-4.pt").is_file()
    resumed = tiny_config(tmp_path, resume_from_checkpoint="latest", **STEPS, **SEARCH)
    if where != "writing":
        train(pbmc, resumed)
    assert_same_weights(tmp_path, trained)
    assert rows(tmp_path) == rows(trained)
    assert not list(tmp_path.glob(".*.partial")) and not list((tmp_path / "stage_one").glob("*.pt"))


def test_an_interrupted_fit_goes_on_where_it_was(pbmc, tmp_path, monkeypatch):
    """It takes the steps that were left, not all of them."""
    config = tiny_config(tmp_path, max_train_steps=1, codec_max_steps=40, decoder_steps=0)
    with monkeypatch.context() as patch:
        interrupt_at(patch, "wbdit_diffusers.training.codec.prior_loss", 25, signal.SIGTERM)
        with pytest.raises(TrainingInterrupted):
            train(pbmc, config)
    calls = []
    from wbdit_diffusers.training import codec

    prior_loss = codec.prior_loss
    monkeypatch.setattr(codec, "prior_loss", lambda *args: calls.append(None) or prior_loss(*args))
    train(
        pbmc,
        tiny_config(tmp_path, max_train_steps=1, codec_max_steps=40, decoder_steps=0, resume_from_checkpoint="latest"),
    )
    assert len(calls) == 15


def test_a_finished_codec_is_not_fitted_again(trained, pbmc, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, "wbdit_diffusers.training.denoiser.learning_rate", 2, signal.SIGTERM)
        with pytest.raises(TrainingInterrupted):
            train(pbmc, tiny_config(tmp_path, **STEPS, **SEARCH))
    for path in find_checkpoints(tmp_path):  # killed before the first one
        for file in sorted(path.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        path.rmdir()
    monkeypatch.setattr("wbdit_diffusers.training.codec.fit_programs", lambda *_: pytest.fail("fitted again"))
    train(pbmc, tiny_config(tmp_path, resume_from_checkpoint="latest", **STEPS, **SEARCH))
    assert_same_weights(tmp_path, trained)


def test_the_clock_goes_on_where_it_stopped(pbmc, tmp_path, monkeypatch):
    steps = {"codec": "expression", "max_train_steps": 4, "checkpointing_steps": 2, "validation_steps": 2}
    train(pbmc, tiny_config(tmp_path, **steps))
    before = [float(row["seconds"]) for row in read_log(tmp_path)]
    time.sleep(0.3)
    train(pbmc, tiny_config(tmp_path, resume_from_checkpoint="latest", **{**steps, "max_train_steps": 6}))
    seconds = [float(row["seconds"]) for row in read_log(tmp_path)]
    assert seconds[:2] == before and seconds[2] >= seconds[1]
    # Its minutes are over already, so that one step more is taken and no other.
    config = {**steps, "max_train_steps": 1000, "max_train_minutes": 1e-5}
    train(pbmc, tiny_config(tmp_path, resume_from_checkpoint="latest", **config))
    assert int(read_log(tmp_path)[-1]["step"]) == 7


def test_a_training_in_another_thread_leaves_signals_alone(pbmc, tmp_path):
    config = tiny_config(tmp_path, codec="expression", max_train_steps=1)
    thread = threading.Thread(target=train, args=(pbmc, config))
    thread.start()
    thread.join()
    assert (tmp_path / "model_index.json").is_file()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_program_says_how_to_go_on(number, code, pbmc_path, tmp_path, monkeypatch, capsys):
    flags = ["--dataset", str(pbmc_path), "--output_dir", str(tmp_path / "out"), "--codec", "expression"]
    flags += "--num_genes 50 --num_layers 1 --num_attention_heads 2 --attention_head_dim 8".split()
    with monkeypatch.context() as patch:
        interrupt_at(patch, "wbdit_diffusers.training.denoiser.learning_rate", 2, number)
        with pytest.raises(SystemExit) as exit_:
            main([*flags, "--max_train_steps", "3", "--overwrite_output_dir"], prog="wbdit train")
    assert exit_.value.code == code
    line = capsys.readouterr().err.splitlines()[-1]
    name = signal.Signals(number).name
    assert line.startswith(f"wbdit train: {name}: go on with the same command and the flags --dataset")
    assert line.endswith("--resume_from_checkpoint latest") and "--overwrite_output_dir" not in line
    main(line.split("the flags ")[1].split())
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_a_checkpoint_elsewhere_stays_what_is_gone_on_from(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", "old/checkpoint-3", "--seed", "1"]
    given = config_from_args(flags)
    assert resuming_flags(flags, given) == [*flags[:2], *flags[4:], *flags[2:4]]
    (tmp_path / "checkpoint-5").mkdir()
    assert resuming_flags(flags, given)[-1] == "latest"


# ==================== Launchers ====================

ENDLESS = "--codec expression --num_genes 50 --num_layers 1 --num_attention_heads 2 --attention_head_dim 8"
ENDLESS += " --train_batch_size 64 --max_train_steps 1000000 --max_train_epochs 1000000 --mixed_precision no"


def wait_for(condition, seconds: float = 120.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_its_launcher(launcher, number, pbmc_path, tmp_path):
    """They save first, and go on from there."""
    start = {
        "accelerate": ["accelerate.commands.launch", "--num_processes", "1", "--cpu"],
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }[launcher]
    flags = ["-m", "wbdit_diffusers.training", "--dataset", pbmc_path, "--output_dir", tmp_path, *ENDLESS.split()]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *map(str, [*start, *flags])]
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    log_path = tmp_path / "training_log.csv"
    try:
        assert wait_for(lambda: log_path.is_file() and log_path.read_text().count("\n") > 1), (
            tmp_path / "log.txt"
        ).read_text()
        workers = psutil.Process(process.pid).children(recursive=True)
        assert workers
        process.send_signal(number)  # to the launcher alone
        process.wait(60)
        gone, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive
    finally:
        for worker in [*psutil.Process().children(recursive=True)]:
            worker.kill()
    (checkpoint,) = find_checkpoints(tmp_path)
    with log_path.open() as file:
        assert int(checkpoint.name.split("-")[1]) >= int(list(csv.DictReader(file))[-1]["step"])
    assert "go on with the same command" in (tmp_path / "log.txt").read_text()


# ==================== Threads ====================


@pytest.fixture
def threads(monkeypatch):
    """Sixteen threads of eight processors; afterwards those of before."""
    before = torch.get_num_threads()
    torch.set_num_threads(16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(
        "wbdit_diffusers.training.processes.os.sched_getaffinity", lambda _: set(range(8)), raising=False
    )
    monkeypatch.setattr("wbdit_diffusers.training.processes.CGROUP_CPU_LIMIT", Path("absent"))
    yield
    torch.set_num_threads(before)
    os.environ.pop("OMP_NUM_THREADS", None)


@pytest.mark.parametrize("limit, cpus", [("max 100000", 8), ("350000 100000", 4), ("20000 100000", 1), ("", 8)])
def test_the_cpus_are_those_of_the_process(limit, cpus, threads, tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr("wbdit_diffusers.training.processes.CGROUP_CPU_LIMIT", tmp_path / "cpu.max")
    assert available_cpus() == cpus
    limit_threads()
    assert torch.get_num_threads() == cpus


def test_processes_share_the_cpus(threads, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    limit_threads()
    assert torch.get_num_threads() == 2 and os.environ["OMP_NUM_THREADS"] == "2"  # which Accelerate respects


def test_a_given_number_of_threads_is_kept(threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    limit_threads()
    assert torch.get_num_threads() == 16
