"""Trains generators on datasets and judges their cells: one split, one evaluator, cells held out from all training.

    python benchmarks/quality.py --dataset ../shared/data/pbmc3k.h5ad --models program \
        --output lab/results/quality_cpu.json
    python benchmarks/quality.py --table lab/results/quality_cpu.json

Our models are `program` (the defaults), `program-white-box` (the published block), `program-dit` (the plain DiT block)
and `expression` (the paper's space). They are trained for the same number of steps, so the speed of the machine does
not matter. The first one comes with its baselines: cells that its codec makes without the denoiser. Other people's
generators are in race.py.

`--development` splits the training cells once more and judges on those, for choices. `--scale log1p` trains on
log1p(CP10k) of a file of counts. `--scale tpm` also divides by made-up gene lengths and rounds to 0.01 per million,
so that no counts can be recovered. Both are judged as log values.

`CONFIGS` has the label keys and values of the datasets. `--table` prints the excess of each training, the excess of
each dataset over its trainings, and all headline metrics.
"""

import argparse
import copy
import itertools
import os
import platform
import re
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
import torch
from common import drop_empty_cells, excess_text, make_parser, markdown, mean_sd, parse, read_results, write_results
from scipy import sparse

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.data import CellSplit, read_cells
from wbdit_diffusers.evaluation import draw_baselines, draw_samples, evaluate_cells, to_markdown
from wbdit_diffusers.processing import log_normalize
from wbdit_diffusers.sampling import SCHEDULERS, make_scheduler
from wbdit_diffusers.training import TrainingConfig, train


# Three tokens of eight values, for blocks whose projections are shared by all tokens
WIDE = {"patch_size": 8, "attention_head_dim": 48}
OURS = {
    "program": {},
    "program-white-box": {"block_type": "white_box", **WIDE},
    "program-dit": {"block_type": "dit", **WIDE},
    # Smaller than published: that shape learns too little in minutes on a CPU
    "expression": {"codec": "expression", "num_attention_heads": 4, "attention_head_dim": 48},
}
HEADLINE = {
    "auc_forest": "forest",
    "auc_boosting": "boosting",
    "auc_regression": "regression",
    "w2": "W2",
    "mmd2": "MMD²",
    "variance_ratio": "variance",
    "zero_fraction_error": "zeros",
    "gene_correlation": "gene-gene",
    "library_size_w1": "library size",
    "recall": "recall",
    "membership_auc": "membership",
    "purity": "purity",
    "lfc_slope": "LFC slope",
    "f1": "F1",
}
REFERENCE = "real reference"
CONFIGS = {  # by the name of a file
    "hnscc": {"label_keys": ["cell_type"], "values": "log"},
    "hnscc_puram_chetah_subset_log": {"label_keys": ["cell_type"], "values": "log"},
    "kang_ifnb_pbmc": {"label_keys": ["cell_type", "condition"]},
    "pancreas_endocrinogenesis": {"label_keys": ["cell_type"]},
    "paul15": {"label_keys": ["cell_type"]},
    "pbmc3k": {"label_keys": ["cell_type"]},
    "pollen_smartseq": {"label_keys": ["cell_type"]},
    "zheng_facs_pbmc": {"label_keys": ["cell_type"]},
}


def train_ours(
    adata: ad.AnnData, folder: Path, model: str, values: str, label_keys: list[str], seed: int, train_flags: dict
) -> ScRNAGenerationPipeline:
    """Trains one of our models, or loads it if the folder has it."""
    if not (folder / "model_index.json").exists():
        flags = {"label_keys": label_keys, "seed": seed, "resume_from_checkpoint": "latest"}
        flags |= {"values": values, "checkpointing_steps": 10**9, **OURS[model], **train_flags}
        train(adata, TrainingConfig(output_dir=folder, **flags))
    pipe = ScRNAGenerationPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def as_log1p(adata: ad.AnnData) -> ad.AnnData:
    """log1p(CP10k) of counts."""
    matrix = log_normalize(sparse.csr_matrix(adata.X), np.asarray(adata.X.sum(axis=1)).ravel())
    return ad.AnnData(matrix, obs=adata.obs, var=adata.var)


