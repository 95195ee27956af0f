"""Measures cells of combinations of labels that training lacks, each held out in turn, next to baselines.

    python benchmarks/unseen.py --dataset ../shared/data/kang_ifnb_pbmc.h5ad --work_dir WORK \\
        --output lab/results/unseen_cpu.json --peers WORK/peers
    python benchmarks/unseen.py --table lab/results/unseen_cpu.json

`--hold_out "B:STIM" "NK:CTRL"` chooses the combinations of `cell_type` and `condition`. By default these are the types
with at least 30 cells in `--condition`, and the three largest of them in the other condition. `--seeds` are those of
trainings. `--settings` is JSON of further fields of the training config. `--peers` is a folder of predictions that
unseen_peers.py wrote. A pipeline that exists in the work folder is measured again without a training.

All rows are judged on log1p(CP10k) of the 2,000 most variable genes. The change is the difference to the mean of the
type's real control cells. Metrics follow scPerturBench (Nature Methods 2025): Pearson correlation and slope of the
change in the 100 genes that change most, energy distance, R² of means, and recovered differential genes. Variance,
zeros and the spread of genes show whether more than the mean is right. The reference is real cells in two halves.
"Origin found" is the fraction of translated control cells whose own control cell is among the nearest tenth, in the
half of the programs that the condition changes least. Cells that were generated anew have a random origin.
"""

import json
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import torch
from common import add_rows, make_parser, markdown, mean_sd, parse, read_results
from scipy import sparse
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict

from wbdit_diffusers import ScRNAGenerationPipeline, ScRNAToScRNAPipeline
from wbdit_diffusers.evaluation.metrics import rank_markers
from wbdit_diffusers.interpretation.interventions import with_denoiser
from wbdit_diffusers.processing.genes import most_variable
from wbdit_diffusers.processing.normalize import log_normalize
from wbdit_diffusers.training import TrainingConfig, train


KEYS = ["cell_type", "condition"]
MIN_CELLS, NUM_GENES, NUM_TOP = 30, 2000, 100
NUM_CELLS = 500  # predicted, for means
METRICS = {
    "pearson": "Pearson, top 100",
    "slope": "slope",
    "energy": "energy distance",
    "r2": "R² of means",
    "genes": "genes recovered",
    "forest": "forest AUC",
    "variance": "variance ratio",
    "spread": "spread of genes",
    "zeros": "error of zeros",
    "origin": "origin found",
}
REAL = "real, half against half"


