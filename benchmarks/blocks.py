"""Compares blocks of the denoiser: what they learn, what they cost, and whether their steps follow their equations.

    python benchmarks/blocks.py --work_dir WORK --output lab/results/blocks_cpu.json --max_train_steps 600 \\
        --dataset ../shared/data/{kang_ifnb_pbmc,pancreas_endocrinogenesis,paul15}.h5ad
    python benchmarks/blocks.py --table lab/results/blocks_cpu.json

Codec and split are those of pipelines that quality.py trained (model `program`, seed 0). For each block and seed, a
denoiser is trained on the latents of the training cells. Reported are parameters, CPU seconds, and the loss on
held-out cells at the same noise and timesteps for all, next to the loss of a Gaussian mixture in closed form. Means
over layers and timesteps show the change of the coding rate by attention in its own and in random subspaces, the
cosine between its step and the steepest descent, and the change of the objective of sparse coding by ISTA.

`--labels coarse` merges the labels into three groups with similar latents, and `--labels none` drops them. The network
must then learn what labels would give it. `--mixture_shares 0 0.3` trains each block on cells alone, and with the
mixture as its first teacher. blocks_mixture_cpu.json was made with `--labels none --max_train_steps 1000` (and 2000
for `--blocks descent --mixture_shares 0`, on kang).
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from closed_form import held_out_losses
from common import add_rows, load_run, make_parser, markdown, mean_sd, parse
from quality import OURS
from sklearn.cluster import AgglomerativeClustering

from wbdit_diffusers import GaussianMixtureDenoiser, WhiteBoxDiTModel
from wbdit_diffusers.data.latents import Latents
from wbdit_diffusers.interpretation.layers import LAYER_TIMESTEPS, measure_layers
from wbdit_diffusers.sampling import training_scheduler
from wbdit_diffusers.training import TrainingConfig
from wbdit_diffusers.training.denoiser import DenoiserTraining
from wbdit_diffusers.training.gaussian_mixture import prepare_gaussian_mixture


BLOCKS = {
    "descent": {},
    "white_box": OURS["program-white-box"],
    "white_box, one token per latent": {"block_type": "white_box", "patch_size": 1, "attention_head_dim": 24},
    "white_box, as few parameters": {"block_type": "white_box", "patch_size": 8, "attention_head_dim": 15},
    "dit": OURS["program-dit"],
    "dit, as few parameters": {"block_type": "dit", "patch_size": 8, "attention_head_dim": 11},
    "descent, wide": {"patch_size": 1, "attention_head_dim": 72},  # nearly as many parameters as the published block
    # The default until 2026-11: 96 wide, and one token per latent
    "descent, twice the work": {"patch_size": 1, "attention_head_dim": 24, "learning_rate": 2e-3},
}
LAYER_CELLS = 500
STEPS = ("own", "random", "cosine", "objective")
COARSE_GROUPS = 3
LABELS = ["given", "coarse", "none"]


def relabel(cells: tuple[Latents, Latents], labels: str) -> tuple[Latents, ...]:
    """Training and held-out cells with their labels, with three groups of labels, or without labels."""
    if labels == "given":
        return cells
    if labels == "none":
        return tuple(replace(part, class_labels=part.class_labels[:, :0], condition_sizes=()) for part in cells)
    combinations = [[tuple(row) for row in part.class_labels.tolist()] for part in cells]
    known = sorted(set(combinations[0]))
    codes = np.array([known.index(row) for row in combinations[0]])
    means = np.stack([cells[0].values.numpy()[codes == i].mean(axis=0) for i in range(len(known))])
    groups = dict(zip(known, AgglomerativeClustering(COARSE_GROUPS).fit_predict(means).tolist()))
    # Combinations that no training cell has are rare. They go to the first group.
    coarse = [torch.tensor([[groups.get(row, 0)] for row in rows]) for rows in combinations]
    sizes = (COARSE_GROUPS,)
    return tuple(replace(part, class_labels=one, condition_sizes=sizes) for part, one in zip(cells, coarse))


def train_block(cells: tuple[Latents, ...], seed: int, steps: int, flags: dict) -> tuple[WhiteBoxDiTModel, float]:
    """Runs stage two of a training. Returns the denoiser and the CPU seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(output_dir=folder, seed=seed, max_train_steps=steps, validation_steps=10**9, **flags)
        accelerator = Accelerator(cpu=True, mixed_precision="no")
        mixture = prepare_gaussian_mixture(config, accelerator, cells[0], Path(folder))
        set_seed(seed)
        training = DenoiserTraining(config, accelerator, *cells, time.monotonic(), mixture)
        training.start_log()
        start = time.process_time()
        training.run()
        return training.averaged_model(), time.process_time() - start