def as_tpm(adata: ad.AnnData) -> ad.AnnData:
    """log2(TPM / 10 + 1) of counts, with made-up gene lengths and TPM rounded to 0.01."""
    lengths = np.random.default_rng(0).lognormal(7.5, 0.8, adata.n_vars)
    tpm = sparse.csr_matrix(adata.X, dtype=np.float64) @ sparse.diags_array(1 / lengths)
    tpm = sparse.csr_matrix(sparse.diags_array(1e6 / np.asarray(tpm.sum(axis=1)).ravel()) @ tpm)
    tpm.data = np.log2(np.round(tpm.data, 2) / 10 + 1)
    tpm.eliminate_zeros()
    return drop_empty_cells(ad.AnnData(tpm.astype(np.float32), obs=adata.obs, var=adata.var))


SCALES = {"log1p": as_log1p, "tpm": as_tpm}


def usual_label_keys(path: Path) -> list[str]:
    return CONFIGS.get(path.stem, {}).get("label_keys", [])


def run_name(
    path: Path, seed: int, label_keys: list[str] | None, scale: str | None = None, num_cells: int | None = None
) -> str:
    """Name of a training on a dataset, and of its entry in a JSON file. It mentions what differs from the default."""
    name = path.stem if scale is None else f"{path.stem} as {scale}"
    name += "" if num_cells is None else f", {num_cells} cells"
    if label_keys not in (None, usual_label_keys(path)):
        name += f", by {' and '.join(label_keys) or 'no label'}"
    return name if seed == 0 else f"{name}, seed {seed}"


def draw_variants(
    pipe: ScRNAGenerationPipeline, model: str, test: ad.AnnData, seed: int, args: argparse.Namespace
) -> dict[str, list[ad.AnnData]]:
    """Samples for each combination of dtype, guidance, solver and number of steps, by name."""
    scheduler_config, variants = pipe.scheduler.config, {}
    for dtype, scale, scheduler, steps in itertools.product(
        args.dtypes, args.guidance_scales, args.schedulers, args.steps
    ):
        cast = pipe if dtype == "float32" else copy.deepcopy(pipe).to(getattr(torch, dtype))
        if scheduler is not None:
            cast.scheduler = make_scheduler(scheduler, scheduler_config)
        parts = [model, dtype if dtype != "float32" else None, scheduler, f"{steps} steps" if steps else None]
        parts.append(f"guidance {scale:g}" if scale != 1.0 else None)
        name = ", ".join(part for part in parts if part)
        variants[name], _ = draw_samples(
            cast, test, args.num_samples, seed=seed, guidance_scale=scale, num_inference_steps=steps
        )
    return variants


def machine() -> dict[str, str | int]:
    return {
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


def judge_dataset(path: Path, label_keys: list[str], seed: int, name: str, args: argparse.Namespace) -> dict:
    """Trains all models on one dataset and judges their cells together, with one reference."""
    adata = drop_empty_cells(read_cells(path))
    values = CONFIGS.get(path.stem, {}).get("values", "counts") if args.scale is None else "log"
    if args.scale is not None:
        adata = SCALES[args.scale](adata)
    label_key = label_keys[0] if label_keys else None
    if args.num_cells is not None:
        cells = np.random.default_rng(0).permutation(adata.n_obs)[: args.num_cells]
        adata = adata[np.sort(cells)].copy()
    if args.development:
        adata = CellSplit.draw(adata, label_key=label_key, seed=1000).apply(adata)[0].copy()
    seconds, columns, pipe = {}, {}, None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.work_dir or temporary, name)
        for model in args.models:
            start = time.process_time()
            trained = train_ours(adata, folder / model, model, values, label_keys, seed, args.train_flags)
            seconds[model] = time.process_time() - start
            train_cells, test = CellSplit.load(folder / model).apply(adata)
            test = test[trained.processor.knows_labels(test)]
            columns |= draw_variants(trained, model, test, seed, args)
            pipe = pipe or trained
    first, *others = columns
    baselines = {name: columns[name] for name in others}
    baselines |= draw_baselines(pipe, train_cells, test, args.num_samples, seed)
    start = time.process_time()
    report = evaluate_cells(
        columns[first],
        train_cells,
        test,
        label_key=label_keys,
        values=values,
        baselines=baselines,
        donor_key="donor" if "donor" in adata.obs else None,
        seed=seed,
    )
    seconds["judging"] = time.process_time() - start
    return {
        "model": first,
        "num_programs": pipe.codec.config.get("num_programs"),
        "CPU seconds": {name: round(value) for name, value in seconds.items()},
        "machine": machine(),
        "report": report,
    }


