"""The report of `explain` as one HTML page: figures of its numbers, each curve next to its control."""

import base64
import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, select_autoescape
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ..evaluation.figure import CONTROL, GENERATED, REAL, plot_types
from ..version import __version__


NETWORK = GENERATED
SOLID, DASHED = {"color": NETWORK}, {"color": CONTROL, "linestyle": "--"}
CLOSED_FORM = "closed form of a Gaussian mixture"
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
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape())
    facts = summarize(report)
    names = {"report": report, "images": images, "title": title, "version": __version__}
    names |= {"facts": facts, "warnings": find_warnings(report, facts)}
    (folder / "explain.html").write_text(environment.get_template("page.html").render(names))


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


def _programs_figure(report: dict, cells: ad.AnnData) -> Figure:
    programs = report["programs"]
    key = report["label_key"]
    number = len(programs)
    shown = min(SHOWN_PROGRAMS, number)
    figure = plt.figure(figsize=(13, 4.2 + 0.26 * number), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3.6, 0.6 + 0.26 * number])
    axes = top.subplots(1, shown + (key is not None), squeeze=False)[0]
    points = cells.obsm["X_umap"]
    size = float(np.clip(9000 / len(points), 2, 14))
    if key is not None:
        plot_types(axes[:1], [points], [cells.obs[key].astype(str).to_numpy()], [f"held-out cells by {key}"])
    for i, axis in enumerate(axes[key is not None :]):
        values = cells.obsm["X_programs"][:, i]
        limit = np.quantile(np.abs(values), 0.98)
        dots = axis.scatter(*points.T, s=size, c=values, cmap="RdBu_r", vmin=-limit, vmax=limit, linewidths=0)
        axis.set_title(f"program_{i}:\n{programs[i]['name']}")
        top.colorbar(dots, ax=axis, shrink=0.7)
    for axis in axes:
        axis.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    types = list(programs[0]["mean_activity"])[:MAX_TYPES]
    matrix = np.array([[row["mean_activity"][name] for name in types] for row in programs])
    axis = bottom.subplots()
    image = axis.imshow(matrix, cmap="RdBu_r", vmin=-2, vmax=2, aspect="auto")
    axis.set_xticks(range(len(types)), types, rotation=45, ha="right")
    axis.set_yticks(range(number), [f"program_{i}: {row['name']}" for i, row in enumerate(programs)])
    axis.set_title("mean activity of each program, in standard deviations of the training cells")
    bottom.colorbar(image, ax=axis)
    return figure


def _layers_figure(report: dict) -> Figure:
    layers = pd.DataFrame(report["layers"])
    timesteps = sorted(layers["timestep"].unique())
    figure, axes = plt.subplots(1, len(timesteps), figsize=(13, 3.4), layout="constrained", sharex=True, squeeze=False)
    for axis, timestep in zip(axes[0], timesteps):
        for name, style in (("trained", SOLID), ("untrained", DASHED)):
            own = layers[(layers["timestep"] == timestep) & (layers["network"] == name)]
            axis.plot(own["layer"], own["explained"], marker="o", label=name, **style)
        axis.set(title=f"timestep {timestep}", xlabel="after block")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("fraction of the clean cell that\na linear map of the tokens explains")
    axes[0, 0].legend(frameon=False)
    return figure


