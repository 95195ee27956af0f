"""Times our network and pipeline next to the network as the paper writes it, or next to another checkout.

    python benchmarks/speed.py --output speed.json
    python benchmarks/speed.py --device cuda --batch_size 16 256 1024 --output speed.json
    python benchmarks/speed.py --against ../old-checkout --output lab/results/speed_narrow_cpu.json
    python benchmarks/speed.py --table lab/results/speed_narrow_cpu.json

`--against` compares this checkout with another one in CPU seconds: import, a training step, and 5,000 cells of the
pipeline in the package, beside the excess of each on held-out cells, by this checkout's judges. Fresh processes take
turns, and medians are compared. Without it, training steps and forward passes are timed at the paper's shape.
`reference` is benchmarks/reference.py in eager float32, as the authors run it. FLOP are those of the matrix products,
and their rate is given as a fraction of the fastest large matrix product of the same machine and dtype.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import markdown, read_results, write_results
from reference import ReferenceDiT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wbdit_diffusers import WhiteBoxDiTModel
from wbdit_diffusers.data import CellSplit, load_pbmc, read_cells
from wbdit_diffusers.evaluation import evaluate_cells


NUM_GENES, DEPTH = 2000, 3  # the paper's
PUBLISHED = {"patch_size": 10, "num_attention_heads": 8, "attention_head_dim": 96}

# Programs that print CPU seconds, for any version of the package
AGAINST = {
    "import": "import time; from wbdit_diffusers import ScRNAGenerationPipeline; print(time.process_time())",
    "a training step": """
import tempfile, time
from wbdit_diffusers.data import load_pbmc
from wbdit_diffusers.training import TrainingConfig, train
def seconds(steps):
    start, few = time.process_time(), dict(num_programs=16, codec_max_steps=5, decoder_steps=0, validation_steps=10**6)
    with tempfile.TemporaryDirectory() as folder:
        train(load_pbmc(), TrainingConfig(output_dir=folder, label_keys=["cell_type"], max_train_steps=steps, **few))
    return time.process_time() - start
seconds(5)
print((seconds(105) - seconds(5)) / 100)
""",
    **{
        f"5,000 cells, {name}": f"""
import time
from wbdit_diffusers import ScRNAGenerationPipeline
pipe = ScRNAGenerationPipeline.from_pretrained("pbmc68k_reduced")
pipe(num_cells=64)
start = time.process_time()
pipe(num_cells=5000, num_inference_steps={steps})
print(time.process_time() - start)
"""
        for name, steps in {"the default": None, "20 steps": 20, "10 steps": 10}.items()
    },
}
# A cell for each held-out cell, with its label
DRAW = """
import json, sys
from pathlib import Path
import torch, wbdit_diffusers
from wbdit_diffusers.data import load_pbmc
pipe = wbdit_diffusers.ScRNAGenerationPipeline.from_pretrained("pbmc68k_reduced")
split = Path(wbdit_diffusers.__file__).parent / "pretrained/pbmc68k_reduced/split.json"
labels = {"cell_type": load_pbmc()[json.loads(split.read_text())["test"]].obs["cell_type"].tolist()}
for seed in range(int(sys.argv[2])):
    cells = pipe(conditions=labels, generator=torch.Generator().manual_seed(seed)).cells
    cells.write_h5ad(Path(sys.argv[1], f"{seed}.h5ad"))
"""
SAMPLES = 6

# Otherwise glibc returns freed memory to the kernel. How often depends on chance, and costs up to a third of the time.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**30)}


def synchronize(device: str):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(function: Callable, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def peak_memory(command: list[object], environment: dict[str, str] | None = None) -> int:
    """
    Runs a command and returns the peak memory of its process in bytes (Linux only).

    Reads the kernel's high-water mark of the process until it ends. `resource.getrusage(RUSAGE_CHILDREN)` has only one
    peak for all children, and a child's peak starts at that of its parent.

    Raises:
        subprocess.CalledProcessError: If the command fails.
    """
    peak = 0
    with subprocess.Popen([str(part) for part in command], env=environment) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            marks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
            peak = max([peak, *(1024 * int(mark) for mark in marks)])  # an ending process has none
            time.sleep(0.02)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return peak


def take_turns(functions: dict[str, Callable], device: str, repeats: int, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each function. They alternate, so that a slower minute of the machine affects all of them."""
    for function in functions.values():
        for _ in range(warmup):
            function()
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(seconds_of(function, device))
    return {name: statistics.median(values) for name, values in seconds.items()}


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few large matrix products."""
    rates = []
    for size in (1024, 2048, 4096):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        best = min(seconds_of(lambda a=a, b=b: a @ b, device) for _ in range(5))
        rates.append(2 * size**3 / best)
    return max(rates)


def forward_flop(model: torch.nn.Module, inputs: tuple[torch.Tensor, torch.Tensor]) -> int:
    """FLOP of all matrix products, including those of the attention."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


