"""Kills a training again and again, goes on each time, and compares with one that nobody killed.

    python benchmarks/kill.py --output lab/results/kill_cpu.json
    python benchmarks/kill.py --num_processes 1 --kills 5 --output kill.json

The training is a tiny one on 700 PBMCs, on the CPU, of several processes. Each time it runs until a moment has come
(it reads cells, fits the codec, takes steps, saves a checkpoint, writes the pipeline) and some milliseconds more; then
all its processes get SIGKILL, or only one of them, and the same command goes on with `--resume_from_checkpoint
latest`. At the end nobody kills it: weights and losses must be those of the training that was not killed, bit for
bit.

With `--elastic 2 1 4` the training goes on with other numbers of processes instead, and is killed between: which cells
its steps saw must be the beginning of the one order that follows from the seed, each cell once an epoch.
"""

import argparse
import csv
import json
import multiprocessing
import os
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from wbdit_diffusers.data import load_pbmc
from wbdit_diffusers.data.order import BatchSampler, CellOrder
from wbdit_diffusers.training.checkpoints import find_checkpoints, read_state, step_of


FLAGS = "--label_keys cell_type --num_genes 100 --patch_size 4 --num_layers 1 --num_attention_heads 2"
FLAGS += " --attention_head_dim 8 --train_batch_size 32 --lr_warmup_steps 2 --mixed_precision no"
FLAGS += " --min_programs 4 --max_programs 8 --codec_hidden_size 32 --codec_max_steps 60 --decoder_steps 30"
FLAGS += " --max_train_steps 40 --checkpointing_steps 4 --checkpoints_total_limit 3 --validation_steps 5"
NUM_ROWS = 8  # of the log
COMPONENTS = ("codec", "denoiser", "processor")
TIMEOUT = 600.0  # seconds, of one run

# Processes are forked from one that has imported everything: that takes longer than the training.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["wbdit_diffusers.training.__main__", "scanpy"])

# When each comes: what must have been written since the start, and what must be there besides.
MOMENTS: dict[str, tuple[str, Callable[[Path], bool]]] = {
    "reading cells": (".lock", lambda folder: True),
    "stage one": ("run.json", lambda folder: True),
    "stage one, second fit": ("run.json", lambda folder: (folder / "stage_one" / "programs-4.pt").exists()),
    "stage one, decoder": ("run.json", lambda folder: (folder / "stage_one" / "programs-8.pt").exists()),
    "first steps": ("training_log.csv", lambda folder: True),
    "steps": ("training_log.csv", lambda folder: any(folder.glob("checkpoint-*"))),
    "save": ("training_log.csv", lambda folder: any(folder.glob(".checkpoint-*.partial"))),
    "final save": ("training_log.csv", lambda folder: len(read_log(folder)) == NUM_ROWS),
}


def read_log(folder: Path) -> list[dict[str, str]]:
    """The rows of the losses, without the time they took."""
    path = folder / "training_log.csv"
    if not path.is_file():
        return []
    with path.open() as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def train(rank: int, num_processes: int, port: int, flags: list[str], log: Path, seen: Path | None):
    """One process of a training, as a launcher would start it; its output goes to a file, and so do its cells."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if num_processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    from wbdit_diffusers.training.__main__ import main

    torch.set_num_threads(1)
    if seen is not None:
        record_cells(seen / f"{rank}.txt")
    main(flags)


def record_cells(path: Path):
    """Writes the numbers of the cells of each batch that a step takes, as a line."""
    from wbdit_diffusers.training.denoiser import DenoiserTraining

    batches = DenoiserTraining._batches

    def recorded(self):
        place = self.accelerator.process_index, self.accelerator.num_processes
        order = BatchSampler(self.train_dataset.order(self.config.seed), self.batch_size, *place, self.num_seen)
        for batch, cells in zip(batches(self), order):
            np.testing.assert_array_equal(self.train_dataset.__getitems__(cells)["latents"], batch["latents"])
            with path.open("a") as file:
                file.write(f"{' '.join(map(str, cells))}\n")
            yield batch

    DenoiserTraining._batches = recorded


def start(num_processes: int, flags: list[str], log: Path, seen: Path | None = None) -> list[BaseProcess]:
    """A training, as that many processes."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    processes = [
        CONTEXT.Process(target=train, args=(rank, num_processes, port, flags, log, seen))
        for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[BaseProcess], log: Path):
    """Waits for the end of a training that nobody kills."""
    for process in processes:
        process.join(TIMEOUT)
    if any(process.exitcode != 0 for process in processes):
        kill(processes, processes)
        raise RuntimeError(
            f"The training ended as {[process.exitcode for process in processes]}: {log.read_text()[-3000:]}"
        )


def kill(processes: list[BaseProcess], victims: list[BaseProcess]) -> int:
    """SIGKILL to some of a training's processes. The others must end by themselves; returns how many did not."""
    for process in victims:
        process.kill()
    for process in processes:
        process.join(120)
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.kill()
        process.join()
    return len(alive)


