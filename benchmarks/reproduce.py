"""The paper's experiment repeated: White-Box DiT against DiT on each dataset in the paper's setting, and our default.

    python benchmarks/reproduce.py --dataset all --budget_minutes 65 --device cpu
    python benchmarks/reproduce.py --table outputs/reproduction_cpu.json

Every model of a dataset sees the same training cells for the same minutes, into which the budget is divided; our
default is trained once, for as long as the White-Box network's seeds together. The paper's setting is
training/configs/paper.yaml: log1p(CP10k) of 2,000 genes, no conditions, batches of 16, learning rate 1e-4,
ε-prediction. On a GPU the networks have the published shape; on a CPU that would be a few epochs, so they are smaller
unless told otherwise (`--shape`). What is done is not done again: the same command goes on after an interruption. All
cells are judged on one log scale, so that the paper's, which are no counts, can be judged at all.
"""

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import torch
import yaml
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from diffusers.utils.logging import disable_progress_bar
from quality import HEADLINE, machine
from scipy import sparse
from speed import PEAK_KIBIBYTES, closest_depth, forward_flop

from wbdit_diffusers import ScRNAGenerationPipeline, WhiteBoxDiTModel
from wbdit_diffusers.data import drop_empty_cells, read_cells, split_cells
from wbdit_diffusers.evaluation.report import FLOORS, evaluate_cells
from wbdit_diffusers.processing_scrna import TARGET_SUM


ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "training" / "configs"
DATASETS = [
    "pbmc3k",
    "zheng_facs_pbmc",
    "kang_ifnb_pbmc",
    "pancreas_endocrinogenesis",
    "paul15",
    "pollen_smartseq",
    "hnscc_puram_chetah_subset_log",
]
SHAPES = {"full": {}, "small": {"patch_size": 40, "num_attention_heads": 4, "attention_head_dim": 24}}
DEPTH, NUM_GENES, BATCH_SIZE = 3, 2000, 16
WHITE_BOX, DIT, LARGE, DEFAULT = "White-Box", "DiT", "White-Box, as large as the DiT", "our default"
METRICS = {
    metric: HEADLINE[metric]
    for metric in (
        *("rf_auc", "w2", "mmd2", "variance_ratio", "zero_fraction_error", "gene_correlation"),
        "nearest_training_cell",
    )
} | {
    "paper_kl": "paper KL",
    "paper_wasserstein": "paper W1",
    "paper_mmd": "paper MMD",
}
# train.py as its own process, which leaves its peak memory in a file
TRAIN = f"""
import runpy, sys, torch
path, sys.argv = sys.argv[1], sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
if torch.cuda.is_available():
    peak = torch.cuda.max_memory_allocated()
else:
    peak = 1024 * int({PEAK_KIBIBYTES})
open(path, "w").write(str(peak))
"""


def flags_of(shape: dict[str, int]) -> list[str]:
    return [str(part) for name, value in shape.items() for part in (f"--{name}", value)]


