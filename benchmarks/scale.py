"""Measures what an atlas costs: preparing, reading, training and generating, each in a process of its own.

    python benchmarks/scale.py --dataset pbmc3k.h5ad --num_cells 20000 60000 --output scale.json

The cells are real ones, drawn with replacement: two of them are joined to one of 20,000 genes. Reported are the peak
memory and the speed of each stage. All files are deleted at the end.
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
from common import read_results, write_results
from scipy import sparse


NUM_GENES = 20_000
CELLS_AT_ONCE = 4096


def make(args: argparse.Namespace):
    """Writes the .h5ad file to begin with, batch by batch."""
    from wbdit_diffusers.data import write_cells

    real = ad.read_h5ad(args.dataset)
    counts = sparse.csr_matrix(real.X).astype(np.float32)
    others = NUM_GENES - counts.shape[1]
    names = [*real.var_names, *(f"{name}-2" for name in real.var_names[:others])]
    labels = pd.Categorical(real.obs[args.label_key].astype(str))
    rng = np.random.default_rng(0)

    def batches():
        for start in range(0, args.num_cells[0], CELLS_AT_ONCE):
            size = min(CELLS_AT_ONCE, args.num_cells[0] - start)
            cells, second = rng.integers(real.n_obs, size=(2, size))
            index = [f"cell_{i}" for i in range(start, start + size)]
            yield ad.AnnData(
                sparse.hstack([counts[cells], counts[second][:, :others]], format="csr"),
                obs=pd.DataFrame({args.label_key: labels[cells]}, index=index),
                var=pd.DataFrame(index=names),
            )

    write_cells(args.output, batches())


def read(args: argparse.Namespace):
    """Reads all training cells once."""
    from wbdit_diffusers.data import PreparedCells

    source = PreparedCells(args.dataset)
    for group in range(len(source.group_sizes)):
        source.read_group(group)


STAGES = {"make": make, "read": read}  # which are no command of the package


def measure(name: str, command: list[object]) -> dict:
    """Runs a command. Returns its seconds, and its peak memory in MiB."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([str(word) for word in command], stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        output.seek(0)
        if process.returncode != 0:
            raise RuntimeError(f"{name} failed: {output.read()[-3000:]}")
    cpu_seconds = round(usage.ru_utime + usage.ru_stime, 1)
    return {"seconds": round(seconds, 1), "cpu_seconds": cpu_seconds, "peak_mib": round(usage.ru_maxrss / 1024)}


def scale(num_cells: int, args: argparse.Namespace, folder: Path) -> dict:
    """The results of all stages for one number of cells."""
    stage = [sys.executable, __file__, "--label_key", args.label_key, "--stage"]
    wbdit = [sys.executable, "-m", "wbdit_diffusers.cli"]
    source, prepared, generated = folder / "cells.h5ad", folder / "prepared", folder / "generated.h5ad"
    num_generated, steps, model = args.num_generated or num_cells, args.num_steps, folder / "model"
    training = ["--dataset", prepared, "--label_keys", args.label_key, "--output_dir", model, "--num_programs", 16]
    training += ["--codec_max_steps", steps, "--decoder_steps", steps, "--max_train_steps", steps]
    generation = ["--num_cells", num_generated, "--num_inference_steps", args.num_inference_steps]
    commands = {
        "make": [*stage, "make", "--dataset", args.dataset, "--num_cells", num_cells, "--output", source],
        "prepare": [*wbdit, "prepare", source, "--output_dir", prepared, "--label_keys", args.label_key],
        "read": [*stage, "read", "--dataset", prepared],
        "train": [*wbdit, "train", *training],
        "generate": [*wbdit, "generate", model, *generation, "--output", generated],
    }
    results: dict[str, dict] = {}
    for name, command in commands.items():
        results[name] = measure(name, command)
        cells = num_generated if name == "generate" else num_cells
        results[name]["cells_per_second"] = round(cells / results[name]["seconds"])
        if name == "prepare":
            size = sum(path.stat().st_size for path in prepared.rglob("*") if path.is_file())
            results[name]["gigabytes"] = round(size / 1e9, 3)
            results["make"]["gigabytes"] = round(source.stat().st_size / 1e9, 3)
            source.unlink()
        print(f"{num_cells:>9,} cells, {name}: {json.dumps(results[name])}", flush=True)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="Real cells with 10,000 to 20,000 genes.")
    parser.add_argument("--label_key", default="cell_type")
    parser.add_argument("--num_cells", type=int, nargs="+", default=[20_000, 60_000, 1_000_000])
    parser.add_argument("--num_steps", type=int, default=300, help="Number of steps of each stage of the training.")
    parser.add_argument("--num_inference_steps", type=int, default=5, help="Number of denoising steps.")
    parser.add_argument("--num_generated", type=int, help="Number of cells to generate. Default: --num_cells.")
    parser.add_argument("--folder", type=Path, help="Place of the temporary folder: 20 GB for 1,000,000 cells.")
    parser.add_argument("--output", type=Path, help="JSON file to write.")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage is not None:
        STAGES[args.stage](args)
        return
    results = read_results(args.output, {}) if args.output is not None else {}
    for num_cells in args.num_cells:
        with tempfile.TemporaryDirectory(prefix="wbdit-scale-", dir=args.folder) as folder:
            results[str(num_cells)] = scale(num_cells, args, Path(folder))
        if args.output is not None:
            write_results(args.output, results)


if __name__ == "__main__":
    main()