def _steps_figure(report: dict) -> Figure:
    layers = pd.DataFrame(report["layers"]).query("layer > 0").groupby(["network", "layer"]).mean()
    trained, untrained = layers.loc["trained"], layers.loc["untrained"]
    panels = [
        ("coding rate:\nchange by attention", [("own", "own subspaces"), ("random", "random subspaces")]),
        ("attention's step and\nsteepest descent: cosine", [("cosine", "trained")]),
        ("objective of sparse coding:\nchange by ISTA", [("objective", "trained")]),
        ("size of a block's step\nrelative to its tokens", [("step", "trained")]),
    ]
    panels = [panel for panel in panels if panel[1][0][0] in layers]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.25 * len(panels), 3.6), layout="constrained", squeeze=False)
    for axis, (title, curves) in zip(axes[0], panels):
        for (key, label), colour, dark in zip(curves, (NETWORK, CONTROL), ("black", CONTROL)):
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
    rows = pd.DataFrame(report["type_stability"])
    has_types = "changed" in rows
    number = 1 + has_types
    figure, axes = plt.subplots(1, number, figsize=(6.5 * number, 3.6), layout="constrained")
    axes = np.atleast_1d(axes)
    for name, label, style in (("network", "network", SOLID), ("closed_form", CLOSED_FORM, DASHED)):
        own = rows[rows["denoiser"] == name].set_index("timestep")
        axes[0].plot(own["correlation_mean"], marker="o", label=label, **style)
        if name == "network":
            axes[0].plot(own.index, own["correlation"].tolist(), color=NETWORK, linewidth=0.4, alpha=0.5)
        if has_types:
            axes[1].plot(own["changed"], marker="o", label=label, **style)
    title = "programs before and after (thin lines: each program)"
    axes[0].set(title=title, xlabel="noise up to timestep", ylabel="correlation")
    if has_types:
        axes[1].axhline(rows["chance"][0], color="black", linestyle=":", label="shuffled cells")
        axes[1].set(title="cells that change their type", xlabel="noise up to timestep", ylabel="fraction")
    for axis in axes:
        axis.legend(frameon=False)
    return figure


def _explained_variance_figure(report: dict) -> Figure:
    rows = pd.DataFrame(report["explained_variance"]).set_index("timestep")
    figure, axes = plt.subplots(1, 2, figsize=(13, 3.6), layout="constrained")
    axes[0].plot(rows["network_mean"], marker="o", label="network", **SOLID)
    axes[0].plot(rows["closed_form_mean"], marker="o", label="closed form", **DASHED)
    axes[0].set(title="fraction of the programs' variance that is explained", xlabel="timestep")
    axes[0].legend(frameon=False)
    axes[1].plot(rows["agreement"], marker="o", **SOLID)
    axes[1].set(title="agreement of the network with the closed form", xlabel="timestep", ylim=(0, 1.02))
    return figure


def _interventions_figure(report: dict) -> Figure:
    rows = {(row["program"], row["source"]): row for row in report["interventions"]}
    programs = sorted({program for program, _ in rows})
    sources = (
        ("training cells", REAL, "training cells", "x"),
        ("closed_form", CONTROL, "closed form, held", "o"),
        ("network", NETWORK, "network, held", "o"),
    )
    figure, axes = plt.subplots(1, len(programs), figsize=(6 * len(programs), 4), layout="constrained", squeeze=False)
    for axis, program in zip(axes[0], programs):
        for name, colour, label, marker in sources:
            row = rows[program, name]
            held = int(program.removeprefix("program_"))
            points = (np.delete(row[key], held) for key in ("regression", "responses"))
            axis.scatter(*points, color=colour, marker=marker, s=22, label=f"{label}: slope {row['slope']:.2f}")
        axis.axline((0, 0), slope=1, color="black", linewidth=0.7)
        axis.axline((0, 0), slope=0, color="black", linewidth=0.7, linestyle=":")
        axis.set(title=f"{program} held", xlabel="regression in held-out cells", ylabel="response of other programs")
        axis.legend(frameon=False)
    return figure


def _condition_figure(condition: dict) -> Figure:
    rows = condition["types"]
    types = [row["type"] for row in rows]
    panels = [
        ("blocks", "block of the network", [*range(1, len(rows[0]["blocks"])), "out"]),
        ("untrained_blocks", "block, untrained matrices", [*range(1, len(rows[0]["blocks"])), "out"]),
        ("timesteps", "quarter of the steps", [1, 2, 3, 4]),
        ("closed_form_timesteps", "quarter, closed form", [1, 2, 3, 4]),
    ]
    height = 1.8 + 0.3 * len(rows)
    figure, axes = plt.subplots(1, len(panels), figsize=(13, height), layout="constrained", sharey=True)
    for axis, (key, title, ticks) in zip(axes, panels):
        image = axis.imshow([row[key] for row in rows], cmap="Blues", vmin=0, vmax=0.6, aspect="auto")
        axis.set_xticks(range(len(ticks)), ticks)
        axis.set_yticks(range(len(types)), types)
        axis.set(title=title)
    figure.colorbar(image, ax=axes, label="share of the change that is\nlost without the condition")
    return figure