def excess_table(results: dict) -> str:
    """The excess of each training, by the classifier for which it is largest."""
    columns = list(dict.fromkeys(name for entry in results.values() for name in entry["report"]["excess"]))
    rows = [
        [name, str(entry["report"]["num_test"]), *(excess_text(entry["report"]["excess"], one) for one in columns)]
        for name, entry in results.items()
    ]
    return markdown(["dataset", "held-out cells", *columns], rows)


def trainings_table(results: dict) -> str:
    """The excess of each dataset: mean and standard deviation over its trainings."""
    trainings: dict[str, list[dict]] = {}
    for name, entry in results.items():
        trainings.setdefault(re.sub(r", seed \d+$", "", name), []).append(entry["report"]["excess"])
    columns = list(dict.fromkeys(name for of_one in trainings.values() for name in of_one[0]))
    rows = []
    for name, excesses in trainings.items():
        cells = []
        for column in columns:
            values = [excess[column]["mean"] for excess in excesses if column in excess]
            cells.append(f"{np.mean(values):.3f}" if values else "–")
            cells[-1] += f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        rows.append([name, str(len(excesses)), *cells])
    return markdown(["dataset", "trainings", *columns], rows)


def headline_table(results: dict) -> str:
    """The headline metrics of all datasets and columns."""
    rows = []
    for dataset, entry in results.items():
        metrics = entry["report"]["metrics"]
        for name in sorted(metrics, key=lambda name: (name != REFERENCE, name != "generated")):
            title = entry["model"] if name == "generated" else name
            rows.append([dataset, title, *(mean_sd(metrics[name].get(metric, [])) for metric in HEADLINE)])
    return markdown(["dataset", "cells", *HEADLINE.values()], rows)


def tables(results: dict) -> str:
    return "\n\n".join(table(results) for table in (excess_table, trainings_table, headline_table))


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(OURS), default=["program"])
    parser.add_argument("--num_samples", type=int, default=3, help="Number of samples to judge.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="Seeds of split, training and sampling.")
    parser.add_argument("--guidance_scales", nargs="+", type=float, default=[1.0])
    parser.add_argument("--schedulers", nargs="+", choices=sorted(SCHEDULERS), default=[None])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32"])
    parser.add_argument("--steps", nargs="+", type=int, default=[None], help="Numbers of denoising steps.")
    parser.add_argument("--development", action="store_true", help="Judge on cells set aside from the training cells.")
    parser.add_argument("--label_keys", nargs="*", help="obs keys. Default: those of CONFIGS. None: unconditional.")
    parser.add_argument("--scale", choices=sorted(SCALES), help="Make log values of files of counts.")
    parser.add_argument("--num_cells", type=int, help="Number of random cells to take of each dataset. Default: all.")
    parser.add_argument("--train_flags", nargs="*", default=[], metavar="FIELD=VALUE", help="Of TrainingConfig.")
    args = parse(parser, tables, needs_work_dir=False)
    args.train_flags = dict(flag.split("=", 1) for flag in args.train_flags)
    if args.models[0] not in OURS:
        parser.error("The first of --models must be one of ours: the baselines are made with its codec.")
    return args


def main():
    args = parse_args()
    results = read_results(args.output, {})
    for path, seed in itertools.product(args.dataset, args.seeds):
        label_keys = args.label_keys if args.label_keys is not None else usual_label_keys(path)
        name = run_name(path, seed, label_keys, args.scale, args.num_cells)
        results[name] = entry = judge_dataset(path, label_keys, seed, name, args)
        write_results(args.output, results)
        print(f"\n## {name}, CPU seconds: {entry['CPU seconds']}\n\n{to_markdown(entry['report'])}", flush=True)


if __name__ == "__main__":
    main()
