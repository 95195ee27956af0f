"""Compares blocks of the denoiser: what they learn, what they cost, and whether their steps follow their equations.

    python benchmarks/blocks.py --work_dir WORK --output lab/results/blocks_cpu.json --max_train_steps 600 \\
        --dataset ../shared/data/{kang_ifnb_pbmc,pancreas_endocrinogenesis,paul15}.h5ad
    python benchmarks/blocks.py --work_dir WORK --output lab/results/halves_cpu.json --seconds 20 --labels none \\
        --train_batch_size 128 \\
        --dataset ../shared/data/{kang_ifnb_pbmc,pbmc3k,pancreas_endocrinogenesis}.h5ad --blocks descent \\
        "descent, without ISTA" "descent, without attention" "white_box, as few parameters" "dit, as few parameters"
    python benchmarks/blocks.py --work_dir WORK --output lab/results/halves_cpu.json --seconds 10 --labels unseen \\
        --train_batch_size 128 --dataset ../shared/data/kang_ifnb_pbmc.h5ad --blocks ...
    python benchmarks/blocks.py --table lab/results/halves_cpu.json

Codec and split are those of pipelines that quality.py trained (model `program`, seed 0). For each block and seed, a
denoiser is trained on the latents of the training cells. Reported are parameters, CPU seconds, and the loss on
held-out cells at the same noise and timesteps for all, next to the loss of a Gaussian mixture in closed form. Means
over layers and timesteps show the change of the coding rate by attention in its own and in random subspaces, the
cosine between its step and the steepest descent, and the change of the objective of sparse coding by ISTA.

`--labels coarse` merges the labels into three groups with similar latents, and `--labels none` drops them. The network
must then learn what labels would give it. `--labels unseen` leaves the stimulated B cells of kang out of the training
and judges on them. Its pipeline is the one that unseen.py trained without them. Rows then have the metrics of
unseen.py for 500 generated cells.

`--seconds` gives each block the same CPU seconds in place of the same number of steps. The learning rate falls to its
end within them. Rows that the output already has are not measured again. Denoisers are saved in WORK/blocks, where
aot.py and gene_sets.py find them.

"without ISTA" and "without attention" are blocks in which this half does nothing from the start of the training. They
are wider, so that the number of parameters stays about the same. The pipelines of halves_cpu.json have 16 programs and
2,000 genes, and short trainings. `--mixture_shares 0 0.3` trains each block on cells alone, and with the mixture as
its first teacher. blocks_mixture_cpu.json was made with `--labels none --max_train_steps 1000` (and 2000 for `--blocks
descent --mixture_shares 0`, on kang). Blocks "as few parameters" had 160,000 there, like the default of that time.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from closed_form import held_out_losses
from common import add_rows, drop_empty_cells, load_run, make_parser, markdown, mean_sd, parse, read_results
from quality import OURS
from sklearn.cluster import AgglomerativeClustering
from torch import nn
from unseen import KEYS, NUM_CELLS, Judge

from wbdit_diffusers import GaussianMixtureDenoiser, ScRNAGenerationPipeline, WhiteBoxDiTModel
from wbdit_diffusers.data import read_cells
from wbdit_diffusers.data.latents import Latents
from wbdit_diffusers.interpretation.denoising import add_noise
from wbdit_diffusers.interpretation.interventions import with_denoiser
from wbdit_diffusers.interpretation.layers import (
    LAYER_TIMESTEPS,
    record_blocks,
    step_of_attention,
    step_of_ista,
    subspaces_of,
)
from wbdit_diffusers.models.transformer_white_box_dit import ISTA, MSSA, BoundedISTA, Contraction, DescentBlock
from wbdit_diffusers.training import TrainingConfig
from wbdit_diffusers.training.denoiser import DenoiserTraining
from wbdit_diffusers.training.gaussian_mixture import prepare_gaussian_mixture


class WithoutISTA(WhiteBoxDiTModel):
    """A denoiser of descent blocks that only take the step of attention."""

    def _init_weights(self):
        super()._init_weights()
        for block in self.blocks:
            block.ff = nn.Identity()  # ISTA's code replaces the tokens


class NoStep(nn.Module):
    """A step of length 0."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class WithoutAttention(WhiteBoxDiTModel):
    """A denoiser of descent blocks that only take the step of ISTA. Tokens then know nothing of each other."""

    def _init_weights(self):
        super()._init_weights()
        for block in self.blocks:
            block.attn = NoStep()  # attention's step is added to the tokens


