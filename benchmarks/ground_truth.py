"""Tests tools for differential expression on cells whose true changes are known.

    python benchmarks/ground_truth.py --model WORK/kang_ifnb_pbmc --output lab/results/ground_truth_cpu.json
    python benchmarks/ground_truth.py --table lab/results/ground_truth_cpu.json

Two groups of cells of one type differ in one gene program, held at its mean and at a dose above it. The truth
is each gene's log2 fold change of expected counts over many latents of either group, without sampling noise. A gene is
changed from 0.5, and unchanged below 0.1. With dose 0, every call is wrong. `cell_type` and `program` default to the
most frequent type and the program that explains most.
"""

from collections.abc import Iterator

import anndata as ad
import numpy as np
import scanpy as sc
import torch
from common import add_rows, make_parser, markdown, mean_sd, parse

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.interpretation import hold_program


DOSES, NUM_CELLS, NUM_TRUTH = (0.0, 0.5, 1.0, 2.0), (50, 200), 2000
CHANGED, UNCHANGED, MIN_COUNT = 0.5, 0.1, 0.05  # log2 fold changes; counts of an average cell


def draw(
    pipe: ScRNAGenerationPipeline, program: str, cell_type: str, dose: float, seed: int, number: int
) -> ad.AnnData:
    """Cells with a held program, and their expected counts in `layers["expected"]`."""
    guide = hold_program(pipe, pipe.gaussian_mixture, program, dose)
    latents = pipe(
        num_cells=number,
        cell_types=cell_type,
        guides=[guide],
        output_type="latent",
        generator=torch.Generator().manual_seed(seed),
    ).cells
    labels = pipe.processor.encode_conditions({pipe.processor.label_keys[0]: cell_type}, number)
    cells = pipe.decode_latents(latents, labels, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        cells.layers["expected"] = pipe.codec.decode(latents, None, labels).mean().numpy()
    return cells


def measure(model: str, cell_type: str | None, program: str | None, seeds: list[int]) -> Iterator[dict]:
    pipe = ScRNAGenerationPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    frequent = pipe.processor.label_combinations[pipe.processor.label_frequencies.argmax(), 0]
    cell_type = cell_type or pipe.processor.config.categories[0][frequent]
    program = program or "program_0"
    truth = {
        dose: draw(pipe, program, cell_type, dose, 10_000, NUM_TRUTH).layers["expected"].mean(0) for dose in DOSES
    }
    for dose in DOSES:
        log_fold_change = np.log2((truth[dose] + 1e-4) / (truth[0.0] + 1e-4))
        seen = (truth[dose] + truth[0.0]) / 2 > MIN_COUNT
        changed, unchanged = seen & (np.abs(log_fold_change) > CHANGED), seen & (np.abs(log_fold_change) < UNCHANGED)
        for number in NUM_CELLS:
            for seed in seeds:
                groups = [
                    draw(pipe, program, cell_type, value, 2 * seed + i, number) for i, value in enumerate((0.0, dose))
                ]
                cells = ad.concat(groups, keys=["a", "b"], label="group", index_unique="-")
                sc.pp.normalize_total(cells, target_sum=1e4)
                sc.pp.log1p(cells)
                for method in ("t-test", "wilcoxon"):
                    sc.tl.rank_genes_groups(cells, "group", groups=["b"], reference="a", method=method)
                    table = sc.get.rank_genes_groups_df(cells, "b").set_index("names").loc[cells.var_names]
                    called = (table["pvals_adj"] < 0.05).to_numpy() & seen
                    yield {
                        "dose": dose, "cells": number, "seed": seed, "method": method, "cell_type": cell_type,
                        "program": program, "changed": int(changed.sum()), "called": int(called.sum()),
                        "power": float(called[changed].mean()) if changed.any() else None,
                        "wrong": float(unchanged[called].mean()) if called.any() else 0.0,
                        "correlation": float(np.corrcoef(table["logfoldchanges"][seen], log_fold_change[seen])[0, 1])
                        if dose else None,
                    }  # fmt: skip


def table(results: list[dict]) -> str:
    """Means over seeds."""
    rows = []
    for dose, number, method in dict.fromkeys((r["dose"], r["cells"], r["method"]) for r in results):
        own = [r for r in results if (r["dose"], r["cells"], r["method"]) == (dose, number, method)]
        columns = [mean_sd([r[name] for r in own], digits) for name, digits in
                   (("changed", 0), ("called", 0), ("power", 2), ("wrong", 3), ("correlation", 2))]  # fmt: skip
        rows.append([f"{dose:g}", str(number), method, *columns])
    header = ["dose", "cells a group", "method", "changed genes", "called", "power", "called, but unchanged"]
    return markdown([*header, "correlation of log fold changes"], rows)


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--model", help="A pipeline with a Gaussian mixture.")
    parser.add_argument("--cell_type")
    parser.add_argument("--program")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parse(parser, table, needs_work_dir=False)
    print(table(add_rows(args.output, measure(args.model, args.cell_type, args.program, args.seeds))))
