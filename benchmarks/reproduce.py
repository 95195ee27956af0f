"""Repeats the paper's experiment: White-Box DiT, DiT and our default on each dataset, in the paper's setting.

    python benchmarks/reproduce.py --dataset all --budget_minutes 65 --device cpu
    python benchmarks/reproduce.py --table lab/results/reproduction_cpu.json

These commands train the two networks alone, until their losses no longer fall:

    python benchmarks/reproduce.py --dataset kang_ifnb_pbmc --models White-Box DiT --num_seeds 1 --train_minutes 25 \\
        --device cpu --output lab/results/reproduction_long_cpu.json --work_dir outputs/reproduction_long
    python benchmarks/reproduce.py --dataset hnscc_puram_chetah_subset_log --models White-Box DiT --num_seeds 1 \\
        --train_minutes 8 --device cpu --output lab/results/reproduction_long_cpu.json \\
        --work_dir outputs/reproduction_long

All models of a dataset get the same training cells and the same minutes, an equal part of the budget. Our default is
trained once, for as long as the White-Box network's seeds together. The paper's setting is the shipped config `paper`:
log1p(CP10k) of 2,000 genes, no conditions, batches of 16, learning rate 1e-4, ε-prediction. On a GPU the networks have
the published shape. On a CPU that would be a few epochs, so they are smaller by default (`--shape`). The same command
continues after an interruption, from the last checkpoint of a training. The layers of a network are measured at the
end of its first seed. All cells are judged on one log scale, because those of the paper are not counts.
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
from common import drop_empty_cells, read_results, write_results
from diffusers import DDPMScheduler
from diffusers.utils.logging import disable_progress_bar
from quality import CONFIGS, machine
from reproduce_report import DEFAULT, DIT, FIGURE_STEPS, LARGE, WHITE_BOX, figures, tables
from safetensors.torch import load_file
from scipy import sparse
from scipy.spatial.distance import pdist
from scipy.special import softmax
from scipy.stats import entropy, wasserstein_distance
from speed import DEPTH, NUM_GENES, PUBLISHED, closest_depth, forward_flop, paper_network, peak_memory

from wbdit_diffusers import ProgramCodec, ScRNAGenerationPipeline, WhiteBoxDiTModel
from wbdit_diffusers.data import CellSplit, read_cells
from wbdit_diffusers.evaluation import evaluate_cells
from wbdit_diffusers.evaluation.cells import combined_labels
from wbdit_diffusers.evaluation.metrics import mmd2
from wbdit_diffusers.evaluation.report import judged_genes
from wbdit_diffusers.evaluation.samples import draw_matching, split_halves
from wbdit_diffusers.files import write_whole
from wbdit_diffusers.interpretation.layers import LAYER_TIMESTEPS, measure_layers
from wbdit_diffusers.processing.normalize import log_normalize
from wbdit_diffusers.training import TrainingConfig, train
from wbdit_diffusers.training.config import read_config


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
BATCH_SIZE = 16


@functools.cache
def networks(shape_name: str) -> dict[str, dict]:
    """Configuration, parameters and FLOP of a training step (three forward passes) of the paper's networks."""
    shape = SHAPES[shape_name]
    inputs = torch.randn(BATCH_SIZE, NUM_GENES), torch.randint(1, 1000, (BATCH_SIZE,))
    plain = paper_network(block_type="dit", **shape)
    depth = closest_depth(plain.num_parameters(), lambda model: model.num_parameters(), **shape)
    rows = {}
    for name, num_layers, block_type in (
        (WHITE_BOX, DEPTH, "white_box"),
        (DIT, DEPTH, "dit"),
        (LARGE, depth, "white_box"),
    ):
        model = paper_network(num_layers, block_type, **shape)
        rows[name] = {
            "parameters": model.num_parameters(),
            "flop_per_step": 3 * forward_flop(model, inputs),
            "model": {"num_layers": num_layers, "block_type": block_type},
        }
    return rows


def steps_within(seconds: float, model: WhiteBoxDiTModel, device: str) -> int:
    """Rough number of training steps that fit. It only sets the number of checkpoints."""
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


def paper_metrics(real: np.ndarray, generated: np.ndarray) -> dict[str, float]:
    """The metrics of arXiv 2411.06785. They pair unrelated cells or mix all values, which rewards collapse."""
    blocks = [slice(start, start + 20) for start in range(0, real.shape[1], 20)]
    # The bandwidth, a median distance, is 0 if over half of the cells express none of the 20 genes.
    blocks = [block for block in blocks if np.median(pdist(real[:, block])) > 0]
    return {
        "paper_kl": float(entropy(softmax(real, axis=1), softmax(generated, axis=1), axis=1).mean()),
        "paper_wasserstein": float(wasserstein_distance(real.ravel(), generated.ravel())),
        "paper_mmd": float(np.mean([mmd2(real[:, block], generated[:, block]) for block in blocks] or [np.nan])),
    }


