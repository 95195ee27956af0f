"""What an atlas costs: cells are prepared, read, trained on and generated, each stage in a process of its own.

    python benchmarks/scale.py --dataset pbmc3k.h5ad --num_cells 20000 60000 --output scale.json

The cells are real ones, drawn with replacement: two of them side by side make one of 20,000 genes. Beside every stage
stand its peak memory (of the process, as the system counts it) and its speed. What is written is deleted again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse


NUM_GENES = 20_000
CELLS_AT_ONCE = 4096


# ==================== Stages that are no command of the package ====================


def make(args: argparse.Namespace) -> dict:
    """The .h5ad file to begin with, written as its cells are drawn."""
    from wbdit_diffusers.data import write_cells

    real = ad.read_h5ad(args.dataset)
    counts = sparse.csr_matrix(real.X).astype(np.float32)
    others = NUM_GENES - counts.shape[1]
    if not 0 <= others <= counts.shape[1]:
        raise ValueError(f"{args.dataset} has {counts.shape[1]} genes: give {NUM_GENES // 2} to {NUM_GENES}.")
    names = [*real.var_names, *(f"{name}-2" for name in real.var_names[:others])]
    labels = pd.Categorical(real.obs[args.label_key].astype(str))
    rng = np.random.default_rng(0)

    def batches():
        for start in range(0, args.num_cells, CELLS_AT_ONCE):
            size = min(CELLS_AT_ONCE, args.num_cells - start)
            cells, second = rng.integers(real.n_obs, size=(2, size))
            yield ad.AnnData(
                sparse.hstack([counts[cells], counts[second][:, :others]], format="csr"),
                obs=pd.DataFrame(
                    {args.label_key: labels[cells]}, index=[f"cell_{i}" for i in range(start, start + size)]
                ),
                var=pd.DataFrame(index=names),
            )

    write_cells(args.output, batches())
    return {"cells": args.num_cells}


def read(args: argparse.Namespace) -> dict:
    """All training cells once, as CSR, and nothing done with them."""
    from wbdit_diffusers.data import PreparedCells

    source, values = PreparedCells(args.dataset), 0
    for group in range(len(source.groups)):
        values += source.read_group(group)[0].nnz
    cells = int(source.group_sizes.sum())
    return {"cells": cells, "values_per_cell": round(values / cells, 1)}


def train(args: argparse.Namespace) -> dict:
    """Both stages of a training."""
    from wbdit_diffusers.data import latents
    from wbdit_diffusers.training import TrainingConfig
    from wbdit_diffusers.training import train as run_training

    if args.max_cells_in_memory is not None:
        latents.MAX_CELLS_IN_MEMORY = args.max_cells_in_memory
    steps = {"num_programs": 16, "codec_max_steps": args.num_steps, "decoder_steps": args.num_steps}
    config = TrainingConfig(
        dataset=args.dataset,
        output_dir=args.output,
        label_keys=[args.label_key],
        max_train_steps=args.num_steps,
        **steps,
    )
    run_training(None, config)
    return {"cells": args.num_steps * config.train_batch_size}


STAGES = {"make": make, "read": read, "train": train}


# ==================== Each stage in its own process ====================


def measure(name: str, command: list[str]) -> dict:
    """Runs a command; its seconds, and its peak memory in MiB."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        output.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            raise RuntimeError(f"{name} failed: {errors.read()[-3000:]}")
        lines = output.read().strip().splitlines()
    result = {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mib": round(usage.ru_maxrss / 1024),
    }
    if lines and lines[-1].startswith("{"):
        result |= json.loads(lines[-1])
    return result


def scale(num_cells: int, args: argparse.Namespace, folder: Path) -> dict:
    stage = [sys.executable, __file__, "--label_key", args.label_key]
    wbdit = [sys.executable, "-m", "wbdit_diffusers.cli"]
    source, prepared, generated = folder / "cells.h5ad", folder / "prepared", folder / "generated.h5ad"
    models = {codec: folder / codec for codec in ("program", "expression")}
    of_model = ["--num_cells", str(args.num_generated or num_cells)]
    of_model += ["--num_inference_steps", str(args.num_inference_steps)]
    training = [*stage, "--stage", "train", "--dataset", prepared, "--num_steps", str(args.num_steps)]
    if args.max_cells_in_memory is not None:
        training += ["--max_cells_in_memory", str(args.max_cells_in_memory)]
    commands = {
        "make": [*stage, "--stage", "make", "--dataset", args.dataset, "--num_cells", str(num_cells)]
        + ["--output", source],
        "prepare": [*wbdit, "prepare", source, "--output", prepared, "--label_keys", args.label_key],
        "read": [*stage, "--stage", "read", "--dataset", prepared],
        "train": [*training, "--codec", "program", "--output", models["program"]],
        "train in expression space": [*training, "--codec", "expression", "--output", models["expression"]],
        "generate": [*wbdit, "generate", models["program"], *of_model, "--output", generated],
    }
    results: dict[str, dict] = {}
    for name, command in commands.items():
        results[name] = measure(name, [str(argument) for argument in command])
        cells = {"prepare": num_cells, "generate": args.num_generated or num_cells}.get(name) or results[name]["cells"]
        results[name]["cells_per_second"] = round(cells / results[name]["seconds"])
        print(f"{num_cells:>9,} cells, {name}: {json.dumps(results[name])}", flush=True)
        if name == "prepare":
            size = sum(path.stat().st_size for path in prepared.rglob("*") if path.is_file())
            results[name] |= {"gigabytes": round(size / 1e9, 3)}
            results["make"]["gigabytes"] = round(source.stat().st_size / 1e9, 3)
            source.unlink()
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="Real cells with 10,000 to 20,000 genes.")
    parser.add_argument("--label_key", default="cell_type")
    parser.add_argument("--num_cells", type=int, nargs="+", default=[20_000, 60_000, 1_000_000])
    parser.add_argument("--num_steps", type=int, default=300, help="Of each stage of a training.")
    parser.add_argument("--num_inference_steps", type=int, default=5, help="Of generation.")
    parser.add_argument("--num_generated", type=int, help="Cells to generate; as many as there are by default.")
    parser.add_argument("--max_cells_in_memory", type=int, help="Above which a training streams; 100,000 by default.")
    parser.add_argument("--folder", type=Path, help="Where to make a temporary folder: 20 GB for 1,000,000 cells.")
    parser.add_argument("--output", type=Path, help="The JSON file to write.")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--codec", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage is not None:
        args.num_cells = args.num_cells[0]
        print(json.dumps(STAGES[args.stage](args)))
        return
    results = json.loads(args.output.read_text()) if args.output is not None and args.output.is_file() else {}
    for num_cells in args.num_cells:
        with tempfile.TemporaryDirectory(prefix="wbdit-scale-", dir=args.folder) as folder:
            results[str(num_cells)] = scale(num_cells, args, Path(folder))
        if args.output is not None:
            args.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
