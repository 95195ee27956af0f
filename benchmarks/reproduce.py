"""The paper's experiment repeated: White-Box DiT against DiT on each dataset in the paper's setting, and our default.

    python benchmarks/reproduce.py --dataset all --budget_minutes 65 --device cpu
    python benchmarks/reproduce.py --table lab/results/reproduction_cpu.json

and the two networks alone, for as long as it takes their losses to stand still:

    python benchmarks/reproduce.py --dataset kang_ifnb_pbmc --models White-Box DiT --num_seeds 1 --train_minutes 25 \\
        --device cpu --output lab/results/reproduction_long_cpu.json --work_dir outputs/reproduction_long
    python benchmarks/reproduce.py --dataset hnscc_puram_chetah_subset_log --models White-Box DiT --num_seeds 1 \\
        --train_minutes 8 --device cpu --output lab/results/reproduction_long_cpu.json \\
        --work_dir outputs/reproduction_long

Every model of a dataset sees the same training cells for the same minutes, into which the budget is divided; our
default is trained once, for as long as the White-Box network's seeds together. The paper's setting is the shipped
configuration `paper`: log1p(CP10k) of 2,000 genes, no conditions, batches of 16, learning rate 1e-4,
ε-prediction. On a GPU the networks have the published shape; on a CPU that would be a few epochs, so they are smaller
unless told otherwise (`--shape`). What is done is not done again: the same command goes on after an interruption,
in the middle of a training too, at its last checkpoint. What the layers of a network do is measured at the end of its
first seed. All cells are judged on one log scale, so that the paper's, which are no counts, can be judged at all.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from diffusers.utils.logging import disable_progress_bar
from quality import machine
from reproduce_report import DEFAULT, DIT, FIGURE_STEPS, LARGE, WHITE_BOX, figures, tables
from scipy import sparse
from speed import PUBLISHED, closest_depth, forward_flop, peak_memory

from wbdit_diffusers import ProgramCodec, ScRNAGenerationPipeline, WhiteBoxDiTModel
from wbdit_diffusers.data import CellSplit, drop_empty_cells, read_cells
from wbdit_diffusers.evaluation import evaluate_cells
from wbdit_diffusers.interpretation.layers import LAYER_TIMESTEPS, measure_layers
from wbdit_diffusers.processing.normalize import log_normalize
from wbdit_diffusers.training import config_from_args, train


ROOT = Path(__file__).parents[1]
DATASETS = [
    "pbmc3k",
    "zheng_facs_pbmc",
    "kang_ifnb_pbmc",
    "pancreas_endocrinogenesis",
    "paul15",
    "pollen_smartseq",
    "hnscc_puram_chetah_subset_log",
]
MODELS = [DEFAULT, WHITE_BOX, DIT, LARGE]
SHAPES = {"full": PUBLISHED, "small": {"patch_size": 40, "num_attention_heads": 4, "attention_head_dim": 24}}
DEPTH, NUM_GENES, BATCH_SIZE = 3, 2000, 16


def flags_of(shape: dict[str, int]) -> list[str]:
    return [str(part) for name, value in shape.items() for part in (f"--{name}", value)]


@functools.cache
def networks(shape_name: str) -> dict[str, dict]:
    """Configuration, parameters and FLOP of a training step (three forward passes) of the paper's networks."""
    shape = SHAPES[shape_name]
    inputs = torch.randn(BATCH_SIZE, NUM_GENES), torch.randint(1, 1000, (BATCH_SIZE,))
    plain = WhiteBoxDiTModel(sample_size=NUM_GENES, num_layers=DEPTH, block_type="dit", **shape)
    depth = closest_depth(plain.num_parameters(), lambda model: model.num_parameters(), **shape)
    choices = {
        WHITE_BOX: {"num_layers": DEPTH, "block_type": "white_box"},
        DIT: {"num_layers": DEPTH, "block_type": "dit"},
        LARGE: {"num_layers": depth, "block_type": "white_box"},
    }
    rows = {}
    for name, choice in choices.items():
        model = WhiteBoxDiTModel(sample_size=NUM_GENES, **shape, **choice)
        rows[name] = {
            "parameters": model.num_parameters(),
            "flop_per_step": 3 * forward_flop(model, inputs),
            "model": choice,
        }
    return rows


