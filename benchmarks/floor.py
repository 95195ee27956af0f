"""Measures the excess of a model whose form is exactly right: the best that a given number of training cells allows.

    python benchmarks/floor.py --work_dir WORK --output lab/results/floor_cpu.json --factors 1 4 \\
        --dataset ../shared/data/{pbmc3k,kang_ifnb_pbmc,zheng_facs_pbmc}.h5ad
    python benchmarks/floor.py --table lab/results/floor_cpu.json

A pipeline that quality.py trained (model `program`) is the truth. It generates training and held-out cells with the
label counts of the real dataset. Stage one is fitted to these training cells, and latents of them are decoded. The
linear decoder, the likelihood and the label effects are then exact, and no denoiser errs. A classifier only sees which
cells happened to be in the training set, as with every generator. `--factors` multiplies the number of training cells.
"true model" is a further draw from the truth, whose excess is zero except for chance.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import torch
from common import add_rows, drop_empty_cells, excess_text, load_run, make_parser, markdown, parse

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.evaluation import draw_baselines, evaluate_cells
from wbdit_diffusers.training import TrainingConfig, train


JUDGES = ("forest", "boosting", "regression")
COLUMN = "training latents resampled"


def generate(pipe: ScRNAGenerationPipeline, like: ad.AnnData, times: int, seed: int) -> ad.AnnData:
    """Generates cells with the label counts of `like`, times a factor. The modelled genes are all genes they have."""
    labels = {key: like.obs[key].astype(str).tolist() * times for key in pipe.processor.label_keys}
    generator = torch.Generator().manual_seed(seed)
    cells = pipe(num_cells=like.n_obs * times, conditions=labels, generator=generator).cells
    obs = cells.obs.drop(columns="library_size").set_axis([f"{seed}-{i}" for i in range(cells.n_obs)])
    return drop_empty_cells(ad.AnnData(cells.X, obs=obs, var=cells.var))


def measure(dataset: Path, args: argparse.Namespace) -> Iterator[dict]:
    pipe, real_train, real_test = load_run(args.work_dir / dataset.stem / "program", dataset)
    label_keys = list(pipe.processor.label_keys)
    test = generate(pipe, real_test, 1, seed=1)
    for factor in args.factors:
        world = generate(pipe, real_train, factor, seed=2)
        with tempfile.TemporaryDirectory() as folder:  # the denoiser is not used: one step
            config = TrainingConfig(output_dir=folder, label_keys=label_keys, num_genes=0, max_train_steps=1)
            fitted = train(world, config)
        samples = draw_baselines(fitted, world, test, args.num_samples)[COLUMN]
        genes = samples[0].var_names  # stage one leaves out genes that hardly any cell has
        true_cells = [generate(pipe, test, 1, seed=10 + i)[:, genes].copy() for i in range(args.num_samples)]
        for sample in samples:
            del sample.obs["library_size"]  # the judged genes are all genes, on both sides
        baselines = {"true model": true_cells}
        real = (world[:, genes].copy(), test[:, genes].copy())
        report = evaluate_cells(samples, *real, label_key=label_keys, baselines=baselines)
        row = {"dataset": dataset.stem, "num_train": world.n_obs, "num_test": test.n_obs}
        yield row | {"excess": report["excess"], "metrics": report["metrics"]}


def table(rows: list[dict]) -> str:
    header = ["dataset", "training cells", "held-out cells", "right form", "true model", ", ".join(JUDGES)]
    lines = []
    for row in rows:
        aucs = [f"{np.mean(row['metrics']['generated'][f'auc_{judge}']):.3f}" for judge in JUDGES]
        columns = [excess_text(row["excess"], name) for name in ("generated", "true model")]
        lines.append([row["dataset"], f"{row['num_train']:,}", str(row["num_test"]), *columns, ", ".join(aucs)])
    return markdown(header, lines)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--factors", nargs="+", type=int, default=[1], help="Factors for the training cells.")
    parser.add_argument("--num_samples", type=int, default=3, help="Number of samples to judge.")
    args = parse(parser, table)
    for dataset in args.dataset:
        rows = add_rows(args.output, measure(dataset, args))
    print(table(rows))


if __name__ == "__main__":
    main()
