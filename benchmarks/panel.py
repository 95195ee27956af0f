"""Measures genes that a panel lacks, drawn given those that it has, next to baselines.

    python benchmarks/panel.py --dataset ../shared/data/*.h5ad --work_dir WORK --scvi SCVI_PYTHON \\
        --output lab/results/panel_cpu.json
    python benchmarks/panel.py --table lab/results/panel_cpu.json

WORK/NAME holds the pipeline of NAME.h5ad; one that is missing is trained. Panels are chosen as spatial panels are: the
best marker genes of each cell type in turn, in training cells. Held-out cells keep the panel's genes alone, without
labels, and the other modelled genes are judged.

- Correlation of expected expression, log1p(CP10k), over cells (mean over genes seen in 5 cells) and over genes.
- Log score per cell: the log probability of the held-out counts by NUM_DRAWS draws, smoothed with the distribution of
  the gene in training cells that counts as one draw.
- Coverage of central intervals of the draws (counts at their ends count in part), for the most expressed tenth.

Baselines: mean of the true type, nearest training cells (the best number of neighbours), scVI with zeros for genes
that were not measured, and neighbours in the latents of scVI trained on the panel. Controls: the mixture's closed form
in place of the network, with and without importance resampling. `--scvi` is a Python that can import scvi-tools.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc
import torch
from common import add_rows, load_run, make_parser, markdown, parse, read_results
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from wbdit_diffusers import ScRNAInpaintPipeline
from wbdit_diffusers.data.latents import CellDataset
from wbdit_diffusers.pipelines.observed_genes import ObservedGenes
from wbdit_diffusers.training import TrainingConfig, train


PANELS, CONTROL = (50, 200, 500), 200  # the controls and scVI are measured for one panel
MAX_CELLS, NUM_DRAWS, NUM_MEANS, NUM_PROPOSALS = 150, 20, 5, 16
NEIGHBOURS = (10, 20, 50)
COLUMNS = {"gene": "per gene", "cell": "per cell", "log_score": "log score", "coverage": "50 / 80 / 95%"}
SCVI = """
import sys, anndata as ad, numpy as np, scvi, torch
folder, seed = sys.argv[1], int(sys.argv[2])
scvi.settings.seed, scvi.settings.verbosity = seed, 40
torch.set_num_threads(1)
train, padded = ad.read_h5ad(f"{folder}/train.h5ad"), ad.read_h5ad(f"{folder}/padded.h5ad")
def fit(cells):
    scvi.model.SCVI.setup_anndata(cells)
    model = scvi.model.SCVI(cells)
    model.train(max_epochs=80, accelerator="cpu", enable_progress_bar=False)
    return model
