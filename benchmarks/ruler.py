"""The ruler measured: what classifiers say of cells of one distribution, and how much they see with more cells.

    python benchmarks/ruler.py null --dataset ../shared/data/pbmc3k.h5ad --output null.json
    python benchmarks/ruler.py curve outputs/pbmc3k --dataset ../shared/data/pbmc3k.h5ad --output curve.json

`null` splits real cells in two and lets every judge tell the halves apart: the mean AUC must be 0.5, whether labels
are matched, drawn by chance or unknown. `curve` draws cells from a trained pipeline and judges them and the real
reference with 100 to 2,000 cells a side.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.data import CellSplit, drop_empty_cells, read_cells
from wbdit_diffusers.evaluation.cells import CellArrays, generated_cells, real_cells
from wbdit_diffusers.evaluation.classifiers import JUDGES, judge, two_sample_auc
from wbdit_diffusers.evaluation.references import draw_matching, split_halves
from wbdit_diffusers.evaluation.report import excess


def null_sides(
    cells: CellArrays, setting: str, size: int, rng: np.random.Generator
) -> tuple[CellArrays, CellArrays] | None:
    """
    Two sides of one distribution, `None` if there are too few cells: `"matched"` (as many cells of each label on
    both), `"iid"` (one side in the proportions of all labels, the labels of the other drawn by chance from them) or
    `"unlabelled"` (both drawn by chance, labels unknown).
    """
    if 2 * size > len(cells):
        return None
    shuffled = rng.permutation(len(cells))
    if setting == "unlabelled":
        cells = CellArrays(cells.matrix, cells.expression, cells.library_size)
        return cells[shuffled[:size]], cells[shuffled[size : 2 * size]]
    if setting == "matched":
        # Neighbours in the order of labels have the same one, but where a label has an odd number of cells.
        first, second = split_halves(cells.labels[shuffled])
        pool = cells[shuffled[second]]
        wanted = cells[shuffled[first]]
        labels, numbers = np.unique(wanted.labels, return_counts=True)
        numbers = np.minimum(numbers, [(pool.labels == label).sum() for label in labels])
        wanted = wanted[np.concatenate([np.flatnonzero(wanted.labels == x)[:n] for x, n in zip(labels, numbers)])]
        wanted = wanted[np.sort(rng.permutation(len(wanted))[:size])]
        return wanted, pool[draw_matching(pool.labels, wanted.labels, rng)]
    order = shuffled[np.argsort(cells.labels[shuffled], kind="stable")]
    first = order[(np.linspace(0, len(order), size, endpoint=False) + rng.uniform(0, len(order) / size)).astype(int)]
    rest = np.setdiff1d(shuffled, first)
    labels = rng.choice(cells.labels[first], size)
    return cells[first], cells[rest[draw_matching(cells.labels[rest], labels, rng)]]


def null(args: argparse.Namespace):
    """Mean AUC and its standard error for each setting, number of cells and judge."""
    results = []
    for path in args.dataset:
        adata = drop_empty_cells(read_cells(path))
        label_keys = [args.label_key] if args.label_key in adata.obs else []
        total = np.asarray(adata.X.sum(axis=0)).ravel()
        genes = adata.var_names[np.sort(np.argsort(-total)[: args.num_genes])]
        cells = real_cells(adata, genes, label_keys=label_keys)
        for size in args.sizes:
            for setting in ("matched", "iid", "unlabelled") if label_keys else ("unlabelled",):
                aucs = {name: [] for name in args.judges}
                for seed in range(args.repeats):
                    sides = null_sides(cells, setting, size, np.random.default_rng([seed, size]))
                    if sides is None:
                        break
                    for name in args.judges:
                        aucs[name].append(two_sample_auc(*sides, *JUDGES[name], seed, args.n_jobs))
                if sides is None:
                    continue
                row = {"dataset": path.stem, "cells": size, "setting": setting, "repeats": args.repeats}
                for name, values in aucs.items():
                    row[name] = [float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)]
                results.append(row)
                args.output.write_text(json.dumps(results, indent=1))
                shown = (f"{name} {row[name][0]:.3f} ± {row[name][1]:.3f}" for name in args.judges)
                print(f"| {path.stem} | {size} | {setting} | {' | '.join(shown)} |", flush=True)


def curve(args: argparse.Namespace):
    """AUCs of generated cells and of the real reference, and the excess, for each number of cells a side."""
    adata = drop_empty_cells(read_cells(args.dataset[0]))
    train_cells, test_cells = CellSplit.load(args.model).apply(adata)
    pipe = ScRNAGenerationPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.processor.config
    genes, label_keys = pipe.processor.var_names, list(config.label_keys)
    train, test = (
        real_cells(cells, genes, config.values, config.layer, label_keys) for cells in (train_cells, test_cells)
    )
    train_labels, test_labels = (np.zeros(len(c)) if c.labels is None else c.labels for c in (train, test))
    other_half = split_halves(train_labels)[1]
    largest = min(len(test), max(args.sizes))
    if largest < max(args.sizes):
        print(f"{len(test)} cells are held out: the curve ends there.")
    rows = []
    for size in sorted({min(size, largest) for size in args.sizes}):
        drawn = {"generated": {name: [] for name in JUDGES}, "real reference": {name: [] for name in JUDGES}}
        for seed in range(args.repeats):
            rng = np.random.default_rng([seed, size])
            judged = np.sort(rng.permutation(len(test))[:size])
            reference = train[draw_matching(train_labels, test_labels[judged], rng, other_half)]
            obs = test_cells[judged].obs
            sample = pipe(
                num_cells=size,
                conditions={key: obs[key].astype(str).tolist() for key in label_keys},
                generator=torch.Generator().manual_seed(seed),
            ).cells
            sample = generated_cells(sample, config.values, label_keys)
            for name, cells in (("generated", sample), ("real reference", reference)):
                for judge_name, auc in judge(test[judged], cells, seed, args.n_jobs).items():
                    drawn[name][judge_name].append(auc)
        columns = {name: {f"auc_{key}": auc for key, auc in aucs.items()} for name, aucs in drawn.items()}
        rows.append({"cells": size, **drawn, "excess": excess(columns["generated"], columns["real reference"])})
        args.output.write_text(json.dumps(rows, indent=1))
        aucs = (f"{np.mean(drawn[c][name]):.3f}" for c in drawn for name in JUDGES)
        best = rows[-1]["excess"]
        print(f"| {size} | {' | '.join(aucs)} | {best['mean']:.3f} ± {best['sd']:.3f} ({best['judge']}) |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function, sizes, repeats in (
        ("null", null, [60, 150, 500], 20),
        ("curve", curve, [100, 200, 500, 1000, 2000], 3),
    ):
        command = commands.add_parser(name, description=function.__doc__)
        if name == "curve":
            command.add_argument("model", type=Path, help="Folder of a trained pipeline, with its split.json.")
        else:
            command.add_argument("--num_genes", type=int, default=500, help="The most expressed genes are judged.")
            command.add_argument("--label_key", default="cell_type")
            command.add_argument("--judges", nargs="+", choices=sorted(JUDGES), default=list(JUDGES))
        command.add_argument("--dataset", nargs="+" if name == "null" else 1, type=Path, required=True)
        command.add_argument("--sizes", nargs="+", type=int, default=sizes, help="Cells a side.")
        command.add_argument("--repeats", type=int, default=repeats)
        command.add_argument("--n_jobs", type=int, help="Threads; all cores by default.")
        command.add_argument("--output", type=Path, required=True, help="JSON file.")
        command.set_defaults(function=function)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.function(args)


if __name__ == "__main__":
    main()