def paper_network(depth: int = DEPTH, block_type: str = "white_box", **shape: int) -> WhiteBoxDiTModel:
    """A network of the paper, by default at the published shape."""
    return WhiteBoxDiTModel(sample_size=NUM_GENES, num_layers=depth, block_type=block_type, **PUBLISHED | shape)


def closest_depth(target: float, measure: Callable[[torch.nn.Module], float], **shape: int) -> int:
    """The depth at which the White-Box network comes closest to the plain DiT's size by some measure."""
    with torch.device("meta"):
        sizes = {depth: measure(paper_network(depth, **shape)) for depth in range(1, 13)}
    return min(sizes, key=lambda depth: abs(sizes[depth] - target))


def allocated_by(step: Callable) -> int:
    """Bytes that a step needs on the GPU in addition to networks, gradients and optimizers."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def time_network(device: str, batch_size: int, repeats: int) -> dict:
    """Training steps and forward passes of one batch size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, NUM_GENES, generator=generator).to(device)
    t = torch.randint(1, 1000, (batch_size,), generator=generator).to(device)
    noise = torch.randn(batch_size, NUM_GENES, generator=generator).to(device)
    plain = paper_network(block_type="dit")
    cpu_inputs = (x.cpu(), t.cpu())
    equal_parameters = closest_depth(plain.num_parameters(), lambda model: model.num_parameters())
    per_block = forward_flop(paper_network(1), cpu_inputs)
    per_block = forward_flop(paper_network(2), cpu_inputs) - per_block
    plain_flop = forward_flop(plain, cpu_inputs)
    white_box_flop = forward_flop(paper_network(), cpu_inputs)
    equal_flop = round(DEPTH + (plain_flop - white_box_flop) / per_block)

    def ours(block_type: str = "white_box", depth: int = DEPTH, compiled: bool = True) -> torch.nn.Module:
        model = paper_network(depth, block_type).to(device)
        if compiled:
            model.compile_repeated_blocks(fullgraph=True)
        return model

    # name: (network, dtype of autocast)
    bf16 = torch.bfloat16
    variants = {
        "reference": (ReferenceDiT().to(device), None),
        "ours, float32": (ours(compiled=False), None),
        "ours, bfloat16": (ours(compiled=False), bf16),
        "ours, bfloat16, compiled": (ours(), bf16),
        "DiT reference": (ReferenceDiT(block_type="dit").to(device), None),
        "DiT, bfloat16, compiled": (ours("dit"), bf16),
        f"ours, depth {equal_parameters}: the DiT's parameters": (ours(depth=equal_parameters), bf16),
        f"ours, depth {equal_flop}: the DiT's FLOP": (ours(depth=equal_flop), bf16),
    }
    peaks = {None: matmul_peak(device, torch.float32), bf16: matmul_peak(device, bf16)}

    steps, forwards, parameters, flop = {}, {}, {}, {}
    for name, (model, dtype) in variants.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=None if "reference" in name else True)
        autocast = torch.autocast(device, dtype) if dtype is not None else contextlib.nullcontext()
        parameters[name] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

        def predict(model=model, autocast=autocast) -> torch.Tensor:
            with autocast:
                output = model(x, t)
            return output if torch.is_tensor(output) else output.sample

        def step(predict=predict, optimizer=optimizer):
            loss = F.mse_loss(predict().float(), noise)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        steps[name], forwards[name] = step, torch.inference_mode()(predict)
    for name, (model, _) in variants.items():
        eager = model if "reference" in name else WhiteBoxDiTModel.from_config(model.config)
        flop[name] = forward_flop(eager.cpu(), cpu_inputs)
        model.to(device)

    times = {"training step": take_turns(steps, device, repeats), "forward": take_turns(forwards, device, repeats)}
    rows = {}
    for name, (_, dtype) in variants.items():
        rows[name] = {"parameters": parameters[name], "forward FLOP": flop[name]}
        for what, seconds in times.items():
            rate = flop[name] * (3 if what == "training step" else 1) / seconds[name]
            rows[name][what] = {
                "seconds": seconds[name],
                "cells/s": batch_size / seconds[name],
                "speed-up over reference": seconds["reference"] / seconds[name],
                "FLOP/s": rate,
                "share of matmul peak": rate / peaks[dtype],
            }
    rows["matmul peak, FLOP/s"] = {"float32": peaks[None], "bfloat16": peaks[bf16]}
    if device == "cuda":
        for name, step in steps.items():
            rows[name]["training step"]["peak memory beyond weights, MiB"] = allocated_by(step) / 2**20
    return rows


