"""Measures pipelines of few cells, which start from another pipeline or from nothing.

    python benchmarks/few_cells.py --dataset ../shared/data/pbmc3k.h5ad --sources ../shared/data/kang_ifnb_pbmc.h5ad \\
        ../shared/data/zheng_facs_pbmc.h5ad --work_dir WORK --output lab/results/few_cells_cpu.json
    python benchmarks/few_cells.py --table lab/results/few_cells_cpu.json

The old pipeline is trained on `--sources`, on the genes that they share, by `cell_type`. `--numbers` of the training
cells are kept, with the shares of their types; types that are lost are not judged. The held-out cells are the same for
all, and the reference is drawn from all training cells. The excess is that of `wbdit evaluate`, one draw. Seconds are
those of a training on one core. `--settings` is JSON of further fields of the training config.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
from common import add_rows, drop_empty_cells, make_parser, markdown, mean_sd, parse, read_results
from sklearn.model_selection import train_test_split

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.data import read_cells
from wbdit_diffusers.evaluation import evaluate_cells
from wbdit_diffusers.evaluation.classifiers import JUDGES
from wbdit_diffusers.evaluation.samples import draw_samples
from wbdit_diffusers.training import TrainingConfig, train


NUMBERS = (100, 300, 1000)
# Names of pbmc3k that the old pipeline knows by another one
RENAMED = {
    "CD14+ Mono": "CD14 Mono",
    "FCGR3A+ Mono": "CD16 Mono",
    "Memory CD4 T": "CD4 Memory T",
    "Naive CD4 T": "CD4 Naive T",
    "Platelet": "Mk",
}
WAYS: dict[str, dict] = {
    "from nothing": {},
    "from the other pipeline": {},
    "the same, codec frozen": {"freeze_codec": True},
}


def measure(args, done: set) -> Iterator[dict]:
    """The rows of a dataset."""
    old, settings = args.work_dir / "old", {"label_keys": ["cell_type"], **json.loads(args.settings)}
    if not (old / "model_index.json").exists():
        sources = ad.concat([read_cells(path) for path in args.sources], join="inner")
        sources.obs_names_make_unique()
        train(sources, TrainingConfig(output_dir=old, **settings))
    cells = drop_empty_cells(read_cells(args.dataset[0]))
    cells = cells[cells.obs["cell_type"] != "unlabelled"].copy()
    types = cells.obs["cell_type"].astype(str).to_numpy()
    rows, held = train_test_split(np.arange(cells.n_obs), test_size=0.3, stratify=types, random_state=0)
    for seed in args.seeds:
        for number in args.numbers:
            kept, _ = train_test_split(rows, train_size=number, stratify=types[rows], random_state=seed)
            known = np.isin(types[held], types[kept])
            for way, own in WAYS.items():
                if (number, seed, way) in done:
                    continue
                folder = args.work_dir / f"{number}-{seed}-{way.replace(' ', '_').replace(',', '')}"
                if way != "from nothing":
                    here = {name: other for name, other in RENAMED.items() if name in types[kept]}
                    own = {**own, "init_from": old, "init_labels": here}
                start = time.process_time()
                if not (folder / "model_index.json").exists():
                    train(cells[kept].copy(), TrainingConfig(output_dir=folder, seed=seed, **settings, **own))
                seconds = time.process_time() - start
                pipe = ScRNAGenerationPipeline.from_pretrained(folder)
                pipe.set_progress_bar_config(disable=True)
                samples, test = draw_samples(pipe, cells[held[known]], 1)
                report = evaluate_cells(samples, cells[rows], test, "cell_type")
                excess = report["excess"]["generated"]
                yield {"cells": number, "seed": seed, "way": way, "seconds": seconds, "excess": excess["mean"]} | {
                    "by_judge": excess["by_judge"],
                    "programs": pipe.codec.config.num_programs,
                    "genes": pipe.codec.config.num_genes,
                }


def table(results: list[dict]) -> str:
    """Means over seeds."""
    rows = []
    for number in sorted({row["cells"] for row in results}):
        for way in WAYS:
            own = [row for row in results if row["cells"] == number and row["way"] == way]
            if own:
                judges = [mean_sd([row["by_judge"][name] for row in own]) for name in JUDGES]
                columns = mean_sd([row["excess"] for row in own]), *judges, mean_sd([row["seconds"] for row in own], 0)
                rows.append([str(number), way, *columns])
    return markdown(["training cells", "start", "excess", *JUDGES, "CPU seconds"], rows)


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--sources", nargs="*", type=Path, default=[], help="Cells of the old pipeline.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="Seeds of the cells and of the trainings.")
    parser.add_argument("--numbers", nargs="+", type=int, default=NUMBERS, help="Numbers of training cells.")
    parser.add_argument("--settings", default="{}", help="JSON of further fields of the config.")
    args = parse(parser, table)
    done = {(row["cells"], row["seed"], row["way"]) for row in read_results(args.output, [])}
    print(table(add_rows(args.output, measure(args, done))))
