"""How real can cells be, at best, from as many training cells? The excess of a codec whose form is exactly right.

    python benchmarks/floor.py --work_dir WORK --output lab/results/floor_cpu.json --factors 1 4 \\
        --dataset ../shared/data/{pbmc3k,kang_ifnb_pbmc,zheng_facs_pbmc}.h5ad
    python benchmarks/floor.py --table lab/results/floor_cpu.json

A trained pipeline is taken for the truth: it generates training and held-out cells, as many of each label as the real
dataset has. Stage one is fitted to these training cells, and their codes are decoded, as in the column "training
latents resampled" of `benchmarks/quality.py`. The linear decoder, the likelihood and the label effects are then no
approximation, and no denoiser errs: what a classifier still sees is the chance of which cells were in the training
set, which every generator that is fitted to them shares. With `--factors` there are so many times as many training
cells, for the same held-out ones. "true model" are cells that the truth draws once more, whose excess is zero but for
chance.

`--work_dir` is that of `benchmarks/quality.py`, whose pipelines (model `program`) are taken. In this world the
modelled genes are all there are.
"""

import argparse
import json
from pathlib import Path

import anndata as ad
import numpy as np
import torch
from accelerate import PartialState
from codec import draw_cells
from rows import add_rows, parser_of_rows

from wbdit_diffusers import ScRNAGenerationPipeline, ScRNAProcessor
from wbdit_diffusers.data import CellDataset, CellSplit, drop_empty_cells, encode_cells, read_cells
from wbdit_diffusers.evaluation import evaluate_cells
from wbdit_diffusers.evaluation.references import resampled_latents
from wbdit_diffusers.training import TrainingConfig
from wbdit_diffusers.training.codec import fit_program_codec


JUDGES = ("forest", "boosting", "regression")


def generate(pipe: ScRNAGenerationPipeline, like: ad.AnnData, times: int, seed: int) -> ad.AnnData:
    """As many cells of each label as `like` has, `times` over; their library is that of the modelled genes."""
    labels = {key: like.obs[key].astype(str).tolist() * times for key in pipe.processor.label_keys}
    generator = torch.Generator().manual_seed(seed)
    cells = pipe(num_cells=like.n_obs * times, conditions=labels, generator=generator).cells
    del cells.obs["library_size"]
    cells.obs_names = [f"{seed}-{i}" for i in range(cells.n_obs)]
    return drop_empty_cells(ad.AnnData(cells.X, obs=cells.obs, var=cells.var))


def resample(train: ad.AnnData, test: ad.AnnData, label_keys: list[str], num_samples: int) -> list[ad.AnnData]:
    """Stage one fitted to training cells, and samples of their codes with the held-out labels, decoded."""
    processor = ScRNAProcessor(label_keys=label_keys, num_genes=None).fit(train)
    dataset = CellDataset(train, processor)
    config = TrainingConfig(output_dir=Path("."), label_keys=label_keys, num_genes=0)
    codec = fit_program_codec(config, dataset, torch.device("cpu"))
    latents, wanted = encode_cells(dataset, codec), processor.encode_labels(test)
    samples = []
    for seed in range(num_samples):
        drawn = resampled_latents(
            latents.double().numpy(), dataset.class_labels.numpy(), wanted.numpy(), np.random.default_rng(seed)
        )
        samples.append(draw_cells(codec, processor, torch.from_numpy(drawn).float(), wanted, seed))
    return samples


def measure(path: Path, args: argparse.Namespace) -> list[dict]:
    folder = args.work_dir / path.stem / "program"
    pipe = ScRNAGenerationPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    train, test = CellSplit.load(folder).apply(drop_empty_cells(read_cells(path)))
    test = test[pipe.processor.knows_labels(test)]
    label_keys = list(pipe.processor.label_keys)
    test = generate(pipe, test, 1, seed=1)
    rows = []
    for factor in args.factors:
        world = generate(pipe, train, factor, seed=2)
        samples = resample(world, test, label_keys, args.num_samples)
        genes = samples[0].var_names  # stage one leaves out those that hardly any cell has
        world, held_out = world[:, genes].copy(), test[:, genes].copy()
        true_cells = [generate(pipe, test, 1, seed=10 + i)[:, genes].copy() for i in range(args.num_samples)]
        for sample in samples:
            del sample.obs["library_size"]  # the judged genes are all there are, on both sides
        report = evaluate_cells(samples, world, held_out, label_key=label_keys, baselines={"true model": true_cells})
        row = {"dataset": path.stem, "num_train": world.n_obs, "num_test": test.n_obs, "excess": report["excess"]}
        row["metrics"] = report["metrics"]
        rows.append(row)
        print(json.dumps({key: row[key] for key in row if key != "metrics"}), flush=True)
    return rows


def table(rows: list[dict]) -> str:
    lines = [
        "| dataset | training cells | held-out cells | right form | true model | forest, boosting, regression |",
        "|---" * 6 + "|",
    ]
    for row in rows:
        excess = row["excess"]
        cells = [row["dataset"], f"{row['num_train']:,}", str(row["num_test"])]
        for name in ("generated", "true model"):
            cells.append(f"{excess[name]['mean']:.3f} ± {excess[name]['sd']:.3f} ({excess[name]['judge']})")
        aucs = (np.mean(row["metrics"]["generated"][f"auc_{judge}"]) for judge in JUDGES)
        cells.append(", ".join(f"{auc:.3f}" for auc in aucs))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = parser_of_rows(__doc__)
    parser.add_argument("--factors", nargs="+", type=int, default=[1], help="Training cells, times the real number.")
    parser.add_argument("--num_samples", type=int, default=3, help="Samples to judge.")
    args = parser.parse_args()
    PartialState(cpu=True)  # the training's log asks for it
    add_rows(args, lambda path: [measure(path, args)], table)


if __name__ == "__main__":
    main()