class Judge:
    """The real cells of a combination that was held out, its control cells, and the other real cells."""

    def __init__(self, cells: ad.AnnData, held: tuple[str, str], control: str, predicted: list[ad.AnnData]):
        cell_type, condition = held
        types, conditions = (cells.obs[key].astype(str).to_numpy() for key in KEYS)
        library_size = np.asarray(cells.X.sum(axis=1)).ravel()
        expression = log_normalize(cells.X, library_size)
        self.held = (types == cell_type) & (conditions == condition)
        genes = most_variable(expression, NUM_GENES)
        for one in predicted:
            genes = genes[cells.var_names[genes].isin(one.var_names)]
        self.genes, self.expression = cells.var_names[genes], expression[:, genes].toarray()
        self.control_rows = (types == cell_type) & (conditions == control)
        self.real, self.control = self.expression[self.held], self.expression[self.control_rows]
        self.change = self.real.mean(0) - self.control.mean(0)
        self.top = np.argsort(-np.abs(self.change))[:NUM_TOP]
        self.pca = PCA(30, random_state=0).fit(self.expression[~self.held])
        others = sorted(set(types) - {cell_type})
        means = [
            [self.expression[(types == t) & (conditions == c)].mean(0) for t in others] for c in (condition, control)
        ]
        self.mean_shift = np.nanmean(np.subtract(*means), axis=0)

    def of(self, cells: ad.AnnData) -> np.ndarray:
        """Log expression of predicted cells over the judged genes."""
        values = cells[:, self.genes].X
        values = values.toarray() if sparse.issparse(values) else np.asarray(values)
        if cells.uns.get("values") != "log":
            sizes = cells.obs["library_size"].to_numpy() if "library_size" in cells.obs else cells.X.sum(axis=1)
            values = np.log1p(values / np.maximum(np.asarray(sizes).reshape(-1, 1), 1) * 1e4)
        return values.astype(np.float32)

    def measure(self, predicted: np.ndarray, real: np.ndarray | None = None) -> dict[str, float]:
        """All metrics of predicted cells `(cells, genes)` against the held-out ones."""
        real = self.real if real is None else real
        change, truth = predicted.mean(0) - self.control.mean(0), real.mean(0) - self.control.mean(0)
        moved, top = np.ptp(change) > 0, self.top
        both = np.concatenate([predicted, real])
        x, y = self.pca.transform(predicted), self.pca.transform(real)
        labels = np.repeat(["predicted", "control", "real"], [len(predicted), len(self.control), len(real)])
        stacked = np.concatenate([predicted, self.control, real])
        found = [
            set(rank_markers(stacked[labels != other], labels[labels != other], name)[: NUM_TOP // 2])
            for name, other in (("predicted", "real"), ("real", "predicted"))
        ]
        number = min(len(predicted), len(real))
        both = np.concatenate([predicted[:number], real[:number]])
        source = np.repeat([0, 1], number)
        forest = RandomForestClassifier(300, min_samples_leaf=2, random_state=0)
        guess = cross_val_predict(forest, both, source, cv=5, method="predict_proba")[:, 1]
        return {
            "pearson": float(np.corrcoef(change[top], truth[top])[0, 1]) if moved else 0.0,
            "slope": float(np.polyfit(truth[top], change[top], 1)[0]),
            "energy": float(2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean()),
            "r2": float(np.corrcoef(predicted.mean(0), real.mean(0))[0, 1] ** 2),
            "genes": len(found[0] & found[1]) / len(found[1]),
            "forest": float(roc_auc_score(source, guess)),
            "variance": float(predicted.var(0).sum() / real.var(0).sum()),
            "spread": float(np.corrcoef(predicted.var(0), real.var(0))[0, 1]),
            "zeros": float(np.abs((predicted == 0).mean(0) - (real == 0).mean(0)).mean()),
        }


def latent_arithmetic(
    pipe: ScRNAGenerationPipeline, train_cells: ad.AnnData, request: dict, control: str
) -> ad.AnnData:
    """Control cells plus the mean shift of other types in latents, as scGen has it in its own latents."""
    latents = pipe.encode_cells(train_cells).numpy()
    types, conditions = (train_cells.obs[key].astype(str).to_numpy() for key in KEYS)
    cell_type, condition = (request[key] for key in KEYS)
    mean = {(t, c): latents[(types == t) & (conditions == c)].mean(0) for t in set(types) for c in (condition, control)
            if ((types == t) & (conditions == c)).any()}  # fmt: skip
    shifts = [mean[t, condition] - mean[t, control] for t in set(types) if {(t, condition), (t, control)} <= set(mean)]
    own = latents[(types == cell_type) & (conditions == control)]
    moved = own[np.random.default_rng(0).integers(len(own), size=NUM_CELLS)] + np.mean(shifts, axis=0)
    labels = pipe.processor.encode_conditions(request, len(moved))
    return pipe.decode_latents(torch.from_numpy(moved), labels, generator=torch.Generator().manual_seed(0))


def origins_found(pipe: ScRNAGenerationPipeline, controls: torch.Tensor, moved: torch.Tensor) -> float:
    """The fraction of moved cells `(cells, num_features)` that are near the control cell in the same row."""
    before, after = pipe.codec.activities(controls).detach(), pipe.codec.activities(moved).detach()
    quiet = (after.mean(0) - before.mean(0)).abs().argsort()[: before.shape[1] // 2]
    distances = torch.cdist(after[:, quiet], before[:, quiet])  # (moved, controls)
    return ((distances < distances.diagonal()[:, None]).float().mean(1) < 0.1).float().mean().item()


def measure(args: Any, cells: ad.AnnData, cell_type: str, condition: str, seed: int) -> list[dict]:
    """Trains without a combination, and measures everything that predicts it."""
    control = next(c for c in sorted(set(cells.obs["condition"].astype(str))) if c != condition)
    types, conditions = (cells.obs[key].astype(str) for key in KEYS)
    train_cells = cells[~((types == cell_type) & (conditions == condition)).to_numpy()].copy()
    controls = cells[((types == cell_type) & (conditions == control)).to_numpy()].copy()
    name, request = f"{cell_type}_{condition}_{seed}".replace(" ", "_"), dict(zip(KEYS, (cell_type, condition)))
    folder, rng = args.work_dir / name, np.random.default_rng(seed)
    if not (folder / "model_index.json").exists():
        settings = {"label_keys": KEYS, "seed": seed, "test_fraction": 0.05, "overwrite_output_dir": folder.exists()}
        train(train_cells, TrainingConfig(output_dir=folder, **settings | json.loads(args.settings)))
    pipe = ScRNAGenerationPipeline.from_pretrained(folder)
    translate = ScRNAToScRNAPipeline.from_pipe(pipe)
    closed_form = with_denoiser(pipe, pipe.gaussian_mixture)
    for one in (pipe, translate, closed_form):
        one.set_progress_bar_config(disable=True)

    def generate(one: ScRNAGenerationPipeline, num_cells: int = NUM_CELLS, **call: Any) -> Any:
        return one(num_cells, conditions=request, generator=torch.Generator().manual_seed(seed), **call).cells

    repeated = controls[rng.integers(controls.n_obs, size=NUM_CELLS)].copy()
    repeated.obs_names_make_unique()
    generator = torch.Generator().manual_seed(seed)
    made = {
        "closed form": generate(closed_form),
        "network": generate(pipe),
        "network, guidance 1.5": generate(pipe, guidance_scale={"condition": 1.5}),
        "translated cells": translate(repeated, conditions={"condition": condition}, generator=generator).cells,
        "latent arithmetic": latent_arithmetic(pipe, train_cells, request, control),
    }
    for path in sorted(args.peers.glob(f"*_{name}.h5ad")) if args.peers else []:
        made[path.name.removesuffix(f"_{name}.h5ad")] = ad.read_h5ad(path)
    judge = Judge(cells, (cell_type, condition), control, list(made.values()))
    sampled = judge.control[rng.integers(len(judge.control), size=NUM_CELLS)]
    predicted = {"no change": judge.control, "mean shift in genes": np.maximum(sampled + judge.mean_shift, 0)}
    predicted |= {row: judge.of(one) for row, one in made.items()}
    halves = np.array_split(rng.permutation(len(judge.real)), 2)
    results = {row: judge.measure(values) for row, values in predicted.items()}
    results[REAL] = judge.measure(judge.real[halves[0]], judge.real[halves[1]])
    latents = pipe.encode_cells(controls)
    translated = translate(controls, conditions={"condition": condition}, output_type="latent").cells
    results["translated cells"]["origin"] = origins_found(pipe, latents, translated)
    anew = generate(pipe, controls.n_obs, output_type="latent")
    results["network"]["origin"] = origins_found(pipe, latents, anew)
    mixture = pipe.gaussian_mixture
    place = mixture.find_composed(pipe.processor.encode_conditions(request, 1)[0])
    facts = {"cell_type": cell_type, "condition": condition, "seed": seed, "num_cells": len(judge.real)}
    facts |= {"num_genes": len(judge.genes), "change": float(mixture.composed_changes[place])}
    facts |= {"error": float(mixture.composed_errors[place])}
    return [facts | {"row": row} | values for row, values in results.items()]


def default_combinations(cells: ad.AnnData, condition: str) -> list[str]:
    """Types with enough cells in a condition, and the three largest of them in the other condition."""
    numbers = cells.obs.groupby(KEYS, observed=True).size().unstack(fill_value=0)
    types = numbers.index[numbers[condition] >= MIN_CELLS]
    other = next(name for name in numbers.columns if name != condition)
    largest = numbers.loc[types, condition].sort_values(ascending=False).index[:3]
    return [f"{name}:{condition}" for name in types] + [f"{name}:{other}" for name in largest]


def table(results: list[dict]) -> str:
    """The mean over combinations of each row and metric, and the correlation by combination, over seeds."""
    held = list(dict.fromkeys((row["cell_type"], row["condition"]) for row in results))
    names = list(dict.fromkeys(row["row"] for row in results))

    def values(name: str, key: str, combination: tuple[str, str]) -> list[float]:
        own = [row for row in results if row["row"] == name and (row["cell_type"], row["condition"]) == combination]
        return [row[key] for row in own if key in row]

    def text(name: str, key: str) -> str:
        return mean_sd([float(np.mean(own)) for one in held if (own := values(name, key, one))])

    numbers = {name: sum(bool(values(name, "pearson", one)) for one in held) for name in names}
    means = [[name, str(numbers[name]), *(text(name, key) for key in METRICS)] for name in names]
    by_type = [[", ".join(one), *(mean_sd(values(name, "pearson", one)) for name in names)] for one in held]
    first = markdown(["row", "combinations", *METRICS.values()], means)
    return "\n\n".join([first, markdown(["Pearson, top 100", *names], by_type)])


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--hold_out", nargs="+", help="Combinations such as B:STIM. Default: see above.")
    parser.add_argument("--condition", default="STIM", help="Condition of the default combinations.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="Seeds of the trainings.")
    parser.add_argument("--settings", default="{}", help="JSON of further fields of the training config.")
    parser.add_argument("--peers", type=Path, help="Folder of predictions of other tools.")
    args = parse(parser, table)
    cells = ad.read_h5ad(args.dataset[0])
    for combination in args.hold_out or default_combinations(cells, args.condition):
        cell_type, condition = combination.rsplit(":", 1)
        for seed in args.seeds:
            done = {(row["cell_type"], row["condition"], row["seed"]) for row in read_results(args.output, [])}
            if (cell_type, condition, seed) not in done:
                add_rows(args.output, measure(args, cells, cell_type, condition, seed))
    print(table(read_results(args.output, [])))


if __name__ == "__main__":
    main()
