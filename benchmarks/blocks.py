"""Blocks of the denoiser beside each other: what they learn and cost, and whether their steps are what they say.

    python benchmarks/blocks.py --work_dir WORK --output lab/results/blocks_cpu.json --max_train_steps 600 \\
        --dataset ../shared/data/{kang_ifnb_pbmc,pancreas_endocrinogenesis,paul15}.h5ad
    python benchmarks/blocks.py --table lab/results/blocks_cpu.json

`--work_dir` is that of `benchmarks/quality.py`, whose pipelines (model `program`, seed 0) lend codec and split. For
each block and seed a denoiser is trained on the codes of the training cells. Reported are parameters, seconds, and the
loss on held-out cells at the same noise and timesteps for all, beside that of a Gaussian mixture in closed form; and,
over layers and timesteps of held-out cells, the change of the coding rate by attention in its own and in random
subspaces, the cosine of its step and the steepest descent, and the change of the objective of sparse coding by ISTA.

With `--labels coarse` the labels that are given are merged to three groups of alike codes, and with `none` network and
mixture get none: there the network must carry what the labels say otherwise. `--mixture_shares 0 0.3` trains each of
them on the cells alone, and as the default does, from the mixture at first; so was blocks_mixture_cpu.json made, with
`--labels none --max_train_steps 1000` (and 2000 for `--blocks descent --mixture_shares 0`, on kang).
"""

import argparse
import copy
import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from closed_form import held_out_losses
from quality import OURS
from rows import add_rows, parser_of_rows
from sklearn.cluster import AgglomerativeClustering

from wbdit_diffusers import GaussianMixtureDenoiser, ScRNAGenerationPipeline, WhiteBoxDiTModel
from wbdit_diffusers.data import CellDataset, CellSplit, Latents, drop_empty_cells, encode_cells, read_cells
from wbdit_diffusers.interpretation.layers import LAYER_TIMESTEPS, measure_layers
from wbdit_diffusers.sampling import training_scheduler
from wbdit_diffusers.training import TrainingConfig
from wbdit_diffusers.training.denoiser import DenoiserTraining
from wbdit_diffusers.training.gaussian_mixture import prepare_gaussian_mixture


BLOCKS = {
    "descent": {},
    "white_box": OURS["program-white-box"],
    "white_box, one token per program": {"block_type": "white_box"},
    "white_box, as few parameters": {"block_type": "white_box", "patch_size": 8, "attention_head_dim": 15},
    "dit": OURS["program-dit"],
    "dit, as few parameters": {"block_type": "dit", "patch_size": 8, "attention_head_dim": 11},
    "descent, wide": {"attention_head_dim": 72},  # nearly as many parameters as the published block
}
LAYER_CELLS = 500
STEPS = ("own", "random", "cosine", "objective")
COARSE_GROUPS = 3
LABELS = ["given", "coarse", "none"]


def relabel(cells: tuple[Latents, Latents], labels: str) -> tuple[Latents, Latents]:
    """Training and held-out cells with the labels they have, with three groups of these, or without."""
    if labels == "given":
        return cells
    cells = tuple(copy.copy(part) for part in cells)
    combinations = [[tuple(row) for row in part.class_labels.tolist()] for part in cells]
    known = sorted(set(combinations[0]))
    codes = np.array([known.index(row) for row in combinations[0]])
    means = np.stack([cells[0].values.numpy()[codes == i].mean(axis=0) for i in range(len(known))])
    groups = AgglomerativeClustering(COARSE_GROUPS).fit_predict(means)
    for part, rows in zip(cells, combinations):
        # A combination that no training cell has goes to the first group; held-out cells have hardly any.
        group = torch.tensor([[int(groups[known.index(row)]) if row in known else 0] for row in rows])
        part.class_labels, part.condition_sizes = group, (COARSE_GROUPS,)
        if labels == "none":
            part.class_labels, part.condition_sizes = group[:, :0], ()
    return cells