@functools.cache
def networks(shape_name: str) -> dict[str, dict]:
    """Configuration, parameters and FLOP of a training step (three forward passes) of the paper's networks."""
    shape = SHAPES[shape_name]
    inputs = torch.randn(BATCH_SIZE, NUM_GENES), torch.randint(1, 1000, (BATCH_SIZE,))
    plain = WhiteBoxDiTModel(num_genes=NUM_GENES, num_layers=DEPTH, block_type="dit", **shape)
    depth = closest_depth(plain.num_parameters(), lambda model: model.num_parameters(), **shape)
    choices = {
        WHITE_BOX: {"num_layers": DEPTH, "block_type": "white_box"},
        DIT: {"num_layers": DEPTH, "block_type": "dit"},
        LARGE: {"num_layers": depth, "block_type": "white_box"},
    }
    rows = {}
    for name, choice in choices.items():
        model = WhiteBoxDiTModel(num_genes=NUM_GENES, **shape, **choice)
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
        self.values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()).get("values", "counts")
        self.path = args.data_dir / f"{name}.h5ad"
        self.folder = args.work_dir / name
        self.folder.mkdir(parents=True, exist_ok=True)
        adata = drop_empty_cells(read_cells(self.path))
        train_cells, test_cells = split_cells(adata, label_key="cell_type", seed=0)
        self.split_path = self.folder / "split.json"
        names = {
            "seed": 0,
            "train": adata.obs_names[train_cells].tolist(),
            "test": adata.obs_names[test_cells].tolist(),
        }
        self.split_path.write_text(json.dumps(names))
        if self.values == "counts":
            # Over all genes, before some are chosen: as the networks see it
            sc.pp.normalize_total(adata, target_sum=TARGET_SUM)
            sc.pp.log1p(adata)
        self.train, test = adata[train_cells], adata[test_cells]
        # Labels that no training cell has can't be asked for; and few cells, for 1,000 steps on a CPU.
        test = test[test.obs["cell_type"].isin(self.train.obs["cell_type"].unique()).to_numpy()]
        chosen = np.random.default_rng(0).permutation(test.n_obs)[: args.max_cells]
        self.test = test[np.sort(chosen)]
        self.steps_per_epoch = max(1, self.train.n_obs // BATCH_SIZE)

    def train_model(self, model: str, seed: int, minutes: float) -> dict:
        """Trains in a process of its own; returns its log and peak memory."""
        folder = self.folder / f"{model}, seed {seed}"
        configs, flags = [CONFIGS / f"{self.name}.yaml"], []
        validation_steps, checkpointing_steps = 200, 10**9
        if model != DEFAULT:
            configs.append(CONFIGS / "paper.yaml")
            network = SHAPES[self.args.shape] | networks(self.args.shape)[model]["model"]
            flags += [*flags_of(network), "--values", self.values]
            steps = steps_within(60 * minutes, WhiteBoxDiTModel(num_genes=NUM_GENES, **network), self.args.device)
            epochs = steps / self.steps_per_epoch
            validation_steps = max(1, round(epochs / 16)) * self.steps_per_epoch
            if seed == 0 and model != LARGE:
                checkpointing_steps = max(1, round(epochs / 8)) * self.steps_per_epoch
        elif self.values == "log":  # our default is then the network of expression space
            flags += flags_of(SHAPES[self.args.shape])
        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted training
        command = [sys.executable, "-c", TRAIN, folder.with_suffix(".memory"), ROOT / "training" / "train.py"]
        command += ["--config", *configs, "--dataset", self.path, "--split", self.split_path]
        command += ["--output_dir", folder, "--seed", seed, "--num_genes", NUM_GENES, *flags]
        command += ["--max_train_steps", 10**9, "--max_train_minutes", minutes]
        command += ["--validation_steps", validation_steps, "--checkpointing_steps", checkpointing_steps]
        environment = os.environ | ({"ACCELERATE_USE_CPU": "true"} if self.args.device == "cpu" else {})
        subprocess.run([str(part) for part in command], check=True, env=environment)
        log = pd.read_csv(folder / "training_log.csv")
        epochs = log["step"] / self.steps_per_epoch if model != DEFAULT else log["epoch"]
        return {
            "minutes": minutes,
            "steps": int(log["step"].iloc[-1]),
            "epochs": float(epochs.iloc[-1]),
            "seconds_per_epoch": float(log["seconds"].iloc[-1] / max(epochs.iloc[-1], 1e-9)),
            "peak_memory_mib": int(folder.with_suffix(".memory").read_text()) / 2**20,
            "log": {
                "epoch": [round(value, 3) for value in epochs],
                "seconds": log["seconds"].tolist(),
                "loss": log["loss"].tolist(),
                "validation_loss": log["validation_loss"].tolist(),
            },
        }

    def checkpoints(self, model: str) -> dict[int, Path]:
        """After 1, 2, 4, … intervals: by epoch."""
        steps = sorted(
            int(path.name.split("-")[1]) for path in (self.folder / f"{model}, seed 0").glob("checkpoint-*")
        )
        chosen = [steps[2**i - 1] for i in range(len(steps).bit_length())]
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
        config = pipe.processor.config
        if config.label_keys:
            # In another order than the judged cells: the paper's KL divergence pairs them row by row.
            order = np.random.default_rng(seed).permutation(times * self.test.n_obs) % self.test.n_obs
            kwargs["conditions"] = {
                key: self.test.obs[key].astype(str).to_numpy()[order].tolist() for key in config.label_keys
            }
        if pipe.autoencoder is not None:
            cells = pipe(**kwargs).cells
            scale = sparse.diags_array(TARGET_SUM / cells.obs["library_size"].to_numpy())
            x = np.log1p((scale @ cells.X).toarray())
        else:
            x = pipe(output_type="np", **kwargs).cells
        return ad.AnnData(sparse.csr_matrix(x, dtype=np.float32), var=pd.DataFrame(index=pipe.processor.var_names))

    def judge(self, samples: list[ad.AnnData], floors: bool = False) -> dict:
        report = evaluate_cells(samples, self.train, self.test, values="log", floors=floors, parity=True)
        return report["metrics"]


def reproduce(name: str, entry: dict, minutes: float, args: argparse.Namespace, save: Callable[[], None]):
    """One dataset: trains, samples and judges what `entry` does not have yet."""
    data = Dataset(name, args)
    if "num_train" not in entry:
        entry |= {"num_train": data.train.n_obs, "num_judged": data.test.n_obs, "values": data.values, "models": {}}
    models = entry["models"]

    def record(model: str, part: str, key: str, function):
        parts = models.setdefault(model, {}).setdefault(part, {})
        if key not in parts:
            start = time.monotonic()
            parts[key] = function()
            save()
            print(f"{name} | {model} | {part} {key} | {time.monotonic() - start:.0f} s", flush=True)

    # Turn by turn, so that a slower hour of the machine meets both
    for seed in range(args.num_seeds):
        for model in (WHITE_BOX, DIT):
            record(model, "runs", str(seed), lambda model=model, seed=seed: data.train_model(model, seed, minutes))
    record(LARGE, "runs", "0", lambda: data.train_model(LARGE, 0, minutes))
    record(DEFAULT, "runs", "0", lambda: data.train_model(DEFAULT, 0, minutes * args.num_seeds))

    def judge_steps(model: str, steps: int, seeds: range, dtype: torch.dtype = torch.float32) -> dict:
        samples = [data.sample(model, seed, steps, dtype) for seed in seeds]
        if dtype == torch.float32:  # for the figures
            samples[0].write_h5ad(data.folder / f"{model}, {steps} steps.h5ad", compression="gzip")
        metrics = data.judge(samples, floors="floors" not in entry)
        if "floors" not in entry:
            entry["floors"] = {floor: metrics[floor] for floor in FLOORS}
        return metrics["generated"]

    for model in (DEFAULT, WHITE_BOX, DIT):
        seeds = range(args.num_seeds)
        record(model, "samplers", "20", lambda model=model, seeds=seeds: judge_steps(model, 20, seeds))
    record(LARGE, "samplers", "20", lambda: judge_steps(LARGE, 20, range(1)))
    for model in (WHITE_BOX, DIT):
        for epoch, checkpoint in data.checkpoints(model).items():

            def judge_checkpoint(model=model, epoch=epoch, checkpoint=checkpoint) -> dict:
                sample = data.sample(model, 0, 20, checkpoint=checkpoint)
                sample.write_h5ad(data.folder / f"{model}, epoch {epoch}.h5ad", compression="gzip")
                return data.judge([sample])["generated"]

            record(model, "epochs", str(epoch), judge_checkpoint)
    for model in (WHITE_BOX, DIT):
        # bfloat16 for their time; the first shows what it costs.
        for steps in (20, 100, 1000):

            def judge_bfloat16(model=model, steps=steps) -> dict:
                return judge_steps(model, steps, range(1), torch.bfloat16)

            record(model, "samplers", f"{steps}, bfloat16", judge_bfloat16)
    for model in (WHITE_BOX, DIT, DEFAULT):
        path = data.folder / f"{model}, five times.h5ad"
        if not path.exists():
            partial = path.with_suffix(".partial")
            data.sample(model, 0, 20, times=5).write_h5ad(partial, compression="gzip")
            partial.replace(path)


def ratio_at(runs_a: dict, runs_b: dict, axis: str, column: str = "validation_loss") -> list[float]:
    """Loss of `a` divided by that of `b`, run by run, at the last epoch (or second) that both have reached."""
    ratios = []
    for seed in runs_a:
        if seed in runs_b:
            a, b = runs_a[seed]["log"], runs_b[seed]["log"]
            last = min(a[axis][-1], b[axis][-1])
            ratios.append(np.interp(last, a[axis], a[column]) / np.interp(last, b[axis], b[column]))
    return ratios


def mean_sd(values: list[float], digits: int = 3) -> str:
    if not values:
        return "–"
    return f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values):.{digits}f}" if len(values) > 1 else "")