model, panel = fit(train), np.load(f"{folder}/panel.npy")
np.save(f"{folder}/rates.npy", model.get_normalized_expression(padded, n_samples=25, return_numpy=True))
z = [np.asarray(model.get_normalized_expression(padded, n_samples=1, return_numpy=True)) for _ in range(20)]
np.save(f"{folder}/samples.npy", np.stack(z).astype(np.float32))
theta = torch.exp(model.module.px_r).detach().numpy()
np.save(f"{folder}/theta.npy", theta)
small = fit(train[:, panel].copy())
np.save(f"{folder}/train_z.npy", small.get_latent_representation())
np.save(f"{folder}/test_z.npy", small.get_latent_representation(padded[:, panel].copy()))
"""


class Judge:
    """Held-out counts of genes that a panel lacks."""

    def __init__(self, truth: np.ndarray, sizes: np.ndarray, train_counts: np.ndarray):
        self.truth, self.sizes = truth, sizes[:, None]
        self.background = np.stack([(train_counts == k).mean(0) for k in range(30)])  # (counts, genes)
        self.rng = np.random.default_rng(0)

    def row(self, shares: np.ndarray, draws: np.ndarray) -> dict:
        """`shares` `(cells, genes)` are expected fractions of the counts, `draws` `(draws, cells, genes)` counts."""
        real, predicted = (np.log1p(1e4 * values) for values in (self.truth / self.sizes, shares))
        seen = (self.truth > 0).sum(0) >= 5
        same = (draws == self.truth).sum(0)
        known = np.minimum(self.truth, len(self.background) - 1).astype(int)
        background = self.background[known, np.arange(known.shape[1])].clip(min=1e-4)
        rank = (draws < self.truth).sum(0) + self.rng.random(same.shape) * (same + 1)
        off = np.abs(rank / (len(draws) + 1) - 0.5)[:, shares.mean(0) > np.quantile(shares.mean(0), 0.9)]
        return {
            "gene": float(np.mean(correlation(real, predicted, 0)[seen])),
            "cell": float(np.mean(correlation(real, predicted, 1))),
            "log_score": float(np.log((same + background) / (len(draws) + 1)).sum(1).mean()),
            "coverage": [float((off <= level / 2).mean()) for level in (0.5, 0.8, 0.95)],
        }

    def from_cells(self, counts: np.ndarray, shares: np.ndarray, rng: np.random.Generator, rows: np.ndarray) -> dict:
        """Predictions from training cells `(cells, neighbours)` with counts and shares of the same genes."""
        chosen = rng.permuted(np.resize(np.arange(rows.shape[1]), NUM_DRAWS))
        return self.row(shares[rows].mean(1), counts[rows[:, chosen].T])


def correlation(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
    """Pearson correlations along an axis; 0 where one is constant."""
    a, b = (values - values.mean(axis, keepdims=True) for values in (a, b))
    return (a * b).sum(axis) / np.sqrt((a**2).sum(axis) * (b**2).sum(axis)).clip(min=1e-9)


def choose_panel(train_cells: ad.AnnData, genes: np.ndarray, number: int) -> list[str]:
    """The best marker genes of each type in turn."""
    cells = train_cells.copy()
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    sizes = cells.obs["cell_type"].value_counts()
    types = [str(name) for name in sizes[sizes >= 5].index]
    cells = cells[:, genes].copy()
    sc.tl.rank_genes_groups(cells, "cell_type", groups=types, method="t-test_overestim_var")
    ranked = cells.uns["rank_genes_groups"]["names"]
    return list(dict.fromkeys(ranked[name][place] for place in range(len(genes)) for name in types))[:number]


def resample(
    pipe: ScRNAInpaintPipeline, values: torch.Tensor, mask: torch.Tensor, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A draw of each cell from its closed form, chosen among proposals by their exact weights: latents and labels."""
    mixture, codec, generator = pipe.gaussian_mixture, pipe.codec, torch.Generator().manual_seed(seed)
    observed = ObservedGenes(codec, values, mask, gaussian_mixture=mixture)
    means, labels, log_weights = mixture.given(observed.precision, observed.shift)
    covariances = (mixture.directions * mixture.variances[:, None]).double() @ mixture.directions.double().mT
    cholesky = torch.linalg.cholesky(torch.linalg.inv(covariances) + observed.precision[:, None])  # of precisions
    cell = torch.arange(len(values))
    latents, log_ratios, chosen = [], [], []
    for _ in range(NUM_PROPOSALS):
        own = torch.multinomial(log_weights.exp(), 1, generator=generator)[:, 0]
        noise = torch.randn(len(values), means.shape[-1], 1, generator=generator).double()
        spread = torch.linalg.solve_triangular(cholesky[cell, own].mT, noise, upper=True)[..., 0]
        drawn = means[cell, own] + spread
        quadratic = (observed.precision @ drawn[..., None])[..., 0]
        approximate = ((observed.shift - 0.5 * quadratic) * drawn).sum(1)
        log_ratios.append(codec.decode(drawn.float()).log_prob(values, mask).double() - approximate)
        latents.append(drawn.float())
        chosen.append(labels[own])
    best = torch.multinomial(torch.stack(log_ratios, dim=1).softmax(1), 1, generator=generator)[:, 0]
    return torch.stack(latents)[best, cell], torch.stack(chosen)[best, cell]


