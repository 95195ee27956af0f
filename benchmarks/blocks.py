"""Blocks of the denoiser beside each other: what they learn and cost, and whether their steps are what they say.

    python benchmarks/blocks.py --work_dir WORK --output lab/results/blocks_cpu.json --max_train_steps 600 \\
        --dataset ../shared/data/{kang_ifnb_pbmc,pancreas_endocrinogenesis,paul15}.h5ad
    python benchmarks/blocks.py --table lab/results/blocks_cpu.json

`--work_dir` is that of `benchmarks/quality.py`, whose pipelines (model `program`, seed 0) lend codec and split. For
each block and seed a denoiser is trained on the codes of the training cells. Reported are parameters, seconds, and the
loss on held-out cells at the same noise and timesteps for all; and, over layers and timesteps of held-out cells, the
change of the coding rate by attention in its own and in random subspaces, the cosine of its step and the steepest
descent, and the change of the objective of sparse coding by ISTA.
"""

import argparse
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

from wbdit_diffusers import ScRNAGenerationPipeline, WhiteBoxDiTModel
from wbdit_diffusers.data import CellDataset, CellSplit, drop_empty_cells, read_cells
from wbdit_diffusers.interpretation import fit_mixture
from wbdit_diffusers.interpretation.layers import measure_layers
from wbdit_diffusers.sampling import training_scheduler
from wbdit_diffusers.training import TrainingConfig
from wbdit_diffusers.training.denoiser import DenoiserTraining


BLOCKS = {
    "descent": {},
    "white_box": OURS["program-white-box"],
    "white_box, one token per program": {"block_type": "white_box"},
    "white_box, as few parameters": {"block_type": "white_box", "patch_size": 8, "attention_head_dim": 15},
    "dit": OURS["program-dit"],
}
LAYER_CELLS, LAYER_TIMESTEPS = 500, [99, 299, 499, 799]
STEPS = ("own", "random", "cosine", "objective")


def train_block(
    pipe: ScRNAGenerationPipeline, cells: tuple[CellDataset, CellDataset], seed: int, steps: int, flags: dict
) -> tuple[WhiteBoxDiTModel, float]:
    """Stage two of the training: the denoiser, and the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(output_dir=folder, seed=seed, max_train_steps=steps, validation_steps=10**9, **flags)
        loader = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed)
        accelerator = Accelerator(cpu=True, mixed_precision="no", dataloader_config=loader)
        set_seed(seed)
        training = DenoiserTraining(
            *(config, accelerator, training_scheduler(config.prediction_type), *cells),
            sample_size=pipe.codec.num_features,
            condition_sizes=pipe.processor.condition_sizes,
            start_time=time.monotonic(),
        )
        training.start_log(resumed=False)
        start = time.monotonic()
        training.run()
        return training.averaged_model(), time.monotonic() - start


def measure(dataset: Path, args: argparse.Namespace) -> list[dict]:
    folder = args.work_dir / f"{dataset.stem}, seed 0" / "program"
    pipe = ScRNAGenerationPipeline.from_pretrained(folder)
    train_cells, test_cells = CellSplit.load(folder).apply(drop_empty_cells(read_cells(dataset)))
    test_cells = test_cells[pipe.processor.knows_labels(test_cells)]
    cells = tuple(CellDataset(part, pipe.processor) for part in (train_cells, test_cells))
    for part in cells:
        part.encode(pipe.codec)
    latents, labels = cells[1].latents, cells[1].class_labels
    losses, _ = held_out_losses({"mixture": fit_mixture(pipe, train_cells)}, latents, labels)
    loss_of_mixture = losses["mixture"].mean().item()
    rows = []
    for seed in args.seeds:
        for name in args.blocks:
            denoiser, seconds = train_block(pipe, cells, seed, args.max_train_steps, BLOCKS[name])
            losses, _ = held_out_losses({"block": denoiser}, latents, labels)
            few = slice(LAYER_CELLS)
            layers = measure_layers(denoiser, pipe.scheduler, latents[few], labels[few], LAYER_TIMESTEPS)
            trained = [row for row in layers if row["network"] == "trained" and row["layer"]]
            row = {
                "dataset": dataset.stem,
                "block": name,
                "seed": seed,
                "steps": args.max_train_steps,
                "parameters": denoiser.num_parameters(),
                "seconds": round(seconds, 1),
                "loss": losses["block"].mean().item(),
                "loss_of_mixture": loss_of_mixture,
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
        "| dataset | block | parameters | seconds | held-out loss | coding rate: own / random | steps that lower it"
        " | cosine | sparse coding |",
        "|---" * 9 + "|",
    ]
    for dataset, block in dict.fromkeys((row["dataset"], row["block"]) for row in rows):
        own = [row for row in rows if (row["dataset"], row["block"]) == (dataset, block)]
        mean = {key: np.mean([row[key] for row in own]) for key in own[0] if key not in ("dataset", "block")}
        cells = [dataset, block, f"{mean['parameters']:,.0f}", f"{mean['seconds']:.0f}"]
        cells.append(f"{mean['loss']:.4f} ± {np.std([row['loss'] for row in own]):.4f}")
        if "own" in mean:
            cells += [f"{mean['own']:+.1%} / {mean['random']:+.1%}", f"{mean['lower']:.0%}", f"{mean['cosine']:.2f}"]
            cells.append(f"{mean['objective']:+.0%}")
        else:
            cells += ["–"] * 4
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", type=Path, default=[], help=".h5ad files.")
    parser.add_argument("--work_dir", type=Path, help="That of quality.py.")
    parser.add_argument("--blocks", nargs="+", choices=sorted(BLOCKS), default=list(BLOCKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Of the denoiser's training.")
    parser.add_argument("--max_train_steps", type=int, default=600)
    parser.add_argument("--output", type=Path, help="JSON list; results are appended to it.")
    parser.add_argument("--table", type=Path, help="Print the table of a JSON file, and nothing else.")
    args = parser.parse_args()
    if args.table is not None:
        print(table(json.loads(args.table.read_text())))
        return
    torch.set_num_threads(1)  # blocks of this size gain nothing from more, and times are comparable
    for dataset in args.dataset:
        rows = json.loads(args.output.read_text()) if args.output.exists() else []
        rows += measure(dataset, args)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(rows, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