class Dataset:
    """One dataset: its split, and its real cells on the log scale on which all cells are judged."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.name, self.args = name, args
        self.values = CONFIGS[name].get("values", "counts")
        self.path = args.data_dir / f"{name}.h5ad"
        self.folder = args.work_dir / name
        self.folder.mkdir(parents=True, exist_ok=True)
        adata = drop_empty_cells(read_cells(self.path))
        split = CellSplit.draw(adata, label_key="cell_type", seed=0)
        split.save(self.folder)
        as_read = split.apply(adata)[1]
        if self.values == "counts":
            as_read = as_read.copy()
            # Over all genes, before some are chosen, as the networks see the cells
            adata.X = log_normalize(adata.X, np.asarray(adata.X.sum(axis=1)).ravel())
        self.train, test = split.apply(adata)
        # Few cells: 1,000 steps take long on a CPU
        chosen = np.sort(np.random.default_rng(0).permutation(test.n_obs)[: args.max_cells])
        self.test, self.test_as_read = test[chosen], as_read[chosen]
        self.steps_per_epoch = max(1, self.train.n_obs // BATCH_SIZE)

    def settings(self, model: str, seed: int, minutes: float) -> dict:
        """Fields of the training's config."""
        settings = CONFIGS[self.name]
        validation_steps, checkpointing_steps = 200, 10**9
        if model != DEFAULT:
            network = SHAPES[self.args.shape] | networks(self.args.shape)[model]["model"]
            settings = read_config("paper") | network | {"values": self.values}
            path = self.folder / f"{model}, seed {seed}.steps"  # a resumed run keeps its intervals
            if not path.exists():
                denoiser = WhiteBoxDiTModel(sample_size=NUM_GENES, **network)
                path.write_text(str(steps_within(60 * minutes, denoiser, self.args.device)))
            epochs = int(path.read_text()) / self.steps_per_epoch
            validation_steps = max(1, round(epochs / 16)) * self.steps_per_epoch
            if seed == 0 and model != LARGE:
                checkpointing_steps = max(1, round(epochs / 8)) * self.steps_per_epoch
        return settings | {
            "dataset": str(self.path),
            "split": self.folder / CellSplit.FILE_NAME,
            "output_dir": self.folder / f"{model}, seed {seed}",
            "seed": seed,
            "num_genes": NUM_GENES,
            "max_train_steps": 10**9,
            "max_train_epochs": 10**9,
            "max_train_minutes": minutes,
            "validation_steps": validation_steps,
            "checkpointing_steps": checkpointing_steps,
            "resume_from_checkpoint": "latest",
        }

    def train_model(self, model: str, seed: int, minutes: float) -> dict:
        """Trains. Returns the log and the peak memory: of a process of its own, or allocated on the GPU."""
        settings, folder = self.settings(model, seed, minutes), self.folder / f"{model}, seed {seed}"
        if self.args.device == "cpu":
            code = f"from common import train_from_json; train_from_json({json.dumps(settings, default=str)!r})"
            paths = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(sys.path)}
            peak = peak_memory([sys.executable, "-c", code], os.environ | paths)
        else:
            torch.cuda.reset_peak_memory_stats()
            train(None, TrainingConfig(**settings))
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
        """Checkpoints after 1, 2, 4, … intervals, by epoch. Interruptions leave others between them."""
        folder = self.folder / f"{model}, seed 0"
        steps = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
        interval = json.loads((folder / "run.json").read_text())["config"]["checkpointing_steps"]
        chosen = [interval * 2**i for i in range(20) if interval * 2**i in steps]
        return {step // self.steps_per_epoch: folder / f"checkpoint-{step}" for step in chosen}

    def sample(
        self,
        model: str,
        seed: int,
        num_inference_steps: int,
        dtype: torch.dtype = torch.float32,
        times: int = 1,
        checkpoint: Path | None = None,
    ) -> ad.AnnData:
        """Generates the number of judged cells, on the log scale, with their labels if the model has labels."""
        pipe = ScRNAGenerationPipeline.from_pretrained(
            self.folder / f"{model}, seed {seed if model != DEFAULT else 0}"
        )
        pipe.set_progress_bar_config(disable=True)
        if model != DEFAULT:  # the authors' sampler takes every n-th step from 0 up
            pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
        if checkpoint is not None:
            averaged = load_file(checkpoint / "ema.safetensors")
            for i, parameter in enumerate(pipe.denoiser.parameters()):
                parameter.data.copy_(averaged[str(i)])
        pipe.to(self.args.device, dtype)
        kwargs = {
            "num_cells": times * self.test.n_obs,
            "num_inference_steps": num_inference_steps,
            "generator": torch.Generator().manual_seed(seed),
        }
        # In another order than the judged cells, because the paper's KL divergence pairs them row by row
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
        """Steps of attention and ISTA of the first seed on held-out cells, by layer and timestep."""
        pipe = ScRNAGenerationPipeline.from_pretrained(self.folder / f"{model}, seed 0")
        latents = pipe.encode_cells(self.test_as_read)
        rows = measure_layers(pipe.denoiser, pipe.scheduler, latents, None, LAYER_TIMESTEPS)
        return {"rows": rows}

    def judge(self, samples: list[ad.AnnData]) -> dict:
        """Metrics of the samples and of the real reference, matched by the labels of the model."""
        label_keys = list(samples[0].obs) or ["cell_type"]
        metrics = evaluate_cells(samples, self.train, self.test, label_keys, values="log")["metrics"]
        train, test = (adata[:, samples[0].var_names] for adata in (self.train, self.test))
        labels = [combined_labels(adata, label_keys) for adata in (train, test)]
        half, rngs = split_halves(labels[0])[1], [np.random.default_rng([0, i]) for i in range(len(samples))]
        drawn = {"generated": samples, "real reference": [train[draw_matching(*labels, rng, half)] for rng in rngs]}
        genes = judged_genes(train, test, "log", None)
        for name, columns in drawn.items():
            rows = [paper_metrics(*(x[:, genes].X.toarray() for x in (test, cells))) for cells in columns]
            metrics[name] |= {metric: [row[metric] for row in rows] for metric in rows[0]}
        return metrics


def reproduce(name: str, entry: dict, minutes: float, args: argparse.Namespace, save: Callable[[], None]):
    """Trains, samples and judges what `entry` of one dataset lacks."""
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
        entry.setdefault("floors", metrics)  # scores of real cells
        return generated

    def judge_checkpoint(model: str, epoch: int, checkpoint: Path) -> dict:
        sample = data.sample(model, 0, FIGURE_STEPS, checkpoint=checkpoint)
        sample.write_h5ad(data.folder / f"{model}, epoch {epoch}.h5ad", compression="gzip")
        return data.judge([sample])["generated"]

    # In turns, so that a slower hour of the machine affects both
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
            cells = data.sample(model, 0, 20 if model == DEFAULT else FIGURE_STEPS, times=5)
            write_whole(path, cells.write_h5ad)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", default=["all"], choices=["all", *DATASETS, "hnscc"], metavar="NAME")
    data_dir = ROOT.parent / "shared" / "data"
    parser.add_argument("--data_dir", type=Path, default=data_dir, help="Folder of NAME.h5ad.")
    parser.add_argument("--budget_minutes", type=float, default=65, help="Minutes for everything. 45%% is training.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="Shape of the networks. Default: small on a CPU.")
    parser.add_argument("--train_minutes", type=float, help="Minutes of each training, instead of --budget_minutes.")
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL")
    parser.add_argument("--max_cells", type=int, help="Cells to judge on. Default: 200 on a CPU, 5,000 on a GPU.")
    parser.add_argument("--output", type=Path, help="JSON file. Default: outputs/reproduction_DEVICE.json.")
    parser.add_argument("--work_dir", type=Path, help="Folder of models and samples. Default: next to the JSON file.")
    parser.add_argument("--figure_dir", type=Path, help="Default: --work_dir.")
    parser.add_argument("--table", type=Path, help="JSON file to print as tables. Nothing is measured.")
    parser.add_argument("--figures", action="store_true", help="Draw the figures again. Nothing is measured.")
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
        parser.error("--models must include White-Box and DiT, which are compared.")
    results = read_results(args.output, {})
    # Sampling and judging take more than half of the time on two cores.
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
            f"{args.output} has results with {results['settings']}, not {settings}. Use the same flags, or another"
            " --output."
        )
    results["machine"] = machine()
    results["networks"] = networks(args.shape)
    datasets = results.setdefault("datasets", {})

    def save():
        write_results(args.output, results)

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