BLOCKS = {
    "descent": {},
    "descent, without ISTA": {"attention_head_dim": 18},
    "descent, without attention": {"attention_head_dim": 18},
    "white_box": OURS["program-white-box"],
    "white_box, as few parameters": {"block_type": "white_box", "patch_size": 8, "attention_head_dim": 11},
    "dit": OURS["program-dit"],
    "dit, as few parameters": {"block_type": "dit", "patch_size": 8, "attention_head_dim": 8},
    # The default until 2026-11: 96 wide, and one token per latent
    "descent, twice the work": {"patch_size": 1, "attention_head_dim": 24, "learning_rate": 2e-3},
}
MODELS = {"descent, without ISTA": WithoutISTA, "descent, without attention": WithoutAttention}
SHAPE = ["block_type", "patch_size", "num_layers", "num_attention_heads", "attention_head_dim", "condition_dropout"]
TIMED_STEPS = (5, 45)  # of two short trainings, whose difference is the time of a step
HELD_OUT = ("B", "STIM")  # cell type and condition that no training cell has
LAYER_CELLS = 500
STEPS = ("own", "random", "cosine", "objective")
UNSEEN = {"pearson": "Pearson, top 100", "slope": "slope", "energy": "energy distance"}  # metrics of unseen.py
COARSE_GROUPS = 3
LABELS = ["given", "coarse", "none", "unseen"]


def relabel(cells: tuple[Latents, Latents], labels: str) -> tuple[Latents, ...]:
    """Training and held-out cells with their labels, with three groups of labels, or without labels."""
    if labels in ("given", "unseen"):
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


def read_dataset(
    dataset: Path, labels: str, work_dir: Path
) -> tuple[ScRNAGenerationPipeline, Latents, Latents, Judge | None]:
    """The pipeline, training and held-out cells, and for unseen cells, their judge."""
    folder = work_dir / ("_".join(HELD_OUT) + "_0" if labels == "unseen" else f"{dataset.stem}/program")
    pipe, *real = load_run(folder, dataset)
    judge = None
    if labels == "unseen":
        cells = drop_empty_cells(read_cells(dataset))
        control = next(c for c in sorted(set(cells.obs[KEYS[1]].astype(str))) if c != HELD_OUT[1])
        judge = Judge(cells, HELD_OUT, control, [real[0][:, pipe.processor.var_names]])  # on modelled genes
        real[1] = cells[judge.held]
    sizes = pipe.processor.condition_sizes
    encoded = tuple(Latents(pipe.encode_cells(part), pipe.processor.encode_labels(part), sizes) for part in real)
    return pipe, *relabel(encoded, labels), judge


def fit_mixture(pipe: ScRNAGenerationPipeline, cells: Latents) -> GaussianMixtureDenoiser:
    """The closed form that teaches all blocks."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(output_dir=folder)
        accelerator = Accelerator(cpu=True, mixed_precision="no")
        return prepare_gaussian_mixture(config, accelerator, cells, pipe.codec, Path(folder))


def block_folder(work_dir: Path, dataset: Path, labels: str, name: str, seed: int) -> Path:
    """Where the denoiser of a block is saved."""
    return work_dir / "blocks" / f"{dataset.stem}, {labels}, {name}, seed {seed}"


def load_block(work_dir: Path, dataset: Path, labels: str, name: str, seed: int) -> WhiteBoxDiTModel:
    """A denoiser that was trained here."""
    return MODELS.get(name, WhiteBoxDiTModel).from_pretrained(block_folder(work_dir, dataset, labels, name, seed))


def train_block(
    cells: tuple[Latents, ...], teacher: GaussianMixtureDenoiser | None, name: str, seed: int, **flags: Any
) -> tuple[WhiteBoxDiTModel, float]:
    """Runs stage two of a training. Returns the denoiser and the CPU seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        flags |= {"max_train_epochs": 10**6, "validation_steps": 10**9}
        config = TrainingConfig(output_dir=folder, seed=seed, **flags, **BLOCKS[name])
        accelerator = Accelerator(cpu=True, mixed_precision="no")
        make = partial(MODELS.get(name, WhiteBoxDiTModel), **{key: getattr(config, key) for key in SHAPE})
        set_seed(seed)
        training = DenoiserTraining(config, accelerator, *cells, time.monotonic(), teacher, denoiser=make)
        training.start_log()
        start = time.process_time()
        training.run()
        return training.averaged_model(), time.process_time() - start