def steps_within(seconds: float, model: WhiteBoxDiTModel, device: str) -> int:
    """How many training steps fit, roughly: only the number of checkpoints hangs on it."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    durations = []
    for _ in range(8):
        start = time.perf_counter()
        x = torch.randn(BATCH_SIZE, NUM_GENES, device=device)
        model(x, torch.randint(1, 1000, (BATCH_SIZE,), device=device)).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - start)
    return int(seconds / statistics.median(durations))


class Dataset:
    """One dataset: its split, and real cells on the log scale on which all are judged."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.name, self.args = name, args
        self.values = config_from_args(["--config", name, "--output_dir", name]).values
        self.path = args.data_dir / f"{name}.h5ad"
        self.folder = args.work_dir / name
        self.folder.mkdir(parents=True, exist_ok=True)
        adata = drop_empty_cells(read_cells(self.path))
        split = CellSplit.draw(adata, label_key="cell_type", seed=0)
        split.save(self.folder)
        as_read = split.apply(adata)[1]
        if self.values == "counts":
            as_read = as_read.copy()
            # Over all genes, before some are chosen: as the networks see it
            adata.X = log_normalize(adata.X, np.asarray(adata.X.sum(axis=1)).ravel())
        self.train, test = split.apply(adata)
        # Few cells, for 1,000 steps on a CPU
        chosen = np.sort(np.random.default_rng(0).permutation(test.n_obs)[: args.max_cells])
        self.test, self.test_as_read = test[chosen], as_read[chosen]
        self.steps_per_epoch = max(1, self.train.n_obs // BATCH_SIZE)

    def flags(self, model: str, seed: int, minutes: float) -> list[str]:
        """Of the training."""
        configs, flags = [self.name], []
        validation_steps, checkpointing_steps = 200, 10**9
        if model != DEFAULT:
            configs.append("paper")
            network = SHAPES[self.args.shape] | networks(self.args.shape)[model]["model"]
            flags += [*flags_of(network), "--values", self.values]
            path = self.folder / f"{model}, seed {seed}.steps"  # a run that is gone on with has the same intervals
            if not path.exists():
                denoiser = WhiteBoxDiTModel(sample_size=NUM_GENES, **network)
                path.write_text(str(steps_within(60 * minutes, denoiser, self.args.device)))
            steps = int(path.read_text())
            epochs = steps / self.steps_per_epoch
            validation_steps = max(1, round(epochs / 16)) * self.steps_per_epoch
            if seed == 0 and model != LARGE:
                checkpointing_steps = max(1, round(epochs / 8)) * self.steps_per_epoch
        flags += ["--config", *configs, "--dataset", self.path, "--split", self.folder / CellSplit.FILE_NAME]
        flags += ["--output_dir", self.folder / f"{model}, seed {seed}", "--seed", seed, "--num_genes", NUM_GENES]
        flags += ["--max_train_steps", 10**9, "--max_train_epochs", 10**9, "--max_train_minutes", minutes]
        flags += ["--validation_steps", validation_steps, "--checkpointing_steps", checkpointing_steps]
        flags += ["--resume_from_checkpoint", "latest"]  # of an interrupted training
        return [str(flag) for flag in flags]

    def train_model(self, model: str, seed: int, minutes: float) -> dict:
        """Trains; returns log and peak memory: of a process of its own, or what was allocated on the GPU."""
        flags = self.flags(model, seed, minutes)
        folder = self.folder / f"{model}, seed {seed}"
        if self.args.device == "cpu":
            command = [sys.executable, "-m", "wbdit_diffusers.training", *flags]
            peak = peak_memory(command, os.environ | {"ACCELERATE_USE_CPU": "true"})
        else:
            torch.cuda.reset_peak_memory_stats()
            train(None, config_from_args(flags))
            peak = torch.cuda.max_memory_allocated()
        log = pd.read_csv(folder / "training_log.csv")
        epochs = log["step"] / self.steps_per_epoch if model != DEFAULT else log["epoch"]
        return {
            "minutes": minutes,
            "steps": int(log["step"].iloc[-1]),
            "epochs": float(epochs.iloc[-1]),
            "seconds_per_epoch": float(log["seconds"].iloc[-1] / max(epochs.iloc[-1], 1e-9)),
            "peak_memory_mib": peak / 2**20,
            "log": {
                "epoch": [round(value, 3) for value in epochs],
                "seconds": log["seconds"].tolist(),
                "loss": log["loss"].tolist(),
                "validation_loss": log["validation_loss"].tolist(),
            },
        }

    def checkpoints(self, model: str) -> dict[int, Path]:
        """After 1, 2, 4, … intervals: by epoch. An interruption leaves a checkpoint between them."""
        folder = self.folder / f"{model}, seed 0"
        steps = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
        interval = json.loads((folder / "run.json").read_text())["config"]["checkpointing_steps"]
        chosen = [interval * 2**i for i in range(20) if interval * 2**i in steps]
        return {
            step // self.steps_per_epoch: self.folder / f"{model}, seed 0" / f"checkpoint-{step}" for step in chosen
        }

    def sample(
        self,
        model: str,
        seed: int,
        num_inference_steps: int,
        dtype: torch.dtype = torch.float32,
        times: int = 1,
        checkpoint: Path | None = None,
    ) -> ad.AnnData:
        """As many cells as are judged, on the log scale; of the judged cells' labels where the model has labels."""
        pipe = ScRNAGenerationPipeline.from_pretrained(
            self.folder / f"{model}, seed {seed if model != DEFAULT else 0}"
        )
        pipe.set_progress_bar_config(disable=True)
        if model != DEFAULT:  # the authors' sampler takes every n-th step from 0 up
            pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
        if checkpoint is not None:
            EMAModel.from_pretrained(checkpoint / "ema", WhiteBoxDiTModel).copy_to(pipe.denoiser.parameters())
        pipe.to(self.args.device, dtype)
        kwargs = {
            "num_cells": times * self.test.n_obs,
            "num_inference_steps": num_inference_steps,
            "generator": torch.Generator().manual_seed(seed),
        }
        # In another order than the judged cells: the paper's KL divergence pairs them row by row.
        order = np.random.default_rng(seed).permutation(times * self.test.n_obs) % self.test.n_obs
        labels = self.test.obs[pipe.processor.label_keys].astype(str).iloc[order]
        kwargs["conditions"] = {key: labels[key].tolist() for key in labels}
        if isinstance(pipe.codec, ProgramCodec):
            cells = pipe(**kwargs).cells
            x = log_normalize(cells.X, cells.obs["library_size"].to_numpy())
        else:
            x = sparse.csr_matrix(pipe(output_type="np", **kwargs).cells, dtype=np.float32)
        obs = labels.set_axis([f"cell_{i}" for i in range(len(labels))])
        return ad.AnnData(x, obs=obs, var=pd.DataFrame(index=pipe.processor.var_names))

    def layers(self, model: str) -> dict:
        """What attention and ISTA of the first seed do to held-out cells, over layers and timesteps."""
        pipe = ScRNAGenerationPipeline.from_pretrained(self.folder / f"{model}, seed 0")
        latents = pipe.encode_cells(self.test_as_read)
        rows = measure_layers(pipe.denoiser, pipe.scheduler, latents, None, LAYER_TIMESTEPS)
        return {"rows": rows}

    def judge(self, samples: list[ad.AnnData]) -> dict:
        """Metrics of the samples and of the real reference, matched by the labels that the model has."""
        label_keys = list(samples[0].obs) or ["cell_type"]
        return evaluate_cells(samples, self.train, self.test, label_keys, values="log", parity=True)["metrics"]


def reproduce(name: str, entry: dict, minutes: float, args: argparse.Namespace, save: Callable[[], None]):
    """One dataset: trains, samples and judges what `entry` does not have yet."""
    data = Dataset(name, args)
    if "num_train" not in entry:
        entry |= {"num_train": data.train.n_obs, "num_judged": data.test.n_obs, "values": data.values, "models": {}}

    def record(model: str, part: str, key: str, function: Callable[..., dict], *arguments):
        parts = entry["models"].setdefault(model, {}).setdefault(part, {})
        if key not in parts:
            start = time.monotonic()
            parts[key] = function(*arguments)
            save()
            print(f"{name} | {model} | {part} {key} | {time.monotonic() - start:.0f} s", flush=True)

    def judge_steps(model: str, steps: int, num_seeds: int, dtype: torch.dtype = torch.float32) -> dict:
        samples = [data.sample(model, seed, steps, dtype) for seed in range(num_seeds)]
        if dtype == torch.float32:  # for the figures
            samples[0].write_h5ad(data.folder / f"{model}, {steps} steps.h5ad", compression="gzip")
        metrics = data.judge(samples)
        generated = metrics.pop("generated")
        entry.setdefault("floors", metrics)  # what real cells reach
        return generated

    def judge_checkpoint(model: str, epoch: int, checkpoint: Path) -> dict:
        sample = data.sample(model, 0, FIGURE_STEPS, checkpoint=checkpoint)
        sample.write_h5ad(data.folder / f"{model}, epoch {epoch}.h5ad", compression="gzip")
        return data.judge([sample])["generated"]

    # Turn by turn, so that a slower hour of the machine meets both
    for seed in range(args.num_seeds):
        for model in (WHITE_BOX, DIT):
            record(model, "runs", str(seed), data.train_model, model, seed, minutes)
    if LARGE in args.models:
        record(LARGE, "runs", "0", data.train_model, LARGE, 0, minutes)
    if DEFAULT in args.models:
        record(DEFAULT, "runs", "0", data.train_model, DEFAULT, 0, minutes * args.num_seeds)

    for model in args.models:
        record(model, "samplers", "20", judge_steps, model, 20, 1 if model == LARGE else args.num_seeds)
    for model in (WHITE_BOX, DIT):
        record(model, "layers", "0", data.layers, model)
        for epoch, checkpoint in data.checkpoints(model).items():
            record(model, "epochs", str(epoch), judge_checkpoint, model, epoch, checkpoint)
    for model in (WHITE_BOX, DIT):
        for steps in (100, 1000):
            record(model, "samplers", str(steps), judge_steps, model, steps, 1)
        record(model, "samplers", "20, bfloat16", judge_steps, model, 20, 1, torch.bfloat16)
    for model in args.models:
        path = data.folder / f"{model}, five times.h5ad"
        if model != LARGE and not path.exists():
            partial = path.with_suffix(".partial")
            steps = 20 if model == DEFAULT else FIGURE_STEPS
            data.sample(model, 0, steps, times=5).write_h5ad(partial, compression="gzip")
            partial.replace(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", default=["all"], choices=["all", *DATASETS, "hnscc"], metavar="NAME")
    parser.add_argument(
        "--data_dir",
        type=Path,
        default=ROOT.parent / "shared" / "data",
        help="Folder of NAME.h5ad, as `wbdit fetch` writes them.",
    )
    parser.add_argument(
        "--budget_minutes", type=float, default=65, help="For all of it; a little less than half is training."
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="Of the paper's networks: small on a CPU by default.")
    parser.add_argument("--train_minutes", type=float, help="Of each training, in place of a share of the budget.")
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL", help="Only some.")
    parser.add_argument("--max_cells", type=int, help="Held-out cells to judge on: 200 on a CPU, 5,000 on a GPU.")
    parser.add_argument("--output", type=Path, help="JSON; outputs/reproduction_DEVICE.json by default.")
    parser.add_argument("--work_dir", type=Path, help="Models and samples; beside the JSON by default.")
    parser.add_argument("--figure_dir", type=Path, help="In --work_dir by default.")
    parser.add_argument("--table", type=Path, help="Print the tables of a JSON file, and nothing else.")
    parser.add_argument("--figures", action="store_true", help="Draw the figures again, and nothing else.")
    args = parser.parse_args()
    if args.table is not None:
        print(tables(json.loads(args.table.read_text())))
        return
    disable_progress_bar()
    on_cpu = args.device == "cpu"
    args.shape = args.shape or ("small" if on_cpu else "full")
    args.max_cells = args.max_cells or (200 if on_cpu else 5000)
    args.output = args.output or ROOT / "outputs" / f"reproduction_{args.device}.json"
    args.work_dir = args.work_dir or args.output.with_suffix("")
    args.figure_dir = args.figure_dir or args.work_dir
    names = DATASETS if "all" in args.dataset else args.dataset

    if not {WHITE_BOX, DIT} <= set(args.models):
        parser.error("--models are compared with each other: White-Box and DiT are among them.")
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    # On two cores, more than half of the time goes into sampling and judging.
    share = 0.45 * args.budget_minutes / len(names) / (3 * args.num_seeds + 1)
    minutes = share if args.train_minutes is None else args.train_minutes
    settings = {
        "shape": args.shape,
        "device": args.device,
        "num_seeds": args.num_seeds,
        "max_cells": args.max_cells,
    }
    begun = {key: value for key, value in results.setdefault("settings", settings).items() if key in settings}
    if begun != settings and not args.figures:
        parser.error(
            f"{args.output} was begun with {results['settings']}, not {settings}: give the same flags, or another"
            " --output."
        )
    results["machine"] = machine()
    results["networks"] = networks(args.shape)
    datasets = results.setdefault("datasets", {})

    def save():
        args.output.parent.mkdir(parents=True, exist_ok=True)
        partial = args.output.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1))
        partial.replace(args.output)

    if not args.figures:
        for name in names:
            start = time.monotonic()
            entry = datasets.setdefault(name, {})
            if entry.setdefault("minutes", minutes) != minutes:
                parser.error(f"{name} was begun with {entry['minutes']:g} minutes for each model, not {minutes:g}.")
            reproduce(name, entry, minutes, args, save)
            entry.setdefault("seconds", time.monotonic() - start)
            save()
    figures(results, {name: Dataset(name, args) for name in datasets}, args.figure_dir)
    print(tables(results))


if __name__ == "__main__":
    main()