def tables(results: dict) -> str:
    """The verdict on White-Box against DiT; cost; and every metric of every model and sampler."""
    lines = [
        "| dataset | seconds per epoch, DiT / White-Box |"
        " held-out loss, White-Box / DiT: at equal epochs | at equal time |"
        " White-Box as large as the DiT: at equal epochs | at equal time |",
        "|---" * 6 + "|",
    ]
    complete = {name: entry for name, entry in results["datasets"].items() if "seconds" in entry}
    for name, entry in complete.items():
        runs = {model: entry["models"][model]["runs"] for model in (WHITE_BOX, DIT, LARGE)}
        seconds = [
            runs[DIT][seed]["seconds_per_epoch"] / runs[WHITE_BOX][seed]["seconds_per_epoch"]
            for seed in runs[WHITE_BOX]
        ]
        row = [mean_sd(seconds, 2)]
        for model in (WHITE_BOX, LARGE):
            row += [mean_sd(ratio_at(runs[model], runs[DIT], axis)) for axis in ("epoch", "seconds")]
        lines.append(f"| {name} | " + " | ".join(row) + " |")

    lines += [
        "",
        "| dataset | model | parameters | GFLOP per step | minutes | seconds per epoch | epochs | peak memory, MiB |"
        " training loss | held-out loss |",
        "|---" * 10 + "|",
    ]
    for name, entry in complete.items():
        for model, parts in entry["models"].items():
            runs = parts["runs"].values()
            values = [name, model, "–", "–", mean_sd([run["minutes"] for run in runs], 2), "–", "–", "–", "–"]
            if model != DEFAULT:  # another loss, and batches of another size
                network = results["networks"][model]
                values[2:4] = f"{network['parameters']:,}", f"{network['flop_per_step'] / 1e9:.1f}"
                values[5] = mean_sd([run["seconds_per_epoch"] for run in runs], 2)
                values[6] = mean_sd([run["epochs"] for run in runs], 1)
                # The last row but one is of a whole interval.
                values[7] = mean_sd([run["log"]["loss"][-2:][0] for run in runs])
                values[8] = mean_sd([run["log"]["validation_loss"][-1] for run in runs])
            values.insert(7, mean_sd([run["peak_memory_mib"] for run in runs], 0))
            lines.append("| " + " | ".join(values) + " |")

    lines += [
        "",
        "| dataset | cells | steps | " + " | ".join(METRICS.values()) + " |",
        "|---" * (3 + len(METRICS)) + "|",
    ]
    for name, entry in complete.items():
        rows = [(floor, "", entry["floors"][floor]) for floor in FLOORS]
        for model, parts in entry["models"].items():
            rows += [(model, steps, metrics) for steps, metrics in parts["samplers"].items()]
        for model, steps, metrics in rows:
            lines.append(
                f"| {name} | {model} | {steps} | " + " | ".join(mean_sd(metrics[key]) for key in METRICS) + " |"
            )

    lines += ["", "| dataset | model | epochs | seconds | held-out loss | RF-AUC | W2 | MMD² |", "|---" * 8 + "|"]
    for name, entry in complete.items():
        for model in (WHITE_BOX, DIT):
            log = entry["models"][model]["runs"]["0"]["log"]
            for epoch, metrics in entry["models"][model].get("epochs", {}).items():
                seconds, loss = (
                    np.interp(int(epoch), log["epoch"], log[key]) for key in ("seconds", "validation_loss")
                )
                values = " | ".join(mean_sd(metrics[key]) for key in ("rf_auc", "w2", "mmd2"))
                lines.append(f"| {name} | {model} | {epoch} | {seconds:.0f} | {loss:.3f} | {values} |")
    missing = sorted(set(results["datasets"]) - set(complete))
    if missing:
        lines += ["", f"Not complete: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def figures(results: dict, args: argparse.Namespace):
    """The paper's figures 2 and 3, and the losses, as PNG files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from wbdit_diffusers.plotting import joint_tsne

    args.figure_dir.mkdir(parents=True, exist_ok=True)
    colours = {"real": "tab:blue", WHITE_BOX: "tab:orange", DIT: "tab:green", LARGE: "tab:red", DEFAULT: "tab:purple"}

    def draw(axis, groups: dict[str, ad.AnnData], title: str):
        points = joint_tsne([cells.X.toarray() for cells in groups.values()])
        sources = np.repeat(list(groups), [cells.n_obs for cells in groups.values()])
        for source in reversed(groups):
            of_source = sources == source
            axis.scatter(
                *points[of_source].T,
                s=4,
                linewidths=0,
                alpha=0.7,
                label=f"{source} ({of_source.sum()})",
                color=colours[source],
            )
        axis.set(xticks=[], yticks=[], title=title)

    names = list(results["datasets"])
    growing, many = (
        plt.subplots(len(names), columns, figsize=(3 * columns, 3 * len(names)), squeeze=False, layout="constrained")
        for columns in (5, 3)
    )
    losses = plt.subplots(2, len(names), figsize=(3 * len(names), 6), squeeze=False, layout="constrained")
    for row, name in enumerate(names):
        entry, data = results["datasets"][name], Dataset(name, args)

        def load(file_name: str, folder: Path = data.folder) -> ad.AnnData:
            return read_cells(folder / f"{file_name}.h5ad")

        last = load(f"{WHITE_BOX}, 20 steps")
        real, train = data.test[:, last.var_names], data.train[:, last.var_names]
        epochs = list(entry["models"][WHITE_BOX].get("epochs", {}))[-3:]
        for axis, epoch in zip(growing[1][row], epochs):
            draw(axis, {"real": real, WHITE_BOX: load(f"{WHITE_BOX}, epoch {epoch}")}, f"epoch {epoch}")
        end = entry["models"][WHITE_BOX]["runs"]["0"]["epochs"]
        draw(growing[1][row][3], {"real": real, WHITE_BOX: last}, f"epoch {end:.0f}, the end")
        draw(growing[1][row][4], {"real": real, DEFAULT: load(f"{DEFAULT}, 20 steps")}, DEFAULT)
        draw(many[1][row][0], {"real": real, WHITE_BOX: last, DIT: load(f"{DIT}, 20 steps")}, "paper's setting")
        real = train[np.random.default_rng(0).permutation(train.n_obs)[: 5 * real.n_obs]]
        for axis, model in zip(many[1][row][1:], (WHITE_BOX, DEFAULT)):
            draw(axis, {"real": real, model: load(f"{model}, five times")}, f"five times as many: {model}")
        for axis in (*growing[1][row], *many[1][row]):
            axis.legend(fontsize=6, markerscale=2, frameon=False)
        for axes in (growing[1][row], many[1][row]):
            axes[0].set_ylabel(name, fontsize=8)
        for axis, key in zip(losses[1][:, row], ("epoch", "seconds")):
            for model in (WHITE_BOX, DIT, LARGE):
                for i, run in enumerate(entry["models"][model]["runs"].values()):
                    label = model if i == 0 else None
                    axis.plot(run["log"][key], run["log"]["validation_loss"], color=colours[model], label=label)
            axis.set(xlabel=key, yscale="log")
            axis.set_title(name if key == "epoch" else "", fontsize=8)
    for axes in losses[1][:, 0]:
        axes.set_ylabel("held-out loss")
    losses[1][0, 0].legend(fontsize=7, frameon=False)

    speed, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    for i, model in enumerate((WHITE_BOX, DIT)):
        seconds = [
            [run["seconds_per_epoch"] for run in results["datasets"][name]["models"][model]["runs"].values()]
            for name in names
        ]
        axis.bar(
            np.arange(len(names)) + 0.4 * i,
            [np.mean(values) for values in seconds],
            0.4,
            label=model,
            yerr=[np.std(values) for values in seconds],
            color=colours[model],
        )
    axis.set_xticks(np.arange(len(names)) + 0.2, names, rotation=20, ha="right", fontsize=7)
    axis.set(ylabel="seconds per epoch")
    axis.legend(frameon=False)
    for figure, name in ((growing[0], "epochs"), (many[0], "models"), (losses[0], "losses"), (speed, "seconds")):
        figure.savefig(args.figure_dir / f"{name}.png", dpi=70)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", default=["all"], choices=["all", *DATASETS, "hnscc"], metavar="NAME")
    parser.add_argument(
        "--data_dir",
        type=Path,
        default=ROOT.parent / "shared" / "data",
        help="Folder of NAME.h5ad, as `wbdit prepare` writes them.",
    )
    parser.add_argument(
        "--budget_minutes", type=float, default=65, help="For all of it; a little less than half is training."
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="Of the paper's networks: small on a CPU by default.")
    parser.add_argument("--num_seeds", type=int, default=3)
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

    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    # On two cores, more than half of the time goes into sampling and judging.
    minutes = 0.45 * args.budget_minutes / len(names) / (3 * args.num_seeds + 1)
    settings = {
        "shape": args.shape,
        "device": args.device,
        "num_seeds": args.num_seeds,
        "max_cells": args.max_cells,
        "minutes": minutes,
    }
    if results.setdefault("settings", settings) != settings and not args.figures:
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
            reproduce(name, entry, minutes, args, save)
            entry.setdefault("seconds", time.monotonic() - start)
            save()
    figures(results, args)
    print(tables(results))


if __name__ == "__main__":
    main()