def compare_checkouts(other: Path, repeats: int) -> dict:
    """CPU seconds of this and another checkout, each on one thread, and the excess of their pipelines."""
    checkouts, rows = {"other checkout": other, "this checkout": Path(__file__).parents[1]}, {}
    environments = {
        name: os.environ | {"PYTHONPATH": str((path / "src").resolve()), "OMP_NUM_THREADS": "1"} | KEEP_MEMORY
        for name, path in checkouts.items()
    }
    for task, code in AGAINST.items():
        seconds = {name: [] for name in checkouts}
        for _ in range(repeats):
            for name, environment in environments.items():
                command = [sys.executable, "-c", code]
                finished = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                seconds[name].append(float(finished.stdout.split()[-1]))
        row = rows[task] = {name: statistics.median(values) for name, values in seconds.items()}
        row["ratio"] = row["this checkout"] / row["other checkout"]
    row = rows["excess (AUC) of the default pipeline"] = {}
    for name, environment in environments.items():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-c", DRAW, folder, str(SAMPLES)], env=environment, check=True)
            samples = [read_cells(Path(folder, f"{seed}.h5ad")) for seed in range(SAMPLES)]
        split = CellSplit.load(checkouts[name] / "src/wbdit_diffusers/pretrained/pbmc68k_reduced")
        report = evaluate_cells({name: samples}, *split.apply(load_pbmc()), label_key=["cell_type"])
        row[name] = report["excess"][name]["mean"]
        row[f"{name}, SD"] = report["excess"][name]["sd"]
    return rows


def table(results: dict) -> str:
    """All parts as Markdown."""

    def show(value: object) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    lines = [f"{results['device']}, torch {results['torch']}, {results['threads']} threads.", ""]
    for part, rows in results["parts"].items():
        flat = {}
        for name, values in rows.items():
            row = flat[name] = {}
            for key, value in (values if isinstance(values, dict) else {"": values}).items():
                for inner, number in value.items() if isinstance(value, dict) else [("", value)]:
                    row[f"{key}: {inner}" if inner else key] = show(number)
        columns = list(dict.fromkeys(key for row in flat.values() for key in row))
        rows_of_text = [[name, *(row.get(key, "") for key in columns)] for name, row in flat.items()]
        lines += [f"### {part}", "", markdown(["", *columns], rows_of_text), ""]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch_size", nargs="+", type=int, default=[16], help="Batch sizes of the network.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file. Parts are added to it.")
    parser.add_argument("--table", type=Path, help="JSON file to print as tables. Nothing is measured.")
    parser.add_argument("--against", type=Path, help="Another checkout of the repository to compare with.")
    args = parser.parse_args()
    if args.table is not None:
        print(table(json.loads(args.table.read_text())))
        return
    if args.output is None:
        parser.error("--output is required.")
    results = read_results(args.output, {"parts": {}})
    results["device"] = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    results["torch"], results["threads"] = torch.__version__, torch.get_num_threads()

    def keep(part: str, rows: dict):
        results["parts"][part] = rows
        write_results(args.output, results)
        print(table({**results, "parts": {part: rows}}), flush=True)

    if args.against is not None:
        keep("against another checkout, CPU seconds", compare_checkouts(args.against, args.repeats))
        return
    for batch_size in args.batch_size:
        keep(f"network, batch {batch_size}", time_network(args.device, batch_size, args.repeats))
        torch.compiler.reset()


if __name__ == "__main__":
    main()