def steps_within(
    seconds: float, cells: tuple[Latents, ...], teacher: GaussianMixtureDenoiser | None, name: str, **flags: Any
) -> int:
    """The number of steps of a training of so many CPU seconds."""
    few, many = (train_block(cells, teacher, name, 0, max_train_steps=steps, **flags)[1] for steps in TIMED_STEPS)
    return round(seconds * (TIMED_STEPS[1] - TIMED_STEPS[0]) / (many - few))


@torch.no_grad()
def steps_of_layers(pipe: ScRNAGenerationPipeline, denoiser: WhiteBoxDiTModel, cells: Latents) -> list[dict]:
    """The changes that attention and ISTA make to their objectives, for each layer and timestep."""
    rows, values = [], cells.values[:LAYER_CELLS]
    class_labels = cells.class_labels[:LAYER_CELLS] if cells.condition_sizes else None
    for timestep in LAYER_TIMESTEPS:
        noisy = add_noise(values, timestep, pipe.scheduler, seed=0)
        with record_blocks(denoiser) as records:
            denoiser(noisy, timestep, class_labels, return_dict=False)
        for block, record in zip(denoiser.blocks, records):
            row = {}
            if isinstance(block.attn, MSSA | Contraction):
                tokens, step = record["attn_input"], record["attn_output"]
                step = record["ff_input"] - tokens if isinstance(block, DescentBlock) else step
                row |= step_of_attention(subspaces_of(block.attn), tokens, step)
            if isinstance(block.ff, ISTA | BoundedISTA):
                row |= step_of_ista(block.ff, record["ff_input"], record["ff_output"])
            rows.append(row)
    return rows


def judge_unseen(pipe: ScRNAGenerationPipeline, denoiser: WhiteBoxDiTModel, judge: Judge, seed: int) -> dict:
    """The metrics of unseen.py for generated cells of the combination that was held out."""
    pipe = with_denoiser(pipe, denoiser)
    generator = torch.Generator().manual_seed(seed)
    cells = pipe(NUM_CELLS, conditions=dict(zip(KEYS, HELD_OUT)), generator=generator).cells
    return judge.measure(judge.of(cells))


