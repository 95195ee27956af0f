"""Kills a training with SIGKILL at random moments, resumes it each time, and compares it with an undisturbed one.

    python benchmarks/kill.py > lab/results/kill_cpu.json

A tiny training on 700 PBMCs, with one and with two processes on the CPU. All its processes are killed at ten random
moments of stage two, and at ten of saves: while a checkpoint or the pipeline is written. Each time the same command
resumes it with `--resume_from_checkpoint latest`. Finally it runs to its end. Weights and log must be those of an
undisturbed training, bit for bit, and after each kill the folder must load or be refused in one line.
"""

import argparse
import csv
import json
import math
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.data import load_pbmc


FLAGS = "--label_keys cell_type --num_genes 100 --num_layers 1 --num_attention_heads 2 --attention_head_dim 8"
FLAGS += " --train_batch_size 32 --lr_warmup_steps 2 --mixed_precision no --num_programs 8 --codec_hidden_size 32"
FLAGS += " --codec_max_steps 60 --decoder_steps 30 --checkpointing_steps 2"
FLAGS += " --checkpoints_total_limit 1 --validation_steps 7"
COMPONENTS = ("codec", "denoiser", "processor")
TIMEOUT = 600.0  # seconds

# Importing takes longer than the training, so processes are forked from one that has imported everything.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["wbdit_diffusers.cli", "wbdit_diffusers.training", "scanpy"])


def train(rank: int, num_processes: int, port: int, flags: list[str], log: Path):
    """One process of a training, started as a launcher would start it. Its output is appended to a file."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if num_processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    from wbdit_diffusers.cli import main

    torch.set_num_threads(1)
    main(["train", *flags])


def start(num_processes: int, flags: list[str], log: Path) -> list[BaseProcess]:
    """Starts a training with some processes."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    processes = [
        CONTEXT.Process(target=train, args=(rank, num_processes, port, flags, log)) for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[BaseProcess], log: Path):
    """Waits until a training has ended by itself."""
    for process in processes:
        process.join(TIMEOUT)
    if any(process.exitcode != 0 for process in processes):
        kill(processes)
        raise RuntimeError(f"The training failed: {log.read_text()[-3000:]}")


def kill(processes: list[BaseProcess]):
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def wait_for(moment: str, folder: Path, processes: list[BaseProcess], rng: np.random.Generator, num_rows: int):
    """Waits until a training has taken some steps, and then writes a checkpoint or the pipeline, or until it ends."""
    log, start_time = folder / "training_log.csv", time.time()

    def wait(condition: Callable[[], bool]):
        while all(process.is_alive() for process in processes) and not condition():
            time.sleep(0.001)

    wait(lambda: log.is_file() and log.stat().st_mtime > start_time)
    time.sleep(rng.uniform(0, 0.5))
    if moment == "save":
        wait(lambda: any(folder.glob(".checkpoint-*.partial")))
    elif moment == "pipeline":
        wait(lambda: len(read_log(folder)) == num_rows and not (folder / "model_index.json").is_file())
    time.sleep(rng.uniform(0, 0.02))


def read_log(folder: Path) -> list[dict[str, str]]:
    """The lines of the log, without seconds."""
    path = folder / "training_log.csv"
    if not path.is_file():
        return []
    with path.open() as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def state_of(folder: Path) -> str:
    """Whether the folder loads as a pipeline, or which error says why not."""
    try:
        ScRNAGenerationPipeline.from_pretrained(folder)
        return "loads"
    except (OSError, ValueError) as error:
        return str(error).replace(str(folder), "FOLDER")


def same_weights(folder: Path, other: Path) -> dict[str, bool]:
    """Which components have the same weights, bit for bit."""
    names = {component: f"{component}/diffusion_pytorch_model.safetensors" for component in COMPONENTS}
    return {key: (folder / name).read_bytes() == (other / name).read_bytes() for key, name in names.items()}


def measure(work_dir: Path, num_processes: int, moments: list[str], seed: int = 0, max_train_steps: int = 300) -> dict:
    """
    Args:
        work_dir (`Path`): Empty folder.
        num_processes (`int`): Number of processes.
        moments (`list[str]`): "steps", "save" or "pipeline" for each kill.
        seed (`int`, defaults to 0): Seed of the delays.
        max_train_steps (`int`, defaults to 300): Length of the training, about 70 steps for each kill.

    Returns:
        `dict`: the kills, and whether weights and log are those of the undisturbed training.
    """
    rng = np.random.default_rng(seed)
    load_pbmc().write_h5ad(work_dir / "cells.h5ad")
    flags = ["--dataset", str(work_dir / "cells.h5ad"), *FLAGS.split(), "--max_train_steps", str(max_train_steps)]
    num_rows = math.ceil(max_train_steps / 7)  # of the log: every 7 steps, and the last one
    whole, killed, log = work_dir / "whole", work_dir / "killed", work_dir / "log.txt"
    finish(start(num_processes, [*flags, "--output_dir", str(whole)], log), log)
    flags += ["--output_dir", str(killed), "--resume_from_checkpoint", "latest"]
    kills = []
    for moment in moments:
        processes = start(num_processes, flags, log)
        wait_for(moment, killed, processes, rng, num_rows)
        was_alive = all(process.is_alive() for process in processes)
        kill(processes)
        left = sorted(path.name for path in killed.glob("*checkpoint-*"))
        kills.append({"moment": moment, "was_alive": was_alive, "left": left, "folder": state_of(killed)})
        print(kills[-1], file=sys.stderr, flush=True)
    finish(start(num_processes, flags, log), log)
    return {
        "processes": num_processes,
        "kills": kills,
        "same_weights": same_weights(killed, whole),
        "same_log": read_log(killed) == read_log(whole),
        "same_split": (killed / "split.json").read_bytes() == (whole / "split.json").read_bytes(),
        "partial_files_left": [path.name for path in killed.rglob(".*.partial")],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="Number of kills in stage two, and in saves.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the delays.")
    args = parser.parse_args()
    moments = ["steps", "save"] * (args.kills - 2) + ["steps"] * min(args.kills, 2) + ["pipeline"] * min(args.kills, 2)
    command = f"python benchmarks/kill.py --kills {args.kills} --seed {args.seed}"
    runs = []
    for num_processes in (1, 2):
        with tempfile.TemporaryDirectory() as work_dir:
            runs.append(measure(Path(work_dir), num_processes, moments, args.seed, 2500))
    print(json.dumps({"command": command, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
