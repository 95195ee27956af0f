"""Trains generators on datasets and judges their cells: one split, one evaluator, the same minutes on one machine.

    python benchmarks/quality.py --dataset ../shared/data/pbmc3k.h5ad --minutes 5 --output results.json
    python benchmarks/quality.py --table results.json --bars

Ours, `program` (the default), `program-dit` (its plain DiT) and `expression` (the paper's space), are trained by
training/train.py with its defaults. `scvi` and `scvi-by-type` need `pip install -e ".[benchmark]"`: scVI with its own
defaults, on the same genes, early-stopped or stopped after the same minutes; its cells come from its prior, with
library sizes of training cells (of the same type). Every table is of cells held out from all training;
`--development` splits the training cells once more and judges on those, for choices to be made.

Each model prints a table; JSON holds every number. `--table` renders all of a JSON as one table of the headline.
"""

import argparse
import copy
import datetime
import itertools
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import psutil
import torch
from scipy import sparse

from wbdit_diffusers import ScRNAGenerationPipeline, ScRNAProcessor
from wbdit_diffusers.cli import SCHEDULERS
from wbdit_diffusers.data import drop_empty_cells, read_cells, split_cells
from wbdit_diffusers.evaluation.report import FLOORS, draw_samples, evaluate_cells, to_markdown


TRAIN_SCRIPT = Path(__file__).parents[1] / "training" / "train.py"
# In expression space the published shape learns too little in minutes on a CPU: a smaller one.
OURS = {
    "program": [],
    "program-dit": ["--block_type", "dit"],
    "expression": [
        *("--space", "expression", "--num_attention_heads", "4", "--attention_head_dim", "48"),
        *("--learning_rate", "2e-3"),
    ],
}
HEADLINE = {
    "rf_auc": "RF-AUC",
    "rf_auc_pca": "RF-AUC, PCs",
    "w2": "W2",
    "mmd2": "MMD²",
    "variance_ratio": "variance",
    "zero_fraction_error": "zeros",
    "gene_correlation": "gene-gene",
    "precision": "precision",
    "recall": "recall",
    "nearest_training_cell": "nearest train",
    "purity": "purity",
    "lfc_slope": "LFC slope",
    "f1": "F1",
}


def train_ours(adata_path: Path, folder: Path, flags: list[str], args: argparse.Namespace) -> ScRNAGenerationPipeline:
    command = [sys.executable, TRAIN_SCRIPT, "--dataset", adata_path, "--output_dir", folder]
    command += ["--label_keys", *args.label_keys, "--max_train_steps", 10**9, "--checkpointing_steps", 10**9]
    command += ["--max_train_minutes", args.minutes, *flags, *args.train_flags]
    subprocess.run([str(part) for part in command], check=True)
    pipe = ScRNAGenerationPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_runs(
    pipe: ScRNAGenerationPipeline, model: str, test: ad.AnnData, args: argparse.Namespace
) -> Iterator[tuple[str, list[ad.AnnData], ad.AnnData]]:
    """Samples with every dtype, guidance, solver and number of steps that was asked for: name, samples, test cells."""
    scheduler_config = pipe.scheduler.config
    choices = itertools.product(args.dtypes, args.guidance_scales, args.schedulers, args.steps)
    for dtype, scale, scheduler, steps in choices:
        cast = pipe if dtype == "float32" else copy.deepcopy(pipe).to(getattr(torch, dtype))
        cast.scheduler = SCHEDULERS[scheduler].from_config(scheduler_config)
        name = model
        name += "" if dtype == "float32" else f", {dtype}"
        name += "" if scheduler == "ddpm" else f", {scheduler}"
        name += "" if steps is None else f", {steps} steps"
        name += "" if scale == 1.0 else f", guidance {scale:g}"
        yield name, *draw_samples(cast, test, args.num_seeds, guidance_scale=scale, num_inference_steps=steps)


