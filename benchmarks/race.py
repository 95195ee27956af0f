"""Races generators of cells: one split, the same genes and labels, and as many cells as are held out.

    python benchmarks/race.py --dataset ../shared/data/{pbmc3k,kang_ifnb_pbmc,zheng_facs_pbmc,paul15}.h5ad \
        --work_dir WORK --output lab/results/race_cpu.json
    python benchmarks/race.py --table lab/results/race_cpu.json

Each generator runs in a process of its own on one core, and is ended after `--minutes` of CPU time. A peer has an
environment of its own in WORK/envs, which its first run makes. All get the counts of the 2,000 genes that vary most in
training and held-out cells together, as far as three training cells express them, with the labels of the training
cells, and write WORK/DATASET/seed-N/NAME.h5ad. What is there is not made again. `wbdit evaluate NAME=FILE … --train
train.h5ad --test test.h5ad` reads these files.

The classifiers of `wbdit evaluate` judge one sample of each. `AUC` is the highest of the three, next to that of real
cells by the same classifier in `excess`.

- scVI and LinearSCVI draw latents from their prior ("prior"), or from a Gaussian for each label on the latents of its
  training cells ("Gaussian"). Depth is that of a training cell of the label. The likelihood is "nb". With its default,
  "zinb", counts do not add up to the depth that is given.
- Squidiff draws its semantic latents from a Gaussian for each label, and 50 steps of DDIM follow. Its log values
  become counts with the depth of a training cell. Its networks see as many batches as the time allows.
- "paper" denoises log expression with the published block, as the paper does, with labels and a width for CPU cores.
- "copula" is the idea of scDesign2: for each label, negative binomial genes joined by a Gaussian copula.
- "copies" draws training cells with replacement: what memorisation must catch.

Not run: scdiffusionx needs pytorch-lightning < 1.9, scvi-tools <= 1.0.0, and pairs of RNA and ATAC. On PyPI, scldm is
empty, and scdiffusion and cfgen are other packages.
"""

import argparse
import contextlib
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
from scipy import sparse, stats


TORCH, SCVI = "torch==2.13.0", "scvi-tools==1.4.2"
PACKAGES = {
    "scvi": [TORCH, SCVI],
    "scvi_zinb": [TORCH, SCVI],
    "scvi_unlabelled": [TORCH, SCVI],
    "linear_scvi": [TORCH, SCVI],
    "scdesigner": [TORCH, "scdesigner==0.0.25"],
    "squidiff": [TORCH, "squidiff==1.0.8", "rdkit==2026.3.3", "scanpy==1.11.5", "matplotlib==3.10.8"],
}
MIN_CELLS = 3  # of the training cells express a gene, or it is left out, as `sc.pp.filter_genes` does
LABEL = "label"  # the obs column of all label keys, combined
# A sampler takes the label of each cell and gives their counts, (cells, genes).
Sampler = Callable[[np.ndarray], np.ndarray]