def written_at(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def run_until(processes: list[BaseProcess], folder: Path, moment: str, before: int) -> bool:
    """Whether the moment came before the training had ended. Its file had the time `before` at the start."""
    deadline = time.monotonic() + TIMEOUT
    name, is_there = MOMENTS[moment]
    while all(process.is_alive() for process in processes) and time.monotonic() < deadline:
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
    finish(start(num_processes, [*flags, "--output_dir", str(whole)], log), log)
    seconds = time.monotonic() - begun
    flags += ["--output_dir", str(killed), "--resume_from_checkpoint", "latest"]
    kills = []
    # In the order in which they come, so that the training goes on from each to the next.
    order = sorted(np.resize(np.arange(len(MOMENTS)), num_kills).tolist())
    for moment in [list(MOMENTS)[number] for number in order]:
        (killed / ".lock").unlink(missing_ok=True)  # whose time would stay as it was
        before = written_at(killed / MOMENTS[moment][0])
        processes = start(num_processes, flags, log)
        came = run_until(processes, killed, moment, before)
        time.sleep(rng.uniform(0, 0.02 if moment == "save" else 0.3) if came else 0)
        victims = [processes[rng.integers(num_processes)]] if rng.random() < 0.3 else processes
        lived_on = kill(processes, victims)
        left = sorted(path.name for path in killed.glob("*checkpoint-*"))
        whom = "none: it had ended" if not came else f"{len(victims)} of {num_processes}"
        kills.append({"moment": moment, "killed": whom, "lived_on": lived_on, "left": left})
        print(kills[-1], flush=True)
    finish(start(num_processes, flags, log), log)
    return {
        "processes": num_processes,
        "kills": kills,
        "seconds_of_the_whole_training": round(seconds, 1),
        "same_weights": same_files(killed, whole),
        "same_log": read_log(killed) == read_log(whole) and len(read_log(whole)) == NUM_ROWS,
        "same_split": (killed / "split.json").read_bytes() == (whole / "split.json").read_bytes(),
        "partial_files_left": [path.name for path in killed.glob(".*.partial")],
    }


def last_step(folder: Path) -> int:
    """Of the newest checkpoint."""
    return max((step_of(checkpoint) for checkpoint in find_checkpoints(folder)), default=0)


def measure_elastic(work_dir: Path, numbers: list[int], steps: int = 12) -> dict:
    """
    Args:
        work_dir (`Path`): An empty folder.
        numbers (`list[int]`): Of the processes, one after the other.
        steps (`int`, defaults to 12): After which all but the last are killed: at the next checkpoint.

    Returns:
        `dict`: for each number of processes the cells that its steps saw, which are those of the order from where the
        one before had saved; and how often each cell was seen by all steps that stayed.
    """
    load_pbmc().write_h5ad(work_dir / "cells.h5ad")
    flags = ["--dataset", str(work_dir / "cells.h5ad"), *FLAGS.split(), "--output_dir", str(work_dir / "run")]
    flags += ["--resume_from_checkpoint", "latest", "--max_train_steps", str(2 * steps * len(numbers))]
    counts, runs, before = Counter(), [], {"step": 0, "num_seen": 0}
    for i, number in enumerate(numbers):
        seen, is_last = work_dir / f"seen-{i}", i == len(numbers) - 1
        seen.mkdir()
        processes = start(number, flags, work_dir / "log.txt", seen)
        if is_last:
            finish(processes, work_dir / "log.txt")
        else:
            deadline = time.monotonic() + TIMEOUT
            while last_step(work_dir / "run") < before["step"] + steps and time.monotonic() < deadline:
                if any(process.exitcode for process in processes):
                    raise RuntimeError(f"The training ended: {(work_dir / 'log.txt').read_text()[-3000:]}")
                time.sleep(0.01)
            kill(processes, processes)
        state = read_state(find_checkpoints(work_dir / "run")[-1])
        num_steps = state["step"] - before["step"]
        cells = [
            [
                int(cell)
                for line in (seen / f"{rank}.txt").read_text().splitlines()[:num_steps]
                for cell in line.split()
            ]
            for rank in range(number)
        ]
        num_cells = len(json.loads((work_dir / "run" / "split.json").read_text())["train"])
        order = CellOrder(np.array([num_cells]), 0)[slice(before["num_seen"], state["num_seen"])]
        saw = Counter(cell for one in cells for cell in one)
        counts.update(saw)
        runs.append(
            {
                "processes": number,
                "steps": num_steps,
                "cells": sum(saw.values()),
                "those_of_the_order": saw == Counter(order.tolist()),
                "same_number_on_every_process": len({len(one) for one in cells}) == 1,
            }
        )
        before = state
    times = Counter(counts.get(cell, 0) for cell in range(num_cells))
    return {"runs": runs, "epochs": before["num_seen"] / num_cells, "cells_by_times_seen": dict(sorted(times.items()))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_processes", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--elastic", type=int, nargs="+", help="Numbers of processes to go on with, in place of the other flags."
    )
    parser.add_argument("--output", type=Path, required=True, help="The .json file.")
    args = parser.parse_args()
    command = f"python benchmarks/kill.py --num_processes {args.num_processes} --kills {args.kills} --seed {args.seed}"
    with tempfile.TemporaryDirectory() as work_dir:
        if args.elastic:
            command = f"python benchmarks/kill.py --elastic {' '.join(map(str, args.elastic))}"
            result = measure_elastic(Path(work_dir), args.elastic)
        else:
            result = measure(Path(work_dir), args.num_processes, args.kills, args.seed)
    args.output.write_text(json.dumps({"command": command, **result}, indent=1) + "\n")
    print({name: value for name, value in result.items() if name != "kills"})


if __name__ == "__main__":
    main()