def sample_scvi(
    train: ad.AnnData, test: ad.AnnData, label_key: str | None, minutes: float, num_seeds: int
) -> list[ad.AnnData]:
    """Cells from the prior of an scVI trained on `train`, as many as test cells; with their labels, if conditional."""
    import scvi
    from lightning.pytorch.callbacks import Timer

    train = train.copy()
    scvi.settings.seed = 0
    scvi.settings.verbosity = 30
    scvi.model.SCVI.setup_anndata(train, batch_key=label_key)
    model = scvi.model.SCVI(train)
    model.train(
        accelerator="cpu",
        max_epochs=10_000,
        early_stopping=True,
        enable_progress_bar=False,
        callbacks=[Timer(duration=datetime.timedelta(minutes=minutes))],
    )
    module = model.module.eval()
    library_size = np.asarray(train.X.sum(axis=1)).ravel()
    samples = []
    for seed in range(num_seeds):
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        if label_key is None:
            codes, pools = np.zeros(test.n_obs, dtype=int), [library_size]
        else:
            names = list(model.adata_manager.get_state_registry("batch")["categorical_mapping"])
            codes = np.array([names.index(name) for name in test.obs[label_key].astype(str)])
            pools = [library_size[(train.obs[label_key].astype(str) == name).to_numpy()] for name in names]
        library = torch.tensor([[np.log(rng.choice(pools[code]))] for code in codes], dtype=torch.float32)
        with torch.no_grad():
            generated = module.generative(
                z=torch.randn(test.n_obs, module.n_latent), library=library, batch_index=torch.tensor(codes)[:, None]
            )
            counts = generated["px"].sample().numpy()
        samples.append(ad.AnnData(sparse.csr_matrix(counts), var=train.var[[]], obs=test.obs))
    return samples


def machine() -> dict[str, str | int]:
    return {
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "architecture": platform.machine(),
        "cores": psutil.cpu_count(logical=False),
        "torch": torch.__version__,
    }


def known_floors(entries: dict, setting: tuple) -> dict | None:
    """A report of the same dataset that has floors for the same split, genes, labels and number of samples."""
    for entry in entries.values():
        report = entry["report"]
        floor = report["metrics"].get(FLOORS[0])
        keys = ("num_train", "num_test", "num_genes", "label_key")
        if floor is not None and (*(report[key] for key in keys), len(floor["rf_auc"])) == setting:
            return report
    return None


def add_floors(report: dict, known: dict):
    """Floors that were measured with a dataset's first model serve the others."""
    for floor in FLOORS:
        report["metrics"][floor] = known["metrics"][floor]
        for label in set(report["per_type"]) & set(known["per_type"]):
            report["per_type"][label]["metrics"][floor] = known["per_type"][label]["metrics"][floor]


def headline_table(results: dict) -> str:
    """All datasets and models of a JSON file, and the floors."""

    def row(dataset: str, name: str, minutes: str, values: dict[str, list[float]]) -> str:
        cells = []
        for metric in HEADLINE:
            numbers = values.get(metric)
            cells.append("–" if not numbers else f"{np.mean(numbers):.3f} ± {np.std(numbers):.3f}")
        return f"| {dataset} | {name} | {minutes} | " + " | ".join(cells) + " |"

    lines = ["| dataset | cells | minutes | " + " | ".join(HEADLINE.values()) + " |"]
    lines.append("|---" * (3 + len(HEADLINE)) + "|")
    for dataset, models in results.items():
        for i, (model, entry) in enumerate(models.items()):
            report = entry["report"]
            if i == 0 and FLOORS[0] in report["metrics"]:
                lines += [row(dataset, floor, "", report["metrics"][floor]) for floor in FLOORS]
            lines.append(row(dataset, model, f"{entry['minutes']:.1f}", report["metrics"]["generated"]))
    return "\n".join(lines) + "\n"


