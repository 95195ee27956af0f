"""Kills a training again and again, goes on each time, and compares with one that nobody killed.

    python benchmarks/kill.py --output lab/results/kill_cpu.json
    python benchmarks/kill.py --num_processes 1 --kills 5 --output kill.json

The training is a tiny one on 700 PBMCs, on the CPU, of several processes. Each time it runs until a moment has come
(it reads cells, fits the codec, takes steps, saves a checkpoint, writes the pipeline) and some milliseconds more; then
all its processes get SIGKILL, or only one of them, and the same command goes on with `--resume_from_checkpoint
latest`. At the end nobody kills it: weights and losses must be those of the training that was not killed, bit for
bit.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from wbdit_diffusers.data import load_pbmc


FLAGS = "--label_keys cell_type --num_genes 100 --patch_size 4 --num_layers 1 --num_attention_heads 2"
FLAGS += " --attention_head_dim 8 --train_batch_size 32 --lr_warmup_steps 2 --mixed_precision no"
FLAGS += " --min_programs 4 --max_programs 8 --codec_hidden_size 32 --codec_max_steps 150 --decoder_steps 50"
FLAGS += " --max_train_steps 60 --checkpointing_steps 4 --checkpoints_total_limit 3 --validation_steps 5"
COMPONENTS = ("codec", "denoiser", "processor")
TIMEOUT = 300.0  # seconds, of one run

# When each comes: what must have been written since the start, and what must be there besides.
MOMENTS: dict[str, tuple[str, Callable[[Path], bool]]] = {
    "reading cells": (".lock", lambda folder: True),
    "stage one": ("run.json", lambda folder: True),
    "stage one, second fit": ("run.json", lambda folder: (folder / "stage_one" / "programs-4.pt").exists()),
    "stage one, decoder": ("run.json", lambda folder: (folder / "stage_one" / "programs-8.pt").exists()),
    "first steps": ("training_log.csv", lambda folder: True),
    "steps": ("training_log.csv", lambda folder: any(folder.glob("checkpoint-*"))),
    "save": ("training_log.csv", lambda folder: any(folder.glob(".checkpoint-*.partial"))),
    "final save": ("training_log.csv", lambda folder: len(read_log(folder)) == 12),
}


def read_log(folder: Path) -> list[dict[str, str]]:
    """The rows of the losses, without the time they took."""
    path = folder / "training_log.csv"
    if not path.is_file():
        return []
    with path.open() as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def start(num_processes: int, flags: list[str], log: Path) -> subprocess.Popen:
    """The training, its output in a file."""
    launcher = []
    if num_processes > 1:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes), "-m"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with log.open("a") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *launcher, "wbdit_diffusers.training", *flags],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def kill(process: subprocess.Popen, rng: np.random.Generator) -> str:
    """SIGKILL to all of its processes, or to one; in the end none is left."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    one = bool(rng.random() < 0.3)
    victims = [family[rng.integers(len(family))]] if one else family
    for victim in victims:
        victim.kill()
    # The others must end by themselves: a worker without its launcher, a launcher without its worker.
    _, alive = psutil.wait_procs(family, timeout=60)
    for left in alive:
        left.kill()
    process.wait()
    return f"{'one' if one else 'all'} of {len(family)}" + (f", {len(alive)} lived on" if alive else "")


def written_at(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def run_until(process: subprocess.Popen, folder: Path, moment: str, before: int) -> bool:
    """Whether the moment came before the training had ended. Its file had the time `before` at the start."""
    deadline = time.monotonic() + TIMEOUT
    name, is_there = MOMENTS[moment]
    while process.poll() is None and time.monotonic() < deadline:
        if written_at(folder / name) not in (0, before) and is_there(folder):
            return True
        time.sleep(0.002)
    return False


def same_files(folder: Path, other: Path) -> dict[str, bool]:
    """Which of the pipeline's weights are the same, bit for bit."""
    name = "diffusion_pytorch_model.safetensors"
    return {
        component: (folder / component / name).read_bytes() == (other / component / name).read_bytes()
        for component in COMPONENTS
    }


def measure(work_dir: Path, num_processes: int, num_kills: int, seed: int) -> dict:
    """
    Args:
        work_dir (`Path`): An empty folder.
        num_processes (`int`): Of the training.
        num_kills (`int`): How often it is killed; the moments take turns.
        seed (`int`): Of the delays.

    Returns:
        `dict`: the kills, and whether weights and log are those of the training that was not killed.
    """
    rng = np.random.default_rng(seed)
    load_pbmc().write_h5ad(work_dir / "cells.h5ad")
    flags = ["--dataset", str(work_dir / "cells.h5ad"), *FLAGS.split()]
    whole, killed, log = work_dir / "whole", work_dir / "killed", work_dir / "log.txt"
    begun = time.monotonic()
    if start(num_processes, [*flags, "--output_dir", str(whole)], log).wait(TIMEOUT) != 0:
        raise RuntimeError(log.read_text()[-3000:])
    seconds = time.monotonic() - begun
    flags += ["--output_dir", str(killed), "--resume_from_checkpoint", "latest"]
    kills = []
    # In the order in which they come, so that the training goes on from each to the next.
    order = sorted(np.resize(np.arange(len(MOMENTS)), num_kills).tolist())
    for moment in [list(MOMENTS)[number] for number in order]:
        before = written_at(killed / MOMENTS[moment][0])
        process = start(num_processes, flags, log)
        came = run_until(process, killed, moment, before)
        time.sleep(rng.uniform(0, 0.4) if came else 0)
        whom = kill(process, rng) if process.poll() is None else "it had ended"
        left = [path.name for path in killed.glob("*") if path.name.startswith((".checkpoint", "checkpoint"))]
        kills.append({"moment": moment, "killed": whom, "left": sorted(left)})
        print(kills[-1], flush=True)
    code = start(num_processes, flags, log).wait(TIMEOUT)
    if code != 0:
        raise RuntimeError(log.read_text()[-3000:])
    return {
        "processes": num_processes,
        "kills": kills,
        "seconds_of_the_whole_training": round(seconds, 1),
        "same_weights": same_files(killed, whole),
        "same_log": read_log(killed) == read_log(whole) and len(read_log(whole)) == 12,
        "same_split": (killed / "split.json").read_bytes() == (whole / "split.json").read_bytes(),
        "partial_files_left": [path.name for path in killed.glob(".*.partial")],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_processes", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="The .json file.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work_dir:
        result = measure(Path(work_dir), args.num_processes, args.kills, args.seed)
    command = f"python benchmarks/kill.py --num_processes {args.num_processes} --kills {args.kills} --seed {args.seed}"
    args.output.write_text(json.dumps({"command": command, **result}, indent=1) + "\n")
    print({name: value for name, value in result.items() if name != "kills"})


if __name__ == "__main__":
    main()
