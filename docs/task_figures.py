"""Draws the figures of the task pages from lab/results: `python docs/task_figures.py`."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np


ROOT = Path(__file__).parents[1]
OURS, OTHERS = "#0072B2", ("#D55E00", "#E69F00", "#009E73", "#CC79A7", "#999999", "#56B4E9", "#000000")

plt.switch_backend("Agg")
plt.rcParams["font.size"] = 12


def read(name: str) -> list | dict:
    return json.loads((ROOT / "lab" / "results" / f"{name}.json").read_text())


def save(figure: plt.Figure, name: str):
    figure.savefig(ROOT / "docs" / f"{name}.png", dpi=80)
    plt.close(figure)


def mean_of(rows: list[dict], row: str, key: str, **known) -> float:
    chosen = [r[key] for r in rows if r["row"] == row and all(r[name] == value for name, value in known.items())]
    return float(np.mean(chosen)) if chosen else np.nan


def bars(axis: plt.Axes, groups: list[str], columns: dict[str, list[float]]):
    """Grouped bars: ours first, in blue."""
    width = 0.8 / len(columns)
    for i, ((label, values), colour) in enumerate(zip(columns.items(), (OURS, *OTHERS))):
        axis.bar(np.arange(len(groups)) + width * i, values, width, color=colour, label=label)
    axis.set_xticks(np.arange(len(groups)) + width * (len(columns) - 1) / 2, groups)


def panel():
    """Correlation per gene with 200 genes in the panel."""
    rows, names = (
        read("panel_cpu"),
        {
            "network": "wbdit_diffusers",
            "mean of the true type": "mean of the true type",
            "nearest cells": "nearest cells",
            "nearest cells in scVI trained on the panel": "nearest cells in scVI",
            "scVI, zeros for other genes": "scVI, zeros",
        },
    )
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    figure, axis = plt.subplots(figsize=(10, 3.4), layout="constrained")
    columns = {
        label: [mean_of(rows, row, "gene", dataset=dataset, panel=200) for dataset in datasets]
        for row, label in names.items()
    }
    bars(axis, [dataset.split("_")[0] for dataset in datasets], columns)
    axis.set_ylabel("correlation per gene")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save(figure, "panel")


def rare_types():
    """F1 of the rare type with ten real cells."""
    rows = [row | {"f1": (row["f1_logistic"] + row["f1_forest"]) / 2} for row in read("augment_cpu")]
    names = ["generated cells, closed form", "nothing", "class weights", "duplicates", "SMOTE", "scVI, gaussian"]
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    figure, axis = plt.subplots(figsize=(10, 3.4), layout="constrained")
    columns = {name: [mean_of(rows, name, "f1", dataset=one, number=10) for one in datasets] for name in names}
    bars(axis, [dataset.split("_")[0] for dataset in datasets], columns)
    axis.set_ylabel("F1 of the type, 10 cells")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save(figure, "rare_types")


def few_cells():
    """Excess by number of training cells."""
    rows = read("few_cells_cpu")
    figure, axis = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
    numbers = sorted({row["cells"] for row in rows})
    columns = {
        way: [np.mean([row["excess"] for row in rows if row["way"] == way and row["cells"] == one]) for one in numbers]
        for way in ("from the other pipeline", "from nothing")
    }
    bars(axis, [str(number) for number in numbers], columns)
    axis.set(xlabel="training cells of pbmc3k", ylabel="excess (0 is real)")
    axis.legend(frameon=False)
    save(figure, "few_cells")


def words():
    """Prompts with the right label."""
    fractions = {"bare labels": (0.64, 0.49), "written out": (0.74, 0.62), "with synonyms": (0.80, 0.71)}
    figure, axis = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
    bars(axis, list(fractions), dict(zip(("encoder", "spelling"), map(list, zip(*fractions.values())))))
    axis.set(ylabel="prompts with the right label", ylim=(0, 1))
    axis.legend(frameon=False, ncols=2)
    save(figure, "words")


def ground_truth():
    """Power and wrong calls by dose."""
    rows = [row for row in read("ground_truth_cpu") if row["dose"] and row["cells"] == 200]
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.2), layout="constrained")
    for axis, key, title in zip(
        axes, ("power", "wrong"), ("changed genes that are called", "called genes that are unchanged")
    ):
        for method, colour in (("t-test", OURS), ("wilcoxon", OTHERS[0])):
            doses = sorted({row["dose"] for row in rows})
            values = [np.mean([r[key] for r in rows if r["method"] == method and r["dose"] == d]) for d in doses]
            axis.plot(doses, values, "o-", color=colour, label=method)
        axis.set(title=title, xlabel="change of the program (sd)", ylim=(0, 0.7 if key == "power" else 0.1))
    axes[1].axhline(0.05, color="black", linewidth=0.7, linestyle="--")
    axes[0].legend(frameon=False)
    save(figure, "ground_truth")


def sharing():
    """Membership AUC by dataset."""
    reports = {
        name: row["report"]
        for file in ("quality_narrow_cpu", "quality_all_genes_cpu")
        for name, row in read(file).items()
    }
    chosen = {"pbmc3k": "pbmc3k", "kang_ifnb_pbmc": "kang", "zheng_facs_pbmc": "zheng", "paul15": "paul15",
              "pancreas_endocrinogenesis": "pancreas", "pollen_smartseq": "pollen"}  # fmt: skip
    columns = {
        "generated": ("generated cells", OURS),
        "training latents resampled": ("latents of training cells", OTHERS[4]),
    }
    figure, axis = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
    for i, (column, (label, colour)) in enumerate(columns.items()):
        values = [np.mean(reports[name]["metrics"][column]["membership_auc"]) for name in chosen]
        axis.bar(
            np.arange(len(chosen)) + 0.35 * i, np.array(values) - 0.4, 0.35, bottom=0.4, color=colour, label=label
        )
    axis.axhline(0.5, color="black", linewidth=0.7)
    axis.set_xticks(np.arange(len(chosen)) + 0.175, chosen.values())
    axis.set(ylabel="membership AUC", ylim=(0.4, 0.7))
    axis.legend(frameon=False, ncols=2)
    save(figure, "sharing")


def paper():
    """The published network and the DiT in the paper's setting: time per epoch, loss, and distance to real cells."""
    colours = {"White-Box": OURS, "DiT": OTHERS[0]}
    datasets = read("reproduction_cpu")["datasets"]
    long = read("reproduction_long_cpu")["datasets"]["kang_ifnb_pbmc"]
    figure, (times, losses, distances) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    seconds = {
        name: [
            np.mean([run["seconds_per_epoch"] for run in entry["models"][name]["runs"].values()])
            for entry in datasets.values()
        ]
        for name in colours
    }
    ratios = np.divide(seconds["DiT"], seconds["White-Box"])
    times.bar([name.split("_")[0] for name in datasets], ratios, color=OURS)
    times.axhline(1, color="black", linewidth=0.7)
    times.tick_params(axis="x", rotation=45)
    times.set_title("DiT: times as long per epoch")
    for name, colour in colours.items():
        run, epochs = long["models"][name]["runs"]["0"], long["models"][name]["epochs"]
        log, minutes = run["log"], np.array([int(epoch) for epoch in epochs]) * run["seconds_per_epoch"] / 60
        losses.plot(np.array(log["seconds"]) / 60, log["validation_loss"], color=colour, label=name)
        distances.plot(minutes, [np.mean(entry["w2"]) for entry in epochs.values()], "o-", color=colour)
    distances.axhline(np.mean(long["floors"]["real reference"]["w2"]), color="grey", label="real cells")
    losses.set(title="held-out loss, kang", xlabel="minutes", yscale="log")
    distances.set(title="W2 to held-out cells, kang", xlabel="minutes", ylim=(0, None))
    losses.legend(frameon=False)
    distances.legend(frameon=False)
    save(figure, "paper")


if __name__ == "__main__":
    for draw in (paper, panel, rare_types, few_cells, words, ground_truth, sharing):
        draw()