# What we ask of ourselves: name, and from (dataset, ours, training cells', scVI's means) the value and if it suffices
MOST_RF_AUC = {"pbmc3k": 0.70, "paul15": 0.57, "pancreas_endocrinogenesis": 0.62, "zheng_facs_pbmc": 0.62}
BARS = {
    "RF-AUC, at most 0.70 / 0.57 / 0.62 / 0.62 on pbmc3k / paul15 / pancreas / zheng": lambda name, ours, real, scvi: (
        ours["rf_auc"],
        ours["rf_auc"] <= MOST_RF_AUC.get(name, 1),
    ),
    "RF-AUC of scVI minus ours, at least 0.25, or ours below 0.60": lambda name, ours, real, scvi: (
        scvi["rf_auc"] - ours["rf_auc"],
        scvi["rf_auc"] - ours["rf_auc"] >= 0.25 or ours["rf_auc"] < 0.60,
    ),
    "W2 / training cells', at most 1.10": lambda name, ours, real, scvi: at_most(ours["w2"] / real["w2"], 1.10),
    "MMD², at most 0.005": lambda name, ours, real, scvi: at_most(ours["mmd2"], 0.005),
    "variance ratio, 0.95 to 1.05": lambda name, ours, real, scvi: (
        ours["variance_ratio"],
        0.95 <= ours["variance_ratio"] <= 1.05,
    ),
    "zero-fraction error / training cells', at most 1.3": lambda name, ours, real, scvi: at_most(
        ours["zero_fraction_error"] / real["zero_fraction_error"], 1.3
    ),
    "gene-gene correlation / training cells', at least 0.95": lambda name, ours, real, scvi: at_least(
        ours["gene_correlation"] / real["gene_correlation"], 0.95
    ),
    "distance to the nearest training cell, at least 0.95": lambda name, ours, real, scvi: at_least(
        ours["nearest_training_cell"], 0.95
    ),
    "marker slope, 0.9 to 1.1": lambda name, ours, real, scvi: (ours["lfc_slope"], 0.9 <= ours["lfc_slope"] <= 1.1),
    "F1 / training cells', at least 0.95": lambda name, ours, real, scvi: at_least(ours["f1"] / real["f1"], 0.95),
    "purity, at least 0.95": lambda name, ours, real, scvi: at_least(ours["purity"], 0.95),
}


def at_most(value: float, limit: float) -> tuple[float, bool]:
    return value, value <= limit


def at_least(value: float, limit: float) -> tuple[float, bool]:
    return value, value >= limit