def like(train: ad.AnnData, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Positions of random training cells with these labels."""
    known, rows = train.obs[LABEL].to_numpy(), np.empty(len(labels), dtype=int)
    for label in np.unique(labels):
        rows[labels == label] = rng.choice(np.flatnonzero(known == label), (labels == label).sum())
    return rows


def gaussians(latents: np.ndarray, known: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws from a Gaussian on the latents of each label. Few cells take the covariance within all labels."""
    within = np.concatenate([latents[known == label] - latents[known == label].mean(0) for label in np.unique(known)])
    drawn = np.empty((len(labels), latents.shape[1]))
    for label in np.unique(labels):
        own = latents[known == label]
        covariance = (np.cov(within.T) * 20 + (own - own.mean(0)).T @ (own - own.mean(0))) / (20 + len(own))
        drawn[labels == label] = rng.multivariate_normal(own.mean(0), covariance, (labels == label).sum())
    return drawn


def counts_of(log_values: np.ndarray, library_size: np.ndarray) -> np.ndarray:
    """Counts of log1p(CP10k) values, rounded, with these library sizes."""
    rates = np.expm1(np.clip(log_values, 0, 9.3))
    return np.rint(rates / np.maximum(rates.sum(1, keepdims=True), 1e-9) * library_size[:, None])


def _scvi(
    train: ad.AnnData, seed: int, name: str = "SCVI", labelled: bool = True, likelihood: str = "nb"
) -> dict[str, Sampler]:
    import scvi
    import torch

    scvi.settings.seed = seed
    model_class, rng = getattr(scvi.model, name), np.random.default_rng(seed)
    model_class.setup_anndata(train, batch_key=LABEL if labelled else None)
    model = model_class(train, gene_likelihood=likelihood)
    model.train(max_epochs=400, accelerator="cpu", early_stopping=True, enable_progress_bar=False)
    module, known = model.module.eval(), train.obs[LABEL].to_numpy()
    names = list(model.adata_manager.get_state_registry("batch")["categorical_mapping"]) if labelled else []
    means, variances = model.get_latent_representation(return_dist=True)
    latents = means + np.sqrt(variances) * rng.standard_normal(means.shape)
    library = np.log(np.asarray(train.X.sum(1)).ravel())

    def decode(z: np.ndarray, labels: np.ndarray) -> np.ndarray:
        codes = np.array([names.index(label) for label in labels]) if labelled else np.zeros(len(labels), int)
        inputs = torch.tensor(z, dtype=torch.float32), torch.tensor(library[like(train, labels, rng)]).float()[:, None]
        with torch.no_grad():
            return module.generative(*inputs, batch_index=torch.tensor(codes)[:, None])["px"].sample().numpy()

    samplers = {"Gaussian": lambda labels: decode(gaussians(latents, known, labels, rng), labels)}
    samplers["prior"] = lambda labels: decode(rng.standard_normal((len(labels), means.shape[1])), labels)
    return samplers


def scvi(train: ad.AnnData, seed: int) -> dict[str, Sampler]:
    return _scvi(train, seed)


def scvi_zinb(train: ad.AnnData, seed: int) -> dict[str, Sampler]:
    return _scvi(train, seed, likelihood="zinb")


def scvi_unlabelled(train: ad.AnnData, seed: int) -> dict[str, Sampler]:
    return {"Gaussian": _scvi(train, seed, labelled=False)["Gaussian"]}


def linear_scvi(train: ad.AnnData, seed: int) -> dict[str, Sampler]:
    return {"Gaussian": _scvi(train, seed, "LinearSCVI")["Gaussian"]}


def scdesigner(train: ad.AnnData, seed: int) -> dict[str, Sampler]:
    import pandas as pd
    import torch
    from scdesigner.covariance import LedoitWolf
    from scdesigner.simulators import NegBinCopula

    torch.manual_seed(seed)
    np.random.seed(seed)
    names = {label: f"label{i}" for i, label in enumerate(sorted(set(train.obs[LABEL])))}
    categories = pd.CategoricalDtype(list(names.values()))

    def renamed(labels) -> pd.DataFrame:
        codes = pd.Series([names[label] for label in labels], dtype=categories)
        return pd.DataFrame({LABEL: codes.to_numpy()}, index=[f"c{i}" for i in range(len(labels))])

    cells = ad.AnnData(train.X.toarray(), obs=renamed(train.obs[LABEL]), var=train.var[[]])
    # Its default covariance is not positive definite for types with few cells.
    simulator = NegBinCopula(f"~ {LABEL}", f"~ {LABEL}", f"~ {LABEL}", estimator=LedoitWolf())
    simulator.fit(cells)

    def sample(labels: np.ndarray) -> np.ndarray:
        # It codes the labels of a table by those that occur, so a cell of each follows, which is left out.
        return np.asarray(simulator.sample(obs=renamed([*labels, *names])).X)[: len(labels)]

    return {"": sample}


def squidiff(train: ad.AnnData, seed: int) -> dict[str, Sampler]:
    import torch
    from Squidiff import dist_util, logger, script_util
    from Squidiff.resample import create_named_schedule_sampler
    from Squidiff.scrna_datasets import AnnDataDataset
    from Squidiff.train_util import TrainLoop

    logger.configure(dir="squidiff_log")
    torch.manual_seed(seed)
    rng, known = np.random.default_rng(seed), train.obs[LABEL].to_numpy()
    size = np.asarray(train.X.sum(1)).reshape(-1, 1)
    cells = ad.AnnData(np.log1p(train.X.toarray() / size * 1e4).astype(np.float32), obs=train.obs.copy())
    cells.obs["Group"] = 0
    flags = script_util.model_and_diffusion_defaults()
    flags |= {"gene_size": train.n_vars, "output_dim": train.n_vars, "num_layers": 3, "use_encoder": True}
    model, diffusion = script_util.create_model_and_diffusion(**flags)
    model.to(dist_util.dev())
    # Its loop has no world of processes to ask on a CPU
    torch.distributed.get_world_size = lambda: 1
    loader = torch.utils.data.DataLoader(AnnDataDataset(cells, False, 1), batch_size=128, shuffle=True)
    loop = TrainLoop(
        model=model,
        diffusion=diffusion,
        data=loader,
        batch_size=128,
        microbatch=-1,
        lr=1e-4,
        ema_rate="0.999",
        log_interval=10**9,
        save_interval=10**9,
        resume_checkpoint="",
        schedule_sampler=create_named_schedule_sampler("uniform", diffusion),
        lr_anneal_steps=10**6,
    )
    end = time.process_time() + 0.7 * 60 * minutes()
    while time.process_time() < end:
        for batch in loader:
            loop.run_step(batch)
            loop.step += 1
            if time.process_time() >= end:
                break
    model.eval()
    with torch.no_grad():
        latents = model.encoder(torch.tensor(cells.X)).numpy().astype(float)
    _, diffusion = script_util.create_model_and_diffusion(**flags | {"timestep_respacing": "ddim50"})

    def sample(labels: np.ndarray) -> np.ndarray:
        z = torch.tensor(gaussians(latents, known, labels, rng)).float()
        values = diffusion.ddim_sample_loop(
            model, (len(labels), train.n_vars), model_kwargs={"z_mod": z}, clip_denoised=False, progress=False
        )
        return counts_of(values.numpy().astype(float), size.ravel()[like(train, labels, rng)])

    return {"": sample}


def copula(train: ad.AnnData, seed: int) -> dict[str, Sampler]:
    """Means and dispersions by moments; normal scores of counts, at a random place within the step of each count."""
    rng, known, matrix = np.random.default_rng(seed), train.obs[LABEL].to_numpy(), train.X.toarray()
    fitted = {}
    for label in np.unique(known):
        own = matrix[known == label]
        mean, variance = own.mean(0) + 1e-4, own.var(0)
        inverse = np.clip((variance - mean) / mean**2, 1e-3, 1e3)  # 1 / dispersion
        genes = stats.nbinom(1 / inverse, 1 / (1 + inverse * mean))
        low, high = genes.cdf(own - 1), genes.cdf(own)
        scores = stats.norm.ppf(np.clip(low + rng.random(own.shape) * (high - low), 1e-6, 1 - 1e-6))
        fitted[label] = genes, scores / np.maximum(scores.std(0), 1e-3)

    def sample(labels: np.ndarray) -> np.ndarray:
        drawn = np.empty((len(labels), train.n_vars))
        for label in np.unique(labels):
            genes, scores = fitted[label]
            number, size = (labels == label).sum(), len(scores)
            # Sums of scores have their correlations. Independent noise stands for those of 20 more cells.
            together = rng.standard_normal((number, size)) @ (scores - scores.mean(0)) / math.sqrt(size)
            share = size / (size + 20)
            normal = math.sqrt(share) * together + math.sqrt(1 - share) * rng.standard_normal(together.shape)
            drawn[labels == label] = genes.ppf(np.clip(stats.norm.cdf(normal), 1e-9, 1 - 1e-9))
        return drawn

    return {"": sample}


def copies(train: ad.AnnData, seed: int) -> dict[str, Sampler]:
    rng = np.random.default_rng(seed)
    return {"": lambda labels: train.X[like(train, labels, rng)].toarray()}


def _train(seed: int, **fields):
    """Trains one of our pipelines on the cells of the folder, with their own label keys."""
    from wbdit_diffusers import ScRNAGenerationPipeline
    from wbdit_diffusers.training import TrainingConfig, train

    folder, marks = Path("pipeline") / fields.get("codec", "program"), []
    split = json.loads(Path("labels.json").read_text())
    config = {"label_keys": split["label_keys"], "split": "split.json", "output_dir": folder, "seed": seed}
    mark = lambda row: marks.append(time.process_time())  # noqa: E731
    train(ad.read_h5ad("all.h5ad"), TrainingConfig(**config | fields), callbacks=[mark])
    pipe = ScRNAGenerationPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe, marks[0], split["combinations"]


def _sampler(pipe, combinations: dict, seed: int, **call) -> Sampler:
    import torch

    def sample(labels: np.ndarray) -> np.ndarray:
        values = [combinations[label] for label in labels]
        conditions = {key: [value[i] for value in values] for i, key in enumerate(pipe.processor.label_keys)}
        generator = torch.Generator().manual_seed(seed)
        cells = pipe(num_cells=len(labels), conditions=conditions, generator=generator, **call).cells
        return cells[:, ad.read_h5ad("train.h5ad", backed="r").var_names].X.toarray()

    return sample


def ours(train: ad.AnnData, seed: int) -> dict[str, Sampler]:
    from wbdit_diffusers.evaluation import draw_baselines

    pipe, stage_one, combinations = _train(seed)

    def mixture(labels: np.ndarray) -> np.ndarray:
        cells, test = ad.read_h5ad("train.h5ad"), ad.read_h5ad("test.h5ad")
        drawn = draw_baselines(pipe, cells, test, 1, seed)["Gaussian mixture per label"][0]
        return drawn[:, train.var_names].X.toarray()

    mixture.trained_at = stage_one
    steps = {"": None, "10 steps": 10}
    samplers = {name: _sampler(pipe, combinations, seed, num_inference_steps=n) for name, n in steps.items()}
    return samplers | {"mixture": mixture}


def paper(train: ad.AnnData, seed: int) -> dict[str, Sampler]:
    from wbdit_diffusers.sampling import make_scheduler

    fields = {"codec": "expression", "block_type": "white_box", "num_layers": 3, "patch_size": 100}
    fields |= {"num_attention_heads": 4, "attention_head_dim": 48, "max_train_minutes": 0.5 * minutes()}
    pipe, _, combinations = _train(seed, **fields, max_train_steps=10**6)
    pipe.scheduler = make_scheduler("ddim", pipe.scheduler.config)
    return {"": _sampler(pipe, combinations, seed, num_inference_steps=100)}


GENERATORS = (ours, scvi, scvi_zinb, scvi_unlabelled, linear_scvi, scdesigner, squidiff, paper, copula, copies)
NAMES = {
    "ours": "wbdit_diffusers",
    "ours 10 steps": "wbdit_diffusers, 10 steps",
    "ours mixture": "Gaussian mixture, same codec",
    "scvi Gaussian": "scVI by label, Gaussian",
    "scvi prior": "scVI by label, prior",
    "scvi_zinb Gaussian": "scVI, its default likelihood, Gaussian",
    "scvi_zinb prior": "scVI, its default likelihood, prior",
    "scvi_unlabelled Gaussian": "scVI without labels, Gaussian",
    "linear_scvi Gaussian": "LinearSCVI by label, Gaussian",
    "scdesigner": "scDesigner, copula by label",
    "squidiff": "Squidiff",
    "paper": "log expression, published block",
    "copula": "Gaussian copula by label",
    "copies": "training cells, drawn again",
}


def minutes() -> float:
    return float(os.environ["RACE_MINUTES"])


def run(generator: str, seed: int):
    """Runs one generator in the folder of its cells, in its own process."""
    resource.setrlimit(resource.RLIMIT_CPU, (round(60 * minutes()), round(60 * minutes()) + 5))
    train, test = ad.read_h5ad("train.h5ad"), ad.read_h5ad("test.h5ad")
    labels, start = test.obs[LABEL].to_numpy(), time.process_time()
    samplers = {one.__name__: one for one in GENERATORS}[generator](train, seed)
    trained, rows = time.process_time(), {}
    for variant, sampler in samplers.items():
        name, begin = f"{generator} {variant}".strip(), time.process_time()
        counts = sampler(labels)
        row = {"train_seconds": round(getattr(sampler, "trained_at", trained) - start, 1)}
        row["seconds_per_1000"] = round((time.process_time() - begin) / len(labels) * 1000, 2)
        row["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        cells = ad.AnnData(sparse.csr_matrix(counts, dtype=np.float32), obs=test.obs, var=train.var[[]])
        cells.obs_names = [f"{generator}_{i}" for i in range(cells.n_obs)]
        cells.write_h5ad(f"{name}.h5ad")
        rows[name] = row
    Path(f"{generator}.json").write_text(json.dumps(rows))


def prepare(dataset: Path, folder: Path, seed: int):
    """Writes the cells that all generators get."""
    from common import drop_empty_cells
    from quality import CONFIGS

    from wbdit_diffusers.data import CellSplit, read_cells
    from wbdit_diffusers.evaluation.report import judged_genes

    adata, keys = drop_empty_cells(read_cells(dataset)), CONFIGS.get(dataset.stem, {}).get("label_keys", [])
    adata.X = sparse.csr_matrix(adata.X, dtype=np.float32)
    train, test = CellSplit.draw(adata, label_key=keys[0] if keys else None, seed=seed).apply(adata)
    genes = judged_genes(train, test, "counts", None)
    enough = np.asarray((train[:, genes].X > 0).sum(0)).ravel() >= MIN_CELLS
    adata = drop_empty_cells(adata[:, genes[enough]])
    values = [tuple(row) for row in adata.obs[keys].astype(str).to_numpy()]
    adata.obs[LABEL] = [" | ".join(row) for row in values]
    train, test = (adata[adata.obs_names.isin(side.obs_names)].copy() for side in (train, test))
    test = test[test.obs[LABEL].isin(train.obs[LABEL])].copy()
    folder.mkdir(parents=True, exist_ok=True)
    CellSplit(train.obs_names.tolist(), test.obs_names.tolist(), seed).save(folder)
    combinations = dict(zip(adata.obs[LABEL], values))
    (folder / "labels.json").write_text(json.dumps({"label_keys": keys, "combinations": combinations}))
    for name, cells in {"train": train, "test": test, "all": ad.concat([train, test], merge="same")}.items():
        cells.write_h5ad(folder / f"{name}.h5ad")


def race(dataset: Path, seed: int, args: argparse.Namespace) -> dict:
    """Runs all generators on a dataset and judges their cells."""
    from common import environment

    from wbdit_diffusers.evaluation import evaluate_cells

    folder = (args.work_dir / dataset.stem / f"seed-{seed}").resolve()
    if not (folder / "all.h5ad").exists():
        prepare(dataset, folder, seed)
    rows, stopped = {}, {}
    for generator in args.generators:
        if not (folder / f"{generator}.json").exists():
            python = sys.executable
            if generator in PACKAGES:
                packages = ["anndata==0.12.19", *PACKAGES[generator]]
                python = environment(packages, args.work_dir / "envs" / packages[2].partition("=")[0])
            command = [python, Path(__file__).resolve(), "--run", generator, "--seeds", str(seed)]
            limits = {"RACE_MINUTES": str(args.minutes), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            code = subprocess.run(command, cwd=folder, env=os.environ | limits).returncode
            if code:
                stopped[generator] = f"over {args.minutes:g} CPU minutes" if code < 0 else f"failed ({code})"
                continue
        rows |= json.loads((folder / f"{generator}.json").read_text())
    train, test = ad.read_h5ad(folder / "train.h5ad"), ad.read_h5ad(folder / "test.h5ad")
    samples = {NAMES[name]: [ad.read_h5ad(folder / f"{name}.h5ad")] for name in rows}
    keys = json.loads((folder / "labels.json").read_text())["label_keys"]
    report = evaluate_cells(samples, train, test, keys, seed=seed)
    return {
        "dataset": dataset.stem,
        "seed": seed,
        "minutes": args.minutes,
        "costs": {NAMES[name]: row for name, row in rows.items()},
        "not_finished": stopped,
        "packages": PACKAGES,
        "report": report,
    }


def mean_of(rows: list[dict], name: str, value: Callable[[dict, str], float]) -> float:
    """The mean of a value over trainings, NaN if no training has it."""
    values = []
    for row in rows:
        with contextlib.suppress(KeyError):
            values.append(value(row, name))
    return float(np.mean(values or [np.nan]))


def metric(key: str) -> Callable[[dict, str], float]:
    return lambda row, name: row["report"]["metrics"][name][key][0]


def auc(row: dict, name: str) -> float:
    return max(metric(f"auc_{judge}")(row, name) for judge in ("forest", "boosting", "regression"))


def excess(row: dict, name: str) -> float:
    return row["report"]["excess"][name]["mean"]


def cost(key: str) -> Callable[[dict, str], float]:
    return lambda row, name: row["costs"][name][key]


# Of the table of a dataset: each column, its digits and its value
COLUMNS: dict[str, tuple[int, Callable[[dict, str], float]]] = {
    "AUC": (3, auc),
    "excess": (3, excess),
    "membership": (3, metric("membership_auc")),
    "marker slope": (3, metric("lfc_slope")),
    "zeros": (3, metric("zero_fraction_error")),
    "variance error": (3, lambda row, name: abs(metric("variance_ratio")(row, name) - 1)),
    "CPU s to train": (0, cost("train_seconds")),
    "CPU s per 1,000 cells": (1, cost("seconds_per_1000")),
    "peak GiB": (1, cost("peak_gib")),
}


def table(rows: list[dict]) -> str:
    """AUC and excess of all datasets, and a table for each of them."""
    from common import markdown

    def text(own: list[dict], name: str, column: str) -> str:
        digits, value = COLUMNS[column]
        mean = mean_of(own, name, value)
        return "–" if np.isnan(mean) else f"{mean:.{digits}f}"

    by_dataset: dict[str, list[dict]] = {}
    for row in rows:
        by_dataset.setdefault(row["dataset"], []).append(row)
    names, parts = ["real reference", *dict.fromkeys(name for row in rows for name in row["costs"])], []
    for column in ("AUC", "excess"):
        lines = [[name, *(text(own, name, column) for own in by_dataset.values())] for name in names]
        parts.append(f"{column}\n\n{markdown(['cells', *by_dataset], lines)}")
    for dataset, own in by_dataset.items():
        title = f"{dataset}, {own[0]['report']['num_test']} held-out cells, {len(own)} training(s)"
        title += "".join(f"; {name}: {why}" for row in own for name, why in row["not_finished"].items())
        present = ["real reference", *own[0]["costs"]]
        lines = [[name, *(text(own, name, column) for column in COLUMNS)] for name in present]
        parts.append(f"{title}\n\n{markdown(['cells', *COLUMNS], lines)}")
    return "\n\n".join(parts)


def main():
    if "--run" in sys.argv:  # in the environment of a peer, which has none of our packages
        return run(sys.argv[2], int(sys.argv[4]))
    from common import add_rows, make_parser, parse, read_results

    parser = make_parser(__doc__)
    names = [generator.__name__ for generator in GENERATORS]
    parser.add_argument("--generators", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="Seeds of split, training and sampling.")
    parser.add_argument("--minutes", type=float, default=20, help="CPU minutes of a generator, with sampling.")
    args = parse(parser, table)
    done = {(row["dataset"], row["seed"]) for row in read_results(args.output, [])}
    for seed in args.seeds:
        for dataset in args.dataset:
            if (dataset.stem, seed) not in done:
                add_rows(args.output, [race(dataset, seed, args)])
    print(table(read_results(args.output, [])))


if __name__ == "__main__":
    main()
