"""Tables and figures of the results of benchmarks/reproduce.py."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from common import markdown, mean_sd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from wbdit_diffusers.data import read_cells


WHITE_BOX, DIT, LARGE, DEFAULT = "White-Box", "DiT", "White-Box, as large as the DiT", "our default"
COLOURS = {"real": "tab:blue", WHITE_BOX: "tab:orange", DIT: "tab:green", LARGE: "tab:red", DEFAULT: "tab:purple"}
# Columns of the tables, if a JSON file has them. Older ones were judged by one random forest, `rf_auc`.
METRICS = {
    "rf_auc": "RF-AUC",
    "auc_forest": "AUC, forest",
    "auc_boosting": "AUC, boosting",
    "auc_regression": "AUC, regression",
    "w2": "W2",
    "mmd2": "MMD²",
    "variance_ratio": "variance",
    "zero_fraction_error": "zeros",
    "gene_correlation": "gene-gene",
    "nearest_training_cell": "nearest train",
    "paper_kl": "paper KL",
    "paper_wasserstein": "paper W1",
    "paper_mmd": "paper MMD",
}
FIGURE_STEPS = 100  # of the networks in the paper's setting: the paper's number of DDIM steps
LAYER_COLUMNS = ["coding rate, own", "coding rate, random", "cosine to the descent", "sparse coding"]
METRICS_BY_EPOCH = ("rf_auc", "auc_forest", "auc_boosting", "auc_regression", "w2", "mmd2")


# ==================== Tables ====================


def ratio_at(runs_a: dict, runs_b: dict, axis: str, column: str = "validation_loss") -> list[float]:
    """Loss of `a` divided by that of `b`, run by run, at the last epoch (or second) that both have reached."""
    ratios = []
    for seed in runs_a:
        if seed in runs_b:
            a, b = runs_a[seed]["log"], runs_b[seed]["log"]
            last = min(a[axis][-1], b[axis][-1])
            ratios.append(np.interp(last, a[axis], a[column]) / np.interp(last, b[axis], b[column]))
    return ratios


def present(metrics: Iterable[str], reports: list[dict]) -> list[str]:
    """The metrics that at least one report has."""
    return [metric for metric in metrics if any(metric in report for report in reports)]


def table_of_losses(complete: dict) -> str:
    """White-Box compared with DiT."""
    rows = []
    for name, entry in complete.items():
        runs = {model: parts["runs"] for model, parts in entry["models"].items() if model != DEFAULT}
        seconds = [
            runs[DIT][seed]["seconds_per_epoch"] / runs[WHITE_BOX][seed]["seconds_per_epoch"]
            for seed in runs[WHITE_BOX]
        ]
        ratios = [
            ratio_at(runs.get(model, {}), runs[DIT], axis)
            for model in (WHITE_BOX, LARGE)
            for axis in ("epoch", "seconds")
        ]
        rows.append([name, mean_sd(seconds, 2), *map(mean_sd, ratios)])
    header = ["dataset", "seconds per epoch, DiT / White-Box", "held-out loss, White-Box / DiT: at equal epochs"]
    header += ["at equal time", "White-Box as large as the DiT: at equal epochs", "at equal time"]
    return markdown(header, rows)


def table_of_costs(complete: dict, sizes: dict) -> str:
    """Parameters, time and memory; `sizes` are [`networks`]."""
    rows = []
    for name, entry in complete.items():
        for model, parts in entry["models"].items():
            runs = parts["runs"].values()
            row = [name, model, "–", "–", mean_sd([run["minutes"] for run in runs], 2), "–", "–", "–", "–"]
            if model != DEFAULT:  # another loss, and batches of another size
                row[2:4] = f"{sizes[model]['parameters']:,}", f"{sizes[model]['flop_per_step'] / 1e9:.1f}"
                row[5] = mean_sd([run["seconds_per_epoch"] for run in runs], 2)
                row[6] = mean_sd([run["epochs"] for run in runs], 1)
                # The last interval of the log may be incomplete.
                row[7] = mean_sd([run["log"]["loss"][-2:][0] for run in runs])
                row[8] = mean_sd([run["log"]["validation_loss"][-1] for run in runs])
            row.insert(7, mean_sd([run["peak_memory_mib"] for run in runs], 0))
            rows.append(row)
    header = ["dataset", "model", "parameters", "GFLOP per step", "minutes", "seconds per epoch", "epochs"]
    return markdown([*header, "peak memory, MiB", "training loss", "held-out loss"], rows)


def table_of_cells(complete: dict) -> str:
    """All metrics of real cells, and of each model and sampler."""
    reports = []
    for name, entry in complete.items():
        reports += [(name, cells, "", metrics) for cells, metrics in entry["floors"].items()]
        for model, parts in entry["models"].items():
            reports += [(name, model, steps, metrics) for steps, metrics in parts["samplers"].items()]
    columns = present(METRICS, [metrics for *_, metrics in reports])
    rows = [[*names, *(mean_sd(metrics.get(key, [])) for key in columns)] for *names, metrics in reports]
    return markdown(["dataset", "cells", "steps", *(METRICS[key] for key in columns)], rows)


def table_of_epochs(complete: dict) -> str:
    """Losses and cells during the training of the first seed."""
    reports = []
    for name, entry in complete.items():
        for model in (WHITE_BOX, DIT):
            log = entry["models"][model]["runs"]["0"]["log"]
            for epoch, metrics in entry["models"][model].get("epochs", {}).items():
                seconds, loss = (
                    np.interp(int(epoch), log["epoch"], log[key]) for key in ("seconds", "validation_loss")
                )
                reports.append(([name, model, epoch, f"{seconds:.0f}", f"{loss:.3f}"], metrics))
    columns = present(METRICS_BY_EPOCH, [metrics for _, metrics in reports])
    rows = [[*names, *(mean_sd(metrics.get(key, [])) for key in columns)] for names, metrics in reports]
    header = ["dataset", "model", "epochs", "seconds", "held-out loss"]
    return markdown([*header, *(METRICS[key] for key in columns)], rows)


def table_of_layers(complete: dict) -> str:
    """Steps of attention and ISTA, means over layers and timesteps, next to the same blocks untrained."""
    rows = []
    for name, entry in complete.items():
        for model, parts in entry["models"].items():
            for network in ("trained", "untrained"):
                layers = [row for row in parts.get("layers", {}).get("0", {"rows": []})["rows"] if "own" in row]
                layers = [row for row in layers if row["network"] == network]
                if layers:
                    means = [np.mean([row[key] for row in layers]) for key in ("own", "random", "cosine", "objective")]
                    cells = [f"{value:+.1%}" for value in means[:2]] + [f"{means[2]:.3f}", f"{means[3]:+.1%}"]
                    rows.append([name, model, network, *cells])
    return markdown(["dataset", "model", "matrices", *LAYER_COLUMNS], rows) if rows else ""


def tables(results: dict) -> str:
    """All tables, of the datasets that are complete."""
    complete = {name: entry for name, entry in results["datasets"].items() if "seconds" in entry}
    parts = [table_of_losses(complete), table_of_costs(complete, results["networks"]), table_of_cells(complete)]
    parts += [table_of_epochs(complete), table_of_layers(complete)]
    missing = sorted(set(results["datasets"]) - set(complete))
    if missing:
        parts.append(f"Not complete: {', '.join(missing)}.")
    return "\n\n".join(part for part in parts if part) + "\n"


# ==================== Figures ====================


def draw_cells(axis: Axes, title: str, groups: dict[str, ad.AnnData]):
    """A joint t-SNE."""
    from wbdit_diffusers.evaluation.figure import embedding

    points = embedding([cells.X.toarray() for cells in groups.values()], "tsne")
    sources = np.repeat(list(groups), [cells.n_obs for cells in groups.values()])
    for source in reversed(groups):
        of_source = sources == source
        label = f"{source} ({of_source.sum()})"
        axis.scatter(*points[of_source].T, s=4, linewidths=0, alpha=0.7, label=label, color=COLOURS[source])
    axis.set(xticks=[], yticks=[], title=title)
    axis.legend(fontsize=6, markerscale=2, frameon=False)


def draw_dataset(growing: list[Axes], many: list[Axes], entry: dict, data: Any):
    """The paper's figures 2 and 3 of one dataset, in a row of axes each: over the epochs, and of all models."""

    def load(file_name: str) -> ad.AnnData:
        return read_cells(data.folder / f"{file_name}.h5ad")

    last = load(f"{WHITE_BOX}, {FIGURE_STEPS} steps")
    real, train_cells = data.test[:, last.var_names], data.train[:, last.var_names]
    epochs = list(entry["models"][WHITE_BOX].get("epochs", {}))[-3:]
    for axis, epoch in zip(growing, epochs):
        draw_cells(axis, f"epoch {epoch}", {"real": real, WHITE_BOX: load(f"{WHITE_BOX}, epoch {epoch}")})
    end = entry["models"][WHITE_BOX]["runs"]["0"]["epochs"]
    draw_cells(growing[3], f"epoch {end:.0f}, the end", {"real": real, WHITE_BOX: last})
    other = DEFAULT if DEFAULT in entry["models"] else DIT
    steps = 20 if other == DEFAULT else FIGURE_STEPS
    draw_cells(growing[4], f"{other}, the end", {"real": real, other: load(f"{other}, {steps} steps")})
    draw_cells(many[0], "paper's setting", {"real": real, WHITE_BOX: last, DIT: load(f"{DIT}, {FIGURE_STEPS} steps")})
    real = train_cells[np.random.default_rng(0).permutation(train_cells.n_obs)[: 5 * real.n_obs]]
    for axis, model in zip(many[1:], (WHITE_BOX, other)):
        draw_cells(axis, f"five times as many: {model}", {"real": real, model: load(f"{model}, five times")})
    for axes in (growing, many):
        axes[0].set_ylabel(data.name, fontsize=8)