def bars_tables(results: dict) -> str:
    """The bars, of every model of ours and dataset, the misses in bold; and the cell types whose purity misses."""
    models = [model for entries in results.values() for model in entries if model.split(",")[0] in OURS]
    models = [model for model in dict.fromkeys(models) if all(model in entries for entries in results.values())]

    def mean(report: dict) -> dict[str, float]:
        return {metric: float(np.nanmean(values)) for metric, values in report.items()}

    rows = {name: [] for name in [*BARS, "types of at least 30 training cells with purity of at least 0.95"]}
    misses = ["| dataset | type | held-out cells | " + " | ".join(models) + " | training cells |"]
    misses.append("|---" * (4 + len(models)) + "|")
    for dataset, entries in results.items():
        real = next(e["report"]["metrics"][FLOORS[0]] for e in entries.values() if FLOORS[0] in e["report"]["metrics"])
        scvi = {"rf_auc": np.nan}
        if "scvi-by-type" in entries:
            scvi = mean(entries["scvi-by-type"]["report"]["metrics"]["generated"])
        for name, bar in BARS.items():
            values = [
                bar(dataset, mean(entries[m]["report"]["metrics"]["generated"]), mean(real), scvi) for m in models
            ]
            rows[name].append(" / ".join(f"{value:.3f}" if good else f"**{value:.3f}**" for value, good in values))
        purity = {
            m: {t: mean(e["metrics"]["generated"])["purity"] for t, e in entries[m]["report"]["per_type"].items()}
            for m in models
        }
        pure = [f"{sum(value >= 0.95 for value in purity[m].values())} of {len(purity[m])}" for m in models]
        rows["types of at least 30 training cells with purity of at least 0.95"].append(" / ".join(pure))
        for label, entry in entries[models[0]]["report"]["per_type"].items():
            if any(not purity[m][label] >= 0.95 for m in models):
                values = [f"{purity[m][label]:.2f}" for m in models]
                values.append(
                    f"{np.nanmean(entry['metrics'][FLOORS[0]]['purity']):.2f}"
                    if FLOORS[0] in entry["metrics"]
                    else "–"
                )
                misses.append(f"| {dataset} | {label} | {entry['num_test']} | " + " | ".join(values) + " |")
    lines = [f"| {' / '.join(models)} | " + " | ".join(results) + " |", "|---" * (1 + len(results)) + "|"]
    lines += [f"| {name} | " + " | ".join(values) + " |" for name, values in rows.items()]
    return "\n".join([*lines, "", *misses]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", type=Path, default=[], help=".h5ad files of counts.")
    parser.add_argument("--label_keys", nargs="*", default=["cell_type"])
    parser.add_argument("--models", nargs="+", choices=[*OURS, "scvi", "scvi-by-type"], default=["program"])
    parser.add_argument("--minutes", type=float, default=12.0, help="Training time of each model.")
    parser.add_argument("--num_seeds", type=int, default=3, help="Samples to judge.")
    parser.add_argument("--guidance_scales", nargs="+", type=float, default=[1.0], help="Judged one by one.")
    parser.add_argument("--schedulers", nargs="+", choices=sorted(SCHEDULERS), default=["ddpm"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32"])
    parser.add_argument("--steps", nargs="+", type=int, default=[None], help="Numbers of steps, judged one by one.")
    parser.add_argument("--development", action="store_true", help="Judge on cells set aside from the training cells.")
    parser.add_argument("--num_cells", type=int, help="Take only so many cells of each dataset, at random.")
    parser.add_argument("--train_flags", nargs=argparse.REMAINDER, default=[], help="The rest goes to train.py.")
    parser.add_argument("--output", type=Path, help="JSON file; datasets and models are added to it.")
    parser.add_argument("--table", type=Path, help="Print the table of a JSON file, and nothing else.")
    parser.add_argument("--bars", action="store_true", help="With --table: what we ask of ourselves, met or missed.")
    args = parser.parse_args()
    if args.table is not None:
        results = json.loads(args.table.read_text())
        print(headline_table(results))
        if args.bars:
            print(bars_tables(results))
        return
    if args.output is None:
        parser.error("--output is required.")

    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    for path in args.dataset:
        adata = drop_empty_cells(read_cells(path))
        label_key = args.label_keys[0] if args.label_keys else None
        with tempfile.TemporaryDirectory() as folder:
            if args.num_cells is not None:
                cells = np.random.default_rng(0).permutation(adata.n_obs)[: args.num_cells]
                adata = adata[np.sort(cells)].copy()
                path = Path(folder, f"{path.stem}, {args.num_cells} cells.h5ad")
                adata.write_h5ad(path)
            if args.development:
                adata = adata[split_cells(adata, label_key=label_key, seed=0)[0]].copy()
                path = Path(folder, path.name)
                adata.write_h5ad(path)
            # What train.py splits off by default, and the genes that it chooses
            train, test = (adata[cells] for cells in split_cells(adata, label_key=label_key, seed=0))
            for model in args.models:
                start = time.monotonic()
                if model in OURS:
                    pipe = train_ours(path, Path(folder, model), OURS[model], args)
                    minutes = (time.monotonic() - start) / 60
                    split = json.loads(Path(folder, model, "split.json").read_text())
                    assert split["test"] == test.obs_names.tolist()
                    runs = draw_runs(pipe, model, test, args)
                else:
                    genes = ScRNAProcessor().fit(train).var_names
                    key = label_key if model == "scvi-by-type" else None
                    samples = sample_scvi(train[:, genes], test, key, args.minutes, args.num_seeds)
                    minutes = (time.monotonic() - start) / 60
                    runs = [(model, samples, test)]
                for name, samples, judged in runs:
                    entries = results.setdefault(path.stem, {})
                    label = None if model == "scvi" else label_key
                    num_genes = samples[0].n_vars
                    known = known_floors(entries, (train.n_obs, judged.n_obs, num_genes, label, len(samples)))
                    report = evaluate_cells(samples, train, judged, label, floors=known is None)
                    if known is not None:
                        add_floors(report, known)
                    entries[name] = {"minutes": minutes, "machine": machine(), "report": report}
                    args.output.parent.mkdir(parents=True, exist_ok=True)
                    args.output.write_text(json.dumps(results, indent=1))
                    print(f"\n## {path.stem}, {name}, {minutes:.1f} minutes\n\n{to_markdown(report)}", flush=True)


if __name__ == "__main__":
    main()
