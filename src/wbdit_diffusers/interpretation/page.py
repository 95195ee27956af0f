"""The report of `explain` as one HTML page: figures of its numbers, each curve next to its control."""

import base64
import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from jinja2 import Template
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..evaluation.figure import CONTROL, GENERATED, REAL, plot_heatmap, plot_types, point_size
from ..version import __version__


NETWORK = GENERATED
DENOISERS = {"network": "network", "closed_form": "closed form of a Gaussian mixture"}
MAX_TYPES = 40
SHOWN_PROGRAMS = 3  # on the UMAP


def write_report(folder: Path, report: dict, cells: ad.AnnData, title: str):
    """Writes `explain.html`, `explain.json`, `explain.h5ad` and `figures/`, from what [`explain`] returned."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    (folder / "explain.json").write_text(json.dumps(report, indent=1))
    cells.write_h5ad(folder / "explain.h5ad")
    figures = {
        "programs": _programs_figure(report, cells),
        "layers": _layers_figure(report),
        "steps": _steps_figure(report),
        "type_stability": _type_stability_figure(report),
        "explained_variance": _explained_variance_figure(report),
        "interventions": _interventions_figure(report),
    }
    if report["condition"]:
        figures["condition"] = _condition_figure(report["condition"])
    images = {}
    for name, figure in figures.items():
        path = folder / "figures" / f"{name}.png"
        figure.savefig(path, dpi=100)
        plt.close(figure)
        images[name] = base64.b64encode(path.read_bytes()).decode()
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"), autoescape=True)
    facts = summarize(report)
    names = {"facts": facts, "warnings": find_warnings(report, facts), "version": __version__}
    (folder / "explain.html").write_text(template.render(names, report=report, images=images, title=title))


def summarize(report: dict) -> dict[str, float]:
    """The numbers in the sentences of the page."""
    layers, explained, held, stability = (
        pd.DataFrame(report[part]) for part in ("layers", "explained_variance", "interventions", "type_stability")
    )
    by_layer = layers.groupby(["network", "layer"])["explained"].mean()
    steps = layers[(layers["network"] == "trained") & (layers["layer"] > 0)]
    slopes = held.groupby("source")["slope"].mean()
    facts = {
        **steps.drop(columns=["network", "timestep", "layer", "explained"]).mean(),
        "closed_form_early": explained["agreement"][0],
        "gain_of_network": (explained["network_mean"] - explained["closed_form_mean"]).mean(),
        "explained_before": by_layer["trained", 0],
        "explained_trained": by_layer["trained", steps["layer"].max()],
        "explained_untrained": by_layer["untrained", steps["layer"].max()],
        "slope_network": slopes["network"],
        "slope_closed_form": slopes["closed_form"],
        "slope_training": slopes["training cells"],
    }
    if "changed" in stability:
        of_network = stability[stability["denoiser"] == "network"]
        decided = of_network["timestep"][of_network["changed"] > of_network["chance"] / 2]
        if len(decided):
            facts["decided"] = decided.iloc[0]
    return facts


def find_warnings(report: dict, facts: dict[str, float]) -> list[str]:
    """Why nothing on the page may be claimed of the network."""
    warnings = [report["warning"]] if report.get("warning") else []
    if facts["gain_of_network"] < 0:
        warnings.append("The network explains less of the programs' variance than the closed form.")
    if facts["explained_trained"] <= facts["explained_untrained"]:
        warnings.append("The trained layers explain no more of the clean cell than untrained ones.")
    return warnings


def _panels(number: int, width: float, height: float, **kwargs) -> tuple[Figure, np.ndarray]:
    """A figure with panels side by side."""
    figure, axes = plt.subplots(1, number, figsize=(width, height), layout="constrained", squeeze=False, **kwargs)
    return figure, axes[0]


def _plot_pair(axis: Axes, curves: pd.DataFrame, names: dict[str, str], **texts):
    """The curve of the network and, dashed, that of its control, from the named columns."""
    pair = curves[list(names)].rename(columns=names)
    pair.plot(ax=axis, style=["o-", "o--"], color=[NETWORK, CONTROL], **texts)
    axis.legend(frameon=False)


def _programs_figure(report: dict, cells: ad.AnnData) -> Figure:
    programs, key, points = report["programs"], report["label_key"], cells.obsm["X_umap"]
    number = len(programs)
    figure = plt.figure(figsize=(13, 5.2 + 0.26 * number), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3.6, 1.6 + 0.26 * number])
    axes = top.subplots(1, min(SHOWN_PROGRAMS, number) + (key is not None), squeeze=False)[0]
    if key is not None:
        plot_types(axes[:1], [points], [cells.obs[key].astype(str).to_numpy()], [f"held-out cells by {key}"])
    for i, axis in enumerate(axes[key is not None :]):
        values = cells.obsm["X_programs"][:, i]
        limit, size = np.quantile(np.abs(values), 0.98), point_size(len(points))
        dots = axis.scatter(*points.T, s=size, c=values, cmap="RdBu_r", vmin=-limit, vmax=limit, linewidths=0)
        axis.set_title(f"program_{i}:\n{programs[i]['name']}")
        top.colorbar(dots, ax=axis, shrink=0.7)
    plt.setp(axes, xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    types = list(programs[0]["mean_activity"])[:MAX_TYPES]
    matrix = [[row["mean_activity"][name] for name in types] for row in programs]
    rows = [f"program_{i}: {row['name']}" for i, row in enumerate(programs)]
    axis = bottom.subplots()
    image = plot_heatmap(axis, matrix, rows, types, rotation=30, cmap="RdBu_r", vmin=-2, vmax=2)
    axis.set_title("mean activity of each program, in standard deviations of the training cells")
    bottom.colorbar(image, ax=axis)
    return figure


def _layers_figure(report: dict) -> Figure:
    by_timestep = pd.DataFrame(report["layers"]).groupby("timestep")
    figure, axes = _panels(len(by_timestep), 13, 3.4, sharex=True)
    names, ylabel = ("trained", "untrained"), "fraction of the clean cell that\na linear map of the tokens explains"
    for axis, (timestep, layers) in zip(axes, by_timestep):
        curves = layers.pivot(index="layer", columns="network", values="explained")
        _plot_pair(axis, curves, dict(zip(names, names)), title=f"timestep {timestep}", xlabel="after block")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel(ylabel)
    return figure


def _steps_figure(report: dict) -> Figure:
    layers = pd.DataFrame(report["layers"]).query("layer > 0").groupby(["network", "layer"]).mean()
    trained, untrained = layers.loc["trained"], layers.loc["untrained"]
    panels = {
        "coding rate:\nchange by attention": {"own": "own subspaces", "random": "random subspaces"},
        "attention's step and\nsteepest descent: cosine": {"cosine": "trained"},
        "objective of sparse coding:\nchange by ISTA": {"objective": "trained"},
        "size of a block's step\nrelative to its tokens": {"step": "trained"},
    }
    panels = {title: curves for title, curves in panels.items() if curves.keys() <= set(layers)}
    figure, axes = _panels(len(panels), 3.25 * len(panels), 3.6)
    for axis, (title, curves) in zip(axes, panels.items()):
        for (key, label), colour, dark in zip(curves.items(), (NETWORK, CONTROL), ("black", CONTROL)):
            axis.plot(trained[key], "o-", color=colour, label=label)
            label = "untrained" if label == "trained" else f"{label}, untrained"
            axis.plot(untrained[key], "--", color=dark, linewidth=1, label=label)
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set(title=title, xlabel="block", xticks=trained.index)
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.17 * len(curves) * (high - low))  # room for the legend
        axis.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def _type_stability_figure(report: dict) -> Figure:
    rows = pd.DataFrame(report["type_stability"]).pivot(index="timestep", columns="denoiser")
    has_types = "changed" in rows
    figure, axes = _panels(1 + has_types, 6.5 * (1 + has_types), 3.6)
    texts = {"title": "programs before and after (thin lines: each program)", "ylabel": "correlation"}
    _plot_pair(axes[0], rows["correlation_mean"], DENOISERS, **texts, xlabel="noise up to timestep")
    each = rows["correlation", "network"]
    axes[0].plot(each.index, each.tolist(), color=NETWORK, linewidth=0.4, alpha=0.5)
    if has_types:
        axes[1].axhline(rows["chance"].iloc[0, 0], color="black", linestyle=":", label="shuffled cells")
        texts = {"title": "cells that change their type", "ylabel": "fraction"}
        _plot_pair(axes[1], rows["changed"], DENOISERS, **texts, xlabel="noise up to timestep")
    return figure


def _explained_variance_figure(report: dict) -> Figure:
    rows = pd.DataFrame(report["explained_variance"]).set_index("timestep")
    figure, axes = _panels(2, 13, 3.6)
    names = {"network_mean": "network", "closed_form_mean": "closed form"}
    _plot_pair(axes[0], rows, names, title="fraction of the programs' variance that is explained")
    title = "agreement of the network with the closed form"
    rows["agreement"].plot(ax=axes[1], style="o-", color=NETWORK, title=title, ylim=(0, 1.02))
    return figure


def _interventions_figure(report: dict) -> Figure:
    by_program = pd.DataFrame(report["interventions"]).groupby("program")
    sources = {
        "training cells": (REAL, "x", "training cells"),
        "closed_form": (CONTROL, "o", "closed form, held"),
        "network": (NETWORK, "o", "network, held"),
    }
    figure, axes = _panels(len(by_program), 6 * len(by_program), 4)
    for axis, (program, rows) in zip(axes, by_program):
        for source, (colour, marker, label) in sources.items():
            row = rows.set_index("source").loc[source]
            held = int(program.removeprefix("program_"))
            points = (np.delete(row[key], held) for key in ("regression", "responses"))
            axis.scatter(*points, color=colour, marker=marker, s=22, label=f"{label}: slope {row['slope']:.2f}")
        axis.axline((0, 0), slope=1, color="black", linewidth=0.7)
        axis.axline((0, 0), slope=0, color="black", linewidth=0.7, linestyle=":")
        axis.set(title=f"{program} held", xlabel="regression in held-out cells", ylabel="response of other programs")
        axis.legend(frameon=False)
    return figure


def _condition_figure(condition: dict) -> Figure:
    rows = pd.DataFrame(condition["types"])
    blocks = [*range(1, len(rows["blocks"][0])), "out"]
    panels = {
        "blocks": ("block of the network", blocks),
        "untrained_blocks": ("block, untrained matrices", blocks),
        "timesteps": ("quarter of the steps", [1, 2, 3, 4]),
        "closed_form_timesteps": ("quarter, closed form", [1, 2, 3, 4]),
    }
    figure, axes = _panels(len(panels), 13, 1.8 + 0.3 * len(rows), sharey=True)
    for axis, (key, (title, ticks)) in zip(axes, panels.items()):
        shares = rows[key].tolist()
        image = plot_heatmap(axis, shares, rows["type"], ticks, rotation=0, cmap="Blues", vmin=0, vmax=0.6)
        axis.set_title(title)
    figure.colorbar(image, ax=axes, label="share of the change that is\nlost without the condition")
    return figure