def measure(dataset: Path, labels: str, args: argparse.Namespace) -> Iterator[dict]:
    pipe, *real = load_run(args.work_dir / dataset.stem / "program", dataset)
    processor = pipe.processor
    cells = tuple(
        Latents(pipe.encode_cells(part), processor.encode_labels(part), processor.condition_sizes) for part in real
    )
    train, test = cells = relabel(cells, labels)
    class_labels = test.class_labels if test.condition_sizes else None
    few_labels = None if class_labels is None else class_labels[:LAYER_CELLS]
    mixture = GaussianMixtureDenoiser.fit(
        train.values, train.class_labels, train.condition_sizes, training_scheduler("v_prediction")
    )
    loss_of_mixture = held_out_losses({"": mixture}, test.values, class_labels)[0][""].mean().item()
    for seed, name, share in itertools.product(args.seeds, args.blocks, args.mixture_shares):
        denoiser, seconds = train_block(cells, seed, args.max_train_steps, BLOCKS[name] | {"mixture_share": share})
        loss = held_out_losses({"": denoiser}, test.values, class_labels)[0][""].mean().item()
        layers = measure_layers(denoiser, pipe.scheduler, test.values[:LAYER_CELLS], few_labels, LAYER_TIMESTEPS)
        trained = [row for row in layers if row["network"] == "trained" and row["layer"]]
        row = {"dataset": dataset.stem, "labels": labels, "block": name, "mixture_share": share, "seed": seed}
        row |= {"steps": args.max_train_steps, "parameters": denoiser.num_parameters(), "seconds": round(seconds, 1)}
        row |= {"loss": loss, "loss_of_mixture": loss_of_mixture, "components": mixture.config.num_components}
        row |= {key: float(np.mean([one[key] for one in trained])) for key in STEPS if key in trained[0]}
        if "own" in row:
            row["lower"] = float(np.mean([one["own"] < 0 for one in trained]))  # share of layers and timesteps
        yield row


def table(rows: list[dict]) -> str:
    """Means over seeds, with the standard deviation of the loss."""
    header = ["dataset", "labels", "block", "mixture_share", "parameters", "steps", "CPU seconds", "held-out loss"]
    header += ["closed form", "coding rate: own / random", "steps that lower it", "cosine", "sparse coding"]
    keys = ("dataset", "labels", "block", "mixture_share", "steps")
    lines = []
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in keys) == key]
        mean = {name: np.mean([row[name] for row in own]) for name in own[0] if name not in keys[:3]}
        cells = [*key[:3], str(key[3]), f"{mean['parameters']:,.0f}", str(key[4]), f"{mean['seconds']:.0f}"]
        cells += [f"{mean_sd([row['loss'] for row in own], 4)} ({len(own)})", f"{mean['loss_of_mixture']:.4f}"]
        steps = ["–"] * 4
        if "own" in mean:
            steps = [f"{mean['own']:+.1%} / {mean['random']:+.1%}", f"{mean['lower']:.0%}", f"{mean['cosine']:.2f}"]
            steps.append(f"{mean['objective']:+.0%}")
        lines.append([*cells, *steps])
    return markdown(header, lines)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--blocks", nargs="+", choices=sorted(BLOCKS), default=list(BLOCKS))
    parser.add_argument("--mixture_shares", nargs="+", type=float, default=[0.3], help="See `wbdit train --help`.")
    parser.add_argument("--labels", nargs="+", choices=LABELS, default=["given"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Seeds of the denoiser's training.")
    parser.add_argument("--max_train_steps", type=int, default=600)
    args = parse(parser, table)
    torch.set_num_threads(1)  # more threads do not help networks of this size, and times are comparable
    for dataset, labels in itertools.product(args.dataset, args.labels):
        rows = add_rows(args.output, measure(dataset, labels, args))
    print(table(rows))


if __name__ == "__main__":
    main()