def train_block(
    pipe: ScRNAGenerationPipeline, cells: tuple[Latents, Latents], seed: int, steps: int, flags: dict
) -> tuple[WhiteBoxDiTModel, float]:
    """Stage two of the training: the denoiser, and the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(output_dir=folder, seed=seed, max_train_steps=steps, validation_steps=10**9, **flags)
        loader = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed)
        accelerator = Accelerator(cpu=True, mixed_precision="no", dataloader_config=loader)
        set_seed(seed)
        training = DenoiserTraining(
            *(config, accelerator, *cells),
            start_time=time.monotonic(),
            gaussian_mixture=prepare_gaussian_mixture(config, accelerator, cells[0], Path(folder)),
        )
        training.start_log()
        start = time.monotonic()
        training.run()
        return training.averaged_model(), time.monotonic() - start


def measure(dataset: Path, labels: str, args: argparse.Namespace) -> list[dict]:
    folder = args.work_dir / dataset.stem / "program"
    pipe = ScRNAGenerationPipeline.from_pretrained(folder)
    train_cells, test_cells = CellSplit.load(folder).apply(drop_empty_cells(read_cells(dataset)))
    test_cells = test_cells[pipe.processor.knows_labels(test_cells)]
    datasets = [CellDataset(part, pipe.processor) for part in (train_cells, test_cells)]
    cells = tuple(Latents(encode_cells(one, pipe.codec), one.class_labels, one.condition_sizes) for one in datasets)
    train, test = cells = relabel(cells, labels)
    class_labels = test.class_labels if test.class_labels.shape[1] else None
    mixture = GaussianMixtureDenoiser.fit(
        train.values, train.class_labels, train.condition_sizes, training_scheduler("v_prediction")
    )
    losses, _ = held_out_losses({"mixture": mixture}, test.values, class_labels)
    loss_of_mixture = losses["mixture"].mean().item()
    rows = []
    for seed in args.seeds:
        for name, share in itertools.product(args.blocks, args.mixture_shares):
            flags = BLOCKS[name] | {"mixture_share": share}
            denoiser, seconds = train_block(pipe, cells, seed, args.max_train_steps, flags)
            losses, _ = held_out_losses({"block": denoiser}, test.values, class_labels)
            few_labels = None if class_labels is None else class_labels[:LAYER_CELLS]
            layers = measure_layers(denoiser, pipe.scheduler, test.values[:LAYER_CELLS], few_labels, LAYER_TIMESTEPS)
            trained = [row for row in layers if row["network"] == "trained" and row["layer"]]
            row = {
                "dataset": dataset.stem,
                "labels": labels,
                "block": name,
                "mixture_share": share,
                "seed": seed,
                "steps": args.max_train_steps,
                "parameters": denoiser.num_parameters(),
                "seconds": round(seconds, 1),
                "loss": losses["block"].mean().item(),
                "loss_of_mixture": loss_of_mixture,
                "components": mixture.config.num_components,
            }
            row |= {key: float(np.mean([one[key] for one in trained])) for key in STEPS if key in trained[0]}
            if "own" in row:
                row["lower"] = float(np.mean([one["own"] < 0 for one in trained]))  # share of layers and timesteps
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """Means over seeds, ± their standard deviation."""
    lines = [
        "| dataset | labels | block | mixture | parameters | steps | seconds | held-out loss | closed form"
        " | coding rate: own / random | steps that lower it | cosine | sparse coding |",
        "|---" * 13 + "|",
    ]
    keys = ("dataset", "labels", "block", "mixture_share", "steps")
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in keys) == key]
        mean = {name: np.mean([row[name] for row in own]) for name in own[0] if name not in keys[:3]}
        cells = [*key[:3], str(key[3]), f"{mean['parameters']:,.0f}", str(key[4]), f"{mean['seconds']:.0f}"]
        cells.append(f"{mean['loss']:.4f} ± {np.std([row['loss'] for row in own]):.4f} ({len(own)})")
        cells.append(f"{mean['loss_of_mixture']:.4f}")
        if "own" in mean:
            cells += [f"{mean['own']:+.1%} / {mean['random']:+.1%}", f"{mean['lower']:.0%}", f"{mean['cosine']:.2f}"]
            cells.append(f"{mean['objective']:+.0%}")
        else:
            cells += ["–"] * 4
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = parser_of_rows(__doc__)
    parser.add_argument("--blocks", nargs="+", choices=sorted(BLOCKS), default=list(BLOCKS))
    parser.add_argument("--mixture_shares", nargs="+", type=float, default=[0.3], help="See `wbdit train --help`.")
    parser.add_argument("--labels", nargs="+", choices=LABELS, default=["given"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Of the denoiser's training.")
    parser.add_argument("--max_train_steps", type=int, default=600)
    args = parser.parse_args()
    torch.set_num_threads(1)  # blocks of this size gain nothing from more, and times are comparable
    add_rows(args, lambda path: (measure(path, labels, args) for labels in args.labels), table)


if __name__ == "__main__":
    main()