def measure(
    dataset: Path, labels: str, seeds: list[int], args: argparse.Namespace, done: list[dict]
) -> Iterator[dict]:
    names = ("dataset", "labels", "block", "mixture_share", "seed", "budget")
    known = {tuple(row.get(name) for name in names) for row in done}
    runs = [(dataset.stem, labels, *run, args.seconds) for run in product(args.blocks, args.mixture_shares, seeds)]
    runs = [dict(zip(names, run)) for run in runs if run not in known]
    if not runs:
        return
    pipe, train, test, judge = read_dataset(dataset, labels, args.work_dir)
    mixture = fit_mixture(pipe, train)
    class_labels = test.class_labels if test.condition_sizes else None
    loss_of_mixture = held_out_losses({"": mixture}, test.values, class_labels)[0][""].mean().item()
    for row in runs:
        name, cells, steps = row["block"], (train, test), args.max_train_steps
        teacher = mixture if row["mixture_share"] else None
        flags = {"mixture_share": row["mixture_share"], "train_batch_size": args.train_batch_size}
        if args.seconds:  # the first seed is timed
            timed = [one["steps"] for one in done if all(one.get(key) == row[key] for key in names if key != "seed")]
            steps = timed[0] if timed else steps_within(args.seconds, cells, teacher, name, **flags)
        denoiser, seconds = train_block(cells, teacher, name, row["seed"], max_train_steps=steps, **flags)
        denoiser.save_pretrained(block_folder(args.work_dir, dataset, labels, name, row["seed"]))
        loss = held_out_losses({"": denoiser}, test.values, class_labels)[0][""].mean().item()
        layers = steps_of_layers(pipe, denoiser, test)
        row |= {
            "steps": steps,
            "batch": args.train_batch_size,
            "parameters": denoiser.num_parameters(),
            "seconds": round(seconds, 1),
        }
        row |= {"loss": loss, "loss_of_mixture": loss_of_mixture, "components": mixture.config.num_components}
        row |= {key: float(np.mean([one[key] for one in layers])) for key in STEPS if key in layers[0]}
        if "own" in row:
            row["lower"] = float(np.mean([one["own"] < 0 for one in layers]))  # share of layers and timesteps
        if judge is not None:
            row |= judge_unseen(pipe, denoiser, judge, row["seed"])
        yield row


def table(rows: list[dict]) -> str:
    """Means over seeds, with the standard deviation of the loss."""
    header = ["dataset", "labels", "block", "mixture_share", "parameters", "steps", "CPU seconds", "held-out loss"]
    header += ["closed form", "coding rate: own / random", "steps that lower it", "cosine", "sparse coding"]
    groups = {}
    for row in rows:
        length = row.get("budget") or row["steps"]
        groups.setdefault((row["dataset"], row["labels"], row["block"], row["mixture_share"], length), []).append(row)
    lines, unseen = [], []
    for key, own in groups.items():
        mean = {name: np.mean([row[name] for row in own]) for name in own[0] if isinstance(own[0][name], int | float)}
        cells = [*key[:3], str(key[3]), f"{mean['parameters']:,.0f}", f"{mean['steps']:.0f}", f"{mean['seconds']:.0f}"]
        cells += [f"{mean_sd([row['loss'] for row in own], 4)} ({len(own)})", f"{mean['loss_of_mixture']:.4f}"]
        steps = ["–"] * 4
        if "own" in mean:
            steps[:3] = [
                f"{mean['own']:+.1%} / {mean['random']:+.1%}",
                f"{mean['lower']:.0%}",
                f"{mean['cosine']:.2f}",
            ]
        if "objective" in mean:
            steps[3] = f"{mean['objective']:+.0%}"
        lines.append([*cells, *steps])
        if "pearson" in mean:
            unseen.append([key[2], *(mean_sd([row[name] for row in own]) for name in UNSEEN)])
    tables = [markdown(header, lines)]
    if unseen:
        tables.append(markdown([f"unseen: {', '.join(HELD_OUT)}", *UNSEEN.values()], unseen))
    return "\n\n".join(tables)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--blocks", nargs="+", choices=sorted(BLOCKS), default=list(BLOCKS))
    parser.add_argument("--mixture_shares", nargs="+", type=float, default=[0.3], help="See `wbdit train --help`.")
    parser.add_argument("--labels", nargs="+", choices=LABELS, default=["given"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Seeds of the denoiser's training.")
    parser.add_argument("--max_train_steps", type=int, default=600)
    parser.add_argument("--seconds", type=float, help="CPU seconds of each training, in place of --max_train_steps.")
    parser.add_argument("--train_batch_size", type=int, default=256)
    args = parse(parser, table)
    torch.set_num_threads(1)  # more threads do not help networks of this size, and times are comparable
    for seed, dataset, labels in product(args.seeds, args.dataset, args.labels):
        add_rows(args.output, measure(dataset, labels, [seed], args, read_results(args.output, [])))
    print(table(read_results(args.output, [])))


if __name__ == "__main__":
    main()
