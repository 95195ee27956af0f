"""Solvers and steps in code space: do the latents that they draw have the spread of the training cells'?

    python benchmarks/solvers.py --work_dir WORK --output lab/results/solvers_cpu.json \\
        --dataset ../shared/data/{pbmc3k,kang_ifnb_pbmc,zheng_facs_pbmc,paul15,pancreas_endocrinogenesis}.h5ad
    python benchmarks/solvers.py --table lab/results/solvers_cpu.json

`--work_dir` is that of `benchmarks/quality.py`, whose pipelines (model `program`) are taken. For each solver, number
of steps and guidance: latents with the labels of `--max_cells` training cells; the ratio of their variance to these
cells' (mean and extremes over the latents' dimensions), the same ratio within labels, and how well a forest tells both
apart (AUC). The mean of `--seeds` samples. What cells are like is judged by `quality.py --schedulers --steps`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from rows import add_rows, parser_of_rows

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.data import CellSplit, drop_empty_cells, read_cells
from wbdit_diffusers.evaluation.cells import CellArrays, combined_labels
from wbdit_diffusers.evaluation.classifiers import expression_view, forest, two_sample_auc
from wbdit_diffusers.sampling import SCHEDULERS, make_scheduler


# "trailing": steps that are equal in time, as Diffusers' own default but for where they begin
CHOICES = [("ddpm", 1000), ("ddpm", 20), ("dpmsolver++, trailing", 50), ("dpmsolver++, trailing", 20)]
CHOICES += [("dpmsolver++, trailing", 10), ("dpmsolver++", 20), ("dpmsolver++", 15), ("dpmsolver++", 10)]
CHOICES += [("dpmsolver++", 7), ("unipc", 20), ("unipc", 10)]


def within(latents: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Deviations from the mean of each label."""
    deviations = latents.copy()
    for label in np.unique(labels):
        deviations[labels == label] -= latents[labels == label].mean(axis=0)
    return deviations


def measure(path: Path, args: argparse.Namespace) -> list[dict]:
    folder = args.work_dir / path.stem / "program"
    pipe = ScRNAGenerationPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    train, _ = CellSplit.load(folder).apply(drop_empty_cells(read_cells(path)))
    if train.n_obs > args.max_cells:
        train = train[np.sort(np.random.default_rng(0).choice(train.n_obs, args.max_cells, replace=False))]
    codes, keys = pipe.encode_cells(train).double().numpy(), list(pipe.processor.label_keys)
    names, config = combined_labels(train, keys), pipe.scheduler.config
    conditions = {key: train.obs[key].astype(str).tolist() for key in keys}

    def told(drawn: np.ndarray, seed: int) -> float:
        sides = (CellArrays(latents, latents, labels=names) for latents in (codes, drawn))
        return two_sample_auc(*sides, expression_view, forest, seed)

    rows = []
    for guidance in args.guidance_scales if keys else [1.0]:
        for scheduler, steps in CHOICES:
            name, _, trailing = scheduler.partition(", ")
            pipe.scheduler = make_scheduler(name, config)
            if trailing:
                pipe.scheduler = SCHEDULERS[name].from_config(config, use_exponential_sigmas=False)
            row = {"dataset": path.stem, "scheduler": scheduler, "steps": steps, "guidance": guidance}
            ratios, inside, aucs = [], [], []
            for seed in range(args.seeds):
                drawn = pipe(
                    num_cells=len(codes),
                    conditions=conditions,
                    guidance_scale=guidance,
                    num_inference_steps=steps,
                    generator=torch.Generator().manual_seed(seed),
                    output_type="latent",
                ).cells
                drawn = drawn.double().numpy()
                ratios.append(drawn.var(axis=0) / codes.var(axis=0))
                inside.append(within(drawn, names).var(axis=0) / within(codes, names).var(axis=0))
                aucs.append(told(drawn, seed))
            ratios = np.mean(ratios, axis=0)
            row |= {"variance": float(ratios.mean()), "lowest": float(ratios.min()), "highest": float(ratios.max())}
            row |= {
                "variance_within": float(np.mean(inside)),
                "auc": float(np.mean(aucs)),
                "auc_sd": float(np.std(aucs)),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """A row for each choice; a column for each dataset: variance (lowest to highest dimension), within labels, AUC."""
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    lines = ["| guidance | solver | steps | " + " | ".join(datasets) + " |", "|---" * (3 + len(datasets)) + "|"]
    for choice in dict.fromkeys((row["guidance"], row["scheduler"], row["steps"]) for row in rows):
        cells = []
        for dataset in datasets:
            found = [
                r for r in rows if (r["dataset"], r["guidance"], r["scheduler"], r["steps"]) == (dataset, *choice)
            ]
            if not found:
                cells.append("–")
                continue
            row = found[-1]
            span = f"{row['variance']:.3f} ({row['lowest']:.2f} to {row['highest']:.2f})"
            cells.append(f"{span}, {row['variance_within']:.3f}; {row['auc']:.3f}")
        lines.append("| " + " | ".join([f"{choice[0]:g}", *map(str, choice[1:]), *cells]) + " |")
    return "\n".join(lines)


def main():
    parser = parser_of_rows(__doc__)
    parser.add_argument("--guidance_scales", nargs="+", type=float, default=[1.0, 1.25])
    parser.add_argument("--max_cells", type=int, default=1000, help="Latents to draw at most.")
    parser.add_argument("--seeds", type=int, default=2, help="Samples of each choice.")
    args = parser.parse_args()
    add_rows(args, lambda path: [measure(path, args)], table)


if __name__ == "__main__":
    main()