def measure(folder: Path, dataset: Path, scvi: str | None, done: set) -> Iterator[dict]:
    """The rows of a dataset."""
    if not (folder / "model_index.json").exists():
        keys = ["cell_type", "condition"] if dataset.stem.startswith("kang") else ["cell_type"]
        train(dataset, TrainingConfig(output_dir=folder, label_keys=keys, num_genes=2000, max_train_steps=1500))
    generate, train_cells, test_cells = load_run(folder, dataset)
    pipe, rng = ScRNAInpaintPipeline(**generate.components), np.random.default_rng(0)
    closed = ScRNAInpaintPipeline(**generate.components | {"denoiser": generate.gaussian_mixture})
    for one in (pipe, closed):
        one.set_progress_bar_config(disable=True)
    test_cells = test_cells[np.sort(rng.permutation(test_cells.n_obs)[:MAX_CELLS])].copy()
    genes, (train_data, test_data) = (
        pipe.processor.var_names,
        (CellDataset(c, pipe.processor) for c in (train_cells, test_cells)),
    )
    train_counts, train_sizes = (part.numpy() for part in train_data.cells(slice(None)))
    all_counts, all_sizes = (part.numpy() for part in test_data.cells(slice(None)))
    all_own, types = (data.class_labels[:, 0].numpy() for data in (test_data, train_data))
    for number in PANELS:
        if (dataset.stem, number) in done:
            continue
        mask = genes.isin(choose_panel(train_cells, genes, number))
        kept = all_counts[:, mask].sum(1) > 0  # a cell without counts in the panel has no information
        counts, sizes, own, unseen = all_counts[kept], all_sizes[kept], all_own[kept], train_counts[:, ~mask]
        judge = Judge(counts[:, ~mask], sizes, unseen)
        known, shares = {"dataset": dataset.stem, "panel": number}, unseen / train_sizes[:, None]

        of_cells = partial(judge.from_cells, unseen, shares, rng)
        same = np.stack([rng.choice(np.flatnonzero(types == label), NUM_DRAWS) for label in own])
        means = np.stack([shares[types == label].mean(0) for label in range(types.max() + 1)])
        yield known | {"row": "mean of the true type"} | judge.row(means[own], unseen[same.T])
        spaces = [
            np.log1p(1e3 * v[:, mask] / v[:, mask].sum(1, keepdims=True).clip(min=1)) for v in (train_counts, counts)
        ]
        pca = PCA(min(30, number - 1), random_state=0).fit(spaces[0])
        rows = NearestNeighbors(n_neighbors=max(NEIGHBOURS)).fit(pca.transform(spaces[0]))
        rows = rows.kneighbors(pca.transform(spaces[1]), return_distance=False)
        yield (
            known
            | {"row": "nearest cells"}
            | max((of_cells(rows[:, :k]) for k in NEIGHBOURS), key=lambda r: r["gene"])
        )
        if scvi and number == CONTROL:
            with tempfile.TemporaryDirectory() as where:
                ad.AnnData(train_counts.astype(np.float32)).write_h5ad(f"{where}/train.h5ad")
                ad.AnnData((counts * mask).astype(np.float32)).write_h5ad(f"{where}/padded.h5ad")
                np.save(f"{where}/panel.npy", np.flatnonzero(mask))
                subprocess.run([scvi, "-W", "ignore", "-c", SCVI, where, "0"], check=True, stdout=subprocess.DEVNULL)
                rates, z, theta, a, b = (
                    np.load(f"{where}/{n}.npy") for n in ("rates", "samples", "theta", "train_z", "test_z")
                )
            ratio = counts[:, mask].sum(1) / z[..., mask].sum(2)  # (draws, cells): counts per unit of rate
            gamma = rng.gamma(theta[~mask], 1 / theta[~mask], z[..., ~mask].shape)
            draws = rng.poisson(z[..., ~mask] * ratio[..., None] * gamma)
            yield known | {"row": "scVI, zeros for other genes"} | judge.row(rates[:, ~mask], draws)
            rows = NearestNeighbors(n_neighbors=max(NEIGHBOURS)).fit(a).kneighbors(b, return_distance=False)
            best = max((of_cells(rows[:, :k]) for k in NEIGHBOURS), key=lambda r: r["gene"])
            yield known | {"row": "nearest cells in scVI trained on the panel"} | best
        cells = test_cells[kept, test_cells.var_names.isin(genes[mask])].copy()
        cells.obs = cells.obs[[]]
        for name, one in (("network", pipe), ("closed form", closed))[: 1 + (number == CONTROL)]:
            start = time.process_time()
            full = one(cells, num_samples=NUM_DRAWS, generator=torch.Generator().manual_seed(0)).cells
            seconds = (time.process_time() - start) / len(full) * 1000
            drawn = full.X.toarray()[:, ~mask].reshape(-1, NUM_DRAWS, (~mask).sum()).swapaxes(0, 1)
            expected = one(
                cells, num_samples=NUM_MEANS, output_type="np", generator=torch.Generator().manual_seed(1)
            ).cells
            expected = np.expm1(expected[:, ~mask]).reshape(-1, NUM_MEANS, (~mask).sum()).mean(1) / 1e4
            yield known | {"row": name, "seconds": seconds} | judge.row(expected, drawn)
        if number != CONTROL:
            continue
        values, gene_mask = torch.from_numpy(counts), torch.from_numpy(mask)
        with torch.no_grad():
            drawn, expected = [], 0
            for seed in range(NUM_DRAWS // 2):
                latents, labels = resample(closed, values, gene_mask, seed)
                cell = pipe.codec.decode(latents, None, labels)
                expected = expected + np.expm1(cell.expression().numpy()[:, ~mask]) / 1e4 / (NUM_DRAWS // 2)
                uniform = torch.from_numpy(rng.random((2, len(values), cell.num_values)))
                drawn += [cell.icdf(u).numpy()[:, : len(mask)][:, ~mask] for u in uniform]
        yield known | {"row": "closed form, importance resampling"} | judge.row(expected, np.stack(drawn))


def table(results: list[dict]) -> str:
    """The correlation per gene, or all metrics of a panel as means over datasets."""
    names, rows = list(dict.fromkeys(row["dataset"] for row in results)), []
    for panel in PANELS:
        for name in dict.fromkeys(row["row"] for row in results):
            own = {r["dataset"]: r for r in results if r["row"] == name and r["panel"] == panel}
            if not own:
                continue
            cells = [
                f"{own[d]['gene']:.3f}, {own[d]['cell']:.3f}, {own[d]['log_score']:.0f}" if d in own else "–"
                for d in names
            ]
            coverage = np.mean([r["coverage"] for r in own.values()], axis=0)
            rows.append([str(panel), name, *cells, " / ".join(f"{100 * value:.0f}" for value in coverage)])
    return markdown(["panel", "per gene, per cell, log score", *names, "coverage of 50 / 80 / 95%"], rows)


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--scvi", help="Python of an environment with scvi-tools.")
    args = parse(parser, table)
    done = {(row["dataset"], row["panel"]) for row in read_results(args.output, []) if row["row"] == "network"}
    for path in args.dataset:
        add_rows(args.output, measure(args.work_dir / path.stem, path, args.scvi, done))
    print(table(json.loads(args.output.read_text())))
