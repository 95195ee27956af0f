"""Compares generators that are asked in words: for the label with the nearest text, or by its embedding itself.

    python benchmarks/words_projection.py --dataset ../shared/data/{zheng_facs_pbmc,pbmc3k,kang_ifnb_pbmc}.h5ad \\
        --encoder all-MiniLM-L6-v2 --work_dir WORK --output lab/results/words_cpu.json
    python benchmarks/words_projection.py --table lab/results/words_cpu.json

Each dataset is the third in turn: generators train on half of the cells of the other two, and the type names of the
third are prompts. The network has a frozen table of text embeddings and a linear map instead of label embeddings, so
both designs share it: "nearest name" asks for the label that words.py picks, "projection" gives the text embedding of
the prompt. Codec, library sizes and effects of labels on genes are those of the nearest name. `--networks` are further
ones: "all" is trained on all three datasets and asked by label, "labels" is the default network asked for the nearest
name, and "wordings" learns the projection from synonyms and typing errors too. Names also tell the dataset.

Cells are judged against the other half of the third dataset, control cells only: energy distance in 30 principal
components of log1p(CP10k), the same once the mean over types is that of real cells ("aligned", without most batch
effects), and the fraction of aligned cells that a classifier of the real cells calls by the right type and lineage.
"best label" has the lowest energy distance, "random label" is five draws. A label is right if it is of the population
that was asked for, which two datasets may lack. Alignment depends on all types of a row: differences are of energy.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import torch
import torch.nn.functional as F
from common import add_rows, make_parser, markdown, mean_sd, parse, read_results
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from words import CONDITIONS, DESCRIPTIONS, LINEAGE, POPULATION, WAYS, WORDINGS, Encoder, nearest

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.models.transformer_white_box_dit import WhiteBoxDiTModel
from wbdit_diffusers.processing.normalize import log_normalize
from wbdit_diffusers.training import TrainingConfig, train


KEYS, MIN_CELLS, NUM_CELLS = ["cell_type", "condition"], 10, 200


class TextEmbedder(nn.Module):
    """A frozen table of text embeddings `(labels + 1, wordings, size)`, zero for the null label, and a linear map."""

    def __init__(self, table: torch.Tensor, dim: int):
        super().__init__()
        self.register_buffer("table", F.pad(table * table.shape[-1] ** 0.5, (0, 0, 0, 0, 0, 1)))
        self.linear = nn.Linear(table.shape[-1], dim)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        wordings = torch.randint(self.table.shape[1], labels.shape) if self.training else torch.zeros_like(labels)
        return self.linear(self.table[labels, wordings])


class TextDiT(WhiteBoxDiTModel):
    """The denoiser with text embeddings. `tables` are those of the label keys, in the order of the categories."""

    tables: list[torch.Tensor] = []

    def _init_weights(self):
        dim = self.modulation_out.in_features
        self.condition_embedders = nn.ModuleList(TextEmbedder(table, dim) for table in self.tables)
        super()._init_weights()


def read_halves(path: Path) -> tuple[ad.AnnData, ad.AnnData]:
    """Cells with labels, half of each combination for training and half for judging."""
    cells = ad.read_h5ad(path)
    cells.obs["condition"] = cells.obs["condition"].astype(str) if "condition" in cells.obs else "CTRL"
    cells.obs = cells.obs[KEYS].astype(str)
    cells.obs_names, cells.uns = [f"{path.stem}_{i}" for i in range(cells.n_obs)], {}
    cells = cells[cells.obs["cell_type"].isin(list(POPULATION))].copy()
    order = np.random.default_rng(0).permutation(cells.n_obs)
    rank = cells.obs.iloc[order].groupby(KEYS).cumcount().reindex(cells.obs_names)
    return cells[(rank % 2 == 0).to_numpy()].copy(), cells[(rank % 2 == 1).to_numpy()].copy()


def generator(args: Any, cells: ad.AnnData, name: str, encoder: Encoder, like: str = "") -> ScRNAGenerationPipeline:
    """A pipeline of a work folder, trained if need be. It takes stage one from another (`like`)."""
    folder, categories = args.work_dir / name, [sorted(set(cells.obs[key])) for key in KEYS]
    settings = {"label_keys": KEYS, "num_genes": 2000, "num_programs": 16, "codec_max_steps": 800, "seed": args.seed}
    settings |= {"test_fraction": 0.05, "max_train_steps": args.steps}
    words = (WORDINGS | {c: [DESCRIPTIONS[c]] * 7 for c in CONDITIONS}) if name.endswith("wordings") else {}
    TextDiT.tables = [torch.stack([encoder(words.get(c, [c])) for c in names]) for names in categories]
    network = None if name.endswith("labels") else TextDiT
    if not (folder / "model_index.json").exists():
        if like:
            shutil.copytree(args.work_dir / like / "stage_one", folder / "stage_one", dirs_exist_ok=True)
            for part in ("run.json", "split.json"):
                shutil.copy(args.work_dir / like / part, folder / part)
            settings["resume_from_checkpoint"] = "latest"
        train(cells, TrainingConfig(output_dir=folder, **settings), denoiser=network)
    parts = {} if network is None else {"denoiser": network.from_pretrained(folder / "denoiser")}
    pipe = ScRNAGenerationPipeline.from_pretrained(folder, **parts)
    assert pipe.processor.config.categories == categories
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Judge:
    """Real control cells of the third dataset: one half judges, the other one is the reference."""

    def __init__(self, halves: tuple[ad.AnnData, ad.AnnData], genes: list[str]):
        self.genes, matrices, labels = genes, [], []
        for half in halves:
            half = half[half.obs["condition"] == "CTRL"]
            sizes = np.asarray(half.X.sum(axis=1)).ravel()
            matrices.append(log_normalize(half[:, genes].X, sizes).toarray())
            labels.append(half.obs["cell_type"].to_numpy())
        names, numbers = np.unique(labels[1], return_counts=True)
        self.types = names[numbers >= MIN_CELLS].tolist()
        self.reference, self.real = ([x[y == t] for t in self.types] for x, y in zip(matrices, labels))
        self.center = np.mean([x.mean(0) for x in self.real], axis=0)
        self.pca = PCA(30, random_state=0).fit(np.concatenate(self.real))
        regression = LogisticRegression(C=0.1, max_iter=500, class_weight="balanced")
        steps = StandardScaler(), PCA(50, random_state=0), StandardScaler(), regression
        self.classifier = make_pipeline(*steps).fit(matrices[1], labels[1])

    def energy(self, cells: np.ndarray, i: int) -> float:
        """Energy distance of cells to a real type, without distances of cells to themselves."""
        x, y = self.pca.transform(cells), self.pca.transform(self.real[i])
        within = [cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
        return float(2 * cdist(x, y).mean() - sum(within))

    def measure(self, cells: list[np.ndarray]) -> Iterator[dict]:
        """Metrics of the cells `(cells, genes)` of each type."""
        shift = self.center - np.mean([x.mean(0) for x in cells], axis=0)
        for i, (name, x) in enumerate(zip(self.types, cells)):
            called = self.classifier.predict(x + shift)
            lineages = [LINEAGE[POPULATION[label]] == LINEAGE[POPULATION[name]] for label in called]
            row = {"energy": self.energy(x, i), "aligned": self.energy(x + shift, i)}
            row |= {"purity": float(np.mean(called == name)), "lineage": float(np.mean(lineages))}
            yield {key: round(value, 4) for key, value in row.items()}


def measure_cells(args: Any, third: str, halves: dict, encoder: Encoder) -> Iterator[dict]:
    """All rows of a turn: generators of the other two datasets, prompted with the type names of the third."""
    two, first = ad.concat([half for name, (half, _) in halves.items() if name != third]), f"{third}_text"
    pipe = generator(args, two, first, encoder)
    others = {
        name: generator(args, two, f"{third}_{name}", encoder, like=first) for name in args.networks if name != "all"
    }
    if "all" in args.networks:
        others["all"] = generator(args, ad.concat([half for half, _ in halves.values()]), "all_text", encoder)
    genes = set.intersection(*(set(one.processor.var_names) for one in (pipe, *others.values())))
    judge = Judge(halves[third], sorted(genes))
    labels, types = pipe.processor.config.categories[0], judge.types

    def sample(one: ScRNAGenerationPipeline, label: str, prompt: str | None = None) -> np.ndarray:
        """Log expression of cells of a label, in whose place the denoiser may be given a prompt."""
        if prompt is not None:
            table, row = one.denoiser.condition_embedders[0].table, labels.index(label)
            before = table[row].clone()
            table[row] = encoder([prompt])[0] * table.shape[-1] ** 0.5
        request = {"cell_type": label, "condition": "CTRL"}
        cells = one(NUM_CELLS, conditions=request, generator=torch.Generator().manual_seed(args.seed)).cells
        if prompt is not None:
            table[row] = before
        return log_normalize(cells[:, judge.genes].X, cells.obs["library_size"].to_numpy()).toarray()

    made = {label: sample(pipe, label) for label in labels}
    ends, rng = [(label, "") for label in labels], np.random.default_rng(args.seed)
    picks = {way: [labels[nearest(ends, name, encoder, *way)[0]] for name in types] for way in WAYS}
    own = picks["label", "cosine"]
    rows = [("real cells", judge.reference, types)]
    rows.append(("projection", [sample(pipe, *pair) for pair in zip(own, types)], own))
    if "all" in others:
        rows.append(("trained on all three", [sample(others["all"], name) for name in types], types))
    if "labels" in others:
        rows.append(("nearest name, default network", [sample(others["labels"], label) for label in own], own))
    if "wordings" in others:
        cells = [sample(others["wordings"], *pair) for pair in zip(own, types)]
        rows.append(("projection, trained on wordings", cells, own))
    chosen = [(f"nearest name: {form}, {score}", names) for (form, score), names in picks.items()]
    best = [min(labels, key=lambda label: judge.energy(made[label], i)) for i in range(len(types))]
    chosen += [("best label", best), *(("random label", rng.choice(labels, len(types)).tolist()) for _ in range(5))]
    rows += [(row, [made[label] for label in names], names) for row, names in chosen]
    known = {POPULATION[label] for label in labels}
    for row, cells, names in rows:
        for name, picked, values in zip(types, names, judge.measure(cells)):
            facts = {"third": third, "steps": args.steps, "seed": args.seed, "row": row, "cell_type": name}
            found = {"known": POPULATION[name] in known, "picked": picked}
            yield facts | found | {"right": POPULATION[picked] == POPULATION[name]} | values


def table(results: list[dict]) -> str:
    """The mean over types and turns of each row, and the difference to the nearest name where that is right or not."""
    made, metrics, lines = [row for row in results if "third" in row], ("energy", "aligned", "purity", "lineage"), []
    base = {(x["third"], x["seed"], x["cell_type"]): x for x in made if x["row"] == "nearest name: label, cosine"}
    for name in dict.fromkeys(row["row"] for row in made):
        own = [row for row in made if row["row"] == name]
        pairs = [(x, base[x["third"], x["seed"], x["cell_type"]]) for x in own]
        change = [[x["energy"] - y["energy"] for x, y in pairs if y["right"] == right] for right in (True, False)]
        right = f"{sum(x['right'] for x in own)} of {len(own)}"
        lower = f"{sum(x < 0 for x in sum(change, []))} of {len(own)}"
        lines.append([name, *(mean_sd([x[key] for x in own]) for key in metrics), right, *map(mean_sd, change), lower])
    less = "energy, less nearest name that is right", "that is wrong", "lower"
    return markdown(["row", *metrics, "right label", *less], lines)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--encoder", help="Folder of the sentence encoder.")
    parser.add_argument("--steps", type=int, default=400, help="Steps of a training.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of trainings and cells.")
    parser.add_argument(
        "--networks", nargs="*", choices=["all", "labels", "wordings"], default=[], help="Further networks."
    )
    args = parse(parser, table)
    encoder, halves = Encoder(args.encoder), {path.stem: read_halves(path) for path in args.dataset}
    genes = sorted(set.intersection(*(set(half.var_names) for half, _ in halves.values())))
    halves = {name: tuple(half[:, genes].copy() for half in pair) for name, pair in halves.items()}
    for third in halves:
        done = {(row.get("third"), row.get("seed")) for row in read_results(args.output, [])}
        if (third, args.seed) not in done:
            add_rows(args.output, measure_cells(args, third, halves, encoder))
    print(table(read_results(args.output, [])))


if __name__ == "__main__":
    main()