def draw_losses(axes: list[Axes], name: str, entry: dict):
    """Held-out loss of every run over epochs, and over seconds."""
    for axis, key in zip(axes, ("epoch", "seconds")):
        for model in (WHITE_BOX, DIT, LARGE):
            for i, run in enumerate(entry["models"].get(model, {"runs": {}})["runs"].values()):
                label = model if i == 0 else None
                axis.plot(run["log"][key], run["log"]["validation_loss"], color=COLOURS[model], label=label)
        axis.set(xlabel=key, yscale="log")
    axes[0].set_title(name, fontsize=8)


def draw_seconds(axis: Axes, datasets: dict):
    """Seconds per epoch of both networks."""
    for i, model in enumerate((WHITE_BOX, DIT)):
        seconds = [
            [run["seconds_per_epoch"] for run in entry["models"][model]["runs"].values()]
            for entry in datasets.values()
        ]
        means, deviations = ([measure(values) for values in seconds] for measure in (np.mean, np.std))
        axis.bar(np.arange(len(means)) + 0.4 * i, means, 0.4, label=model, yerr=deviations, color=COLOURS[model])
    axis.set_xticks(np.arange(len(datasets)) + 0.2, list(datasets), rotation=20, ha="right", fontsize=7)
    axis.set(ylabel="seconds per epoch")
    axis.legend(frameon=False)


def figures(results: dict, data: dict[str, Any], folder: Path):
    """
    Draws all figures, as PNG files.

    Args:
        results (`dict`): Results of reproduce.py.
        data (`dict`): The `reproduce.Dataset` of each dataset.
        folder (`Path`): Folder for the files.
    """
    plt.switch_backend("Agg")
    datasets, num = results["datasets"], len(results["datasets"])
    grids = {"epochs": (num, 5), "models": (num, 3), "losses": (2, num)}
    drawn = {
        name: plt.subplots(*grid, figsize=(3 * grid[1], 3 * grid[0]), squeeze=False, layout="constrained")
        for name, grid in grids.items()
    }
    drawn["seconds"] = plt.subplots(figsize=(7, 3), layout="constrained")
    for i, (name, entry) in enumerate(datasets.items()):
        draw_dataset(drawn["epochs"][1][i], drawn["models"][1][i], entry, data[name])
        draw_losses(drawn["losses"][1][:, i], name, entry)
    for axis in drawn["losses"][1][:, 0]:
        axis.set_ylabel("held-out loss")
    drawn["losses"][1][0, 0].legend(fontsize=7, frameon=False)
    draw_seconds(drawn["seconds"][1], datasets)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (figure, _) in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=70)
