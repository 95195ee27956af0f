"""The report of `explain` as one HTML page: figures of its numbers, each curve next to its control."""

import base64
import io
import json
from pathlib import Path

import anndata as ad
import numpy as np
from jinja2 import Environment, FileSystemLoader, select_autoescape
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ..evaluation.figure import plot_types
from ..version import __version__


NETWORK, CONTROL = "tab:red", "tab:grey"
MAX_TYPES = 20
SHOWN_PROGRAMS = 3  # on the UMAP


def draw_figures(report: dict, cells: ad.AnnData) -> dict[str, Figure]:
    """The figures of a report and cells of [`explain`], by the part of the report that they show."""
    return {
        "programs": _programs_figure(report, cells),
        "layers": _layers_figure(report),
        "steps": _steps_figure(report),
        "type_stability": _type_stability_figure(report),
        "explained_variance": _explained_variance_figure(report),
        "program_jacobian": _program_jacobian_figure(report),
        "interventions": _interventions_figure(report),
    }


def render_page(report: dict, figures: dict[str, Figure], title: str) -> str:
    """A self-contained HTML page of a report and its figures. All names in it are escaped."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape())
    template = environment.get_template("page.html")
    images = {name: _as_png(figure) for name, figure in figures.items()}
    return template.render(report=report, images=images, title=title, version=__version__, facts=summarize(report))


def write_report(folder: Path, report: dict, cells: ad.AnnData, title: str):
    """
    Writes `explain.html`, `explain.json`, `explain.h5ad` and the folder `figures`.

    Args:
        folder (`Path`): The folder, which may exist.
        report (`dict`): Report of [`explain`].
        cells (`AnnData`): Cells of [`explain`].
        title (`str`): Name of the pipeline.
    """
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    (folder / "explain.json").write_text(json.dumps(report, indent=1))
    cells.write_h5ad(folder / "explain.h5ad")
    figures = draw_figures(report, cells)
    for name, figure in figures.items():
        figure.savefig(folder / "figures" / f"{name}.png", dpi=100)
    (folder / "explain.html").write_text(render_page(report, figures, title))
    for figure in figures.values():
        plt.close(figure)


def summarize(report: dict) -> dict[str, float]:
    """The numbers in the sentences of the page."""
    layers = [row for row in report["layers"] if row["layer"]]
    trained, untrained = ([row for row in layers if row["network"] == name] for name in ("trained", "untrained"))
    facts = {"closed_form_early": report["explained_variance"][0]["agreement"]}
    gains = [row["network_mean"] - row["closed_form_mean"] for row in report["explained_variance"]]
    facts["gain_of_network"] = float(np.mean(gains))
    last = max(row["layer"] for row in layers)
    for name, rows in (("trained", trained), ("untrained", untrained)):
        facts[f"explained_{name}"] = float(np.mean([row["explained"] for row in rows if row["layer"] == last]))
    facts["explained_before"] = float(
        np.mean([row["explained"] for row in report["layers"] if row["layer"] == 0 and row["network"] == "trained"])
    )
    for key in ("own", "random", "cosine", "zeros", "zeros_of_relu", "curvature", "objective"):
        values = [row[key] for row in trained if key in row]
        if values:
            facts[key] = float(np.mean(values))
    for name in ("network", "closed_form", "training cells"):
        rows = [row for row in report["interventions"] if row["source"] == name]
        facts[f"slope_{name.split()[0]}"] = float(np.mean([row["slope"] for row in rows]))
    network, closed_form = (np.array(report["program_jacobian"][name]) for name in ("network", "closed_form"))
    facts["jacobian_correlation"] = _correlation(network, closed_form)
    changed = [row for row in report["type_stability"] if row["denoiser"] == "network" and "changed" in row]
    decided = [row["timestep"] for row in changed if row["changed"] > row["chance"] / 2]
    if decided:
        facts["decided"] = decided[0]
    return facts


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation off the diagonal. Column means, which reflect the scale of a program, are subtracted first."""
    off = ~np.eye(len(a), dtype=bool)
    centred = []
    for matrix in (a, b):
        means = np.nanmean(np.where(off, matrix, np.nan), axis=0)
        centred.append((matrix - means)[off])
    return float(np.corrcoef(*centred)[0, 1])


def _as_png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return base64.b64encode(buffer.getvalue()).decode()


def _programs_figure(report: dict, cells: ad.AnnData) -> Figure:
    programs = report["programs"]
    key = report["label_key"]
    number = len(programs)
    shown = min(SHOWN_PROGRAMS, number)
    figure = plt.figure(figsize=(15, 4.2 + 0.26 * number), layout="constrained")
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
        axis.set_title(f"program_{i}: {programs[i]['name']}", fontsize=9)
        top.colorbar(dots, ax=axis, shrink=0.7)
    for axis in axes:
        axis.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    types = list(programs[0]["mean_activity"])[: 2 * MAX_TYPES]
    matrix = np.array([[row["mean_activity"][name] for name in types] for row in programs])
    axis = bottom.subplots()
    image = axis.imshow(matrix, cmap="RdBu_r", vmin=-2, vmax=2, aspect="auto")
    axis.set_xticks(range(len(types)), types, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(range(number), [f"program_{i}: {row['name']}" for i, row in enumerate(programs)], fontsize=8)
    axis.set_title("mean activity of each program, in standard deviations of the training cells")
    bottom.colorbar(image, ax=axis)
    return figure


def _layers_figure(report: dict) -> Figure:
    rows = report["layers"]
    timesteps = sorted({row["timestep"] for row in rows})
    figure, axes = plt.subplots(1, len(timesteps), figsize=(15, 3.4), layout="constrained", sharex=True)
    for axis, timestep in zip(np.atleast_1d(axes), timesteps):
        for name, style in (("trained", {"color": NETWORK}), ("untrained", {"color": CONTROL, "linestyle": "--"})):
            own = [row for row in rows if row["timestep"] == timestep and row["network"] == name]
            axis.plot(
                [row["layer"] for row in own], [row["explained"] for row in own], marker="o", label=name, **style
            )
        axis.set(title=f"timestep {timestep}", xlabel="after block")
        axis.xaxis.get_major_locator().set_params(integer=True)
    np.atleast_1d(axes)[0].set_ylabel("fraction of the clean cell that\na linear map of the tokens explains")
    np.atleast_1d(axes)[0].legend(frameon=False)
    return figure


def _steps_figure(report: dict) -> Figure:
    rows = [row for row in report["layers"] if row["layer"] and row["network"] == "trained"]
    control = [row for row in report["layers"] if row["layer"] and row["network"] == "untrained"]
    layers = sorted({row["layer"] for row in rows})
    panels = [
        ("coding rate: change by attention", [("own", "own subspaces"), ("random", "random subspaces")]),
        ("attention's step and steepest descent: cosine", [("cosine", "trained")]),
        ("objective of sparse coding: change by ISTA", [("objective", "trained")]),
        ("size of a block's step relative to its tokens", [("step", "trained")]),
    ]
    panels = [panel for panel in panels if panel[1][0][0] in rows[0]]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.75 * len(panels), 3.4), layout="constrained", squeeze=False)
    for axis, (title, curves) in zip(axes[0], panels):
        for (key, label), colour, dark in zip(curves, (NETWORK, CONTROL), ("black", CONTROL)):
            means = [np.mean([row[key] for row in rows if row["layer"] == layer]) for layer in layers]
            axis.plot(layers, means, "o-", color=colour, label=label)
            means = [np.mean([row[key] for row in control if row["layer"] == layer]) for layer in layers]
            label = "untrained" if label == "trained" else f"{label}, untrained"
            axis.plot(layers, means, "--", color=dark, linewidth=1, label=label)
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set(title=title, xlabel="block", xticks=layers)
        axis.title.set_fontsize(9)
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.17 * len(curves) * (high - low))  # room for the legend
        axis.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def _type_stability_figure(report: dict) -> Figure:
    rows = report["type_stability"]
    has_types = "changed" in rows[0]
    figure, axes = plt.subplots(1, 1 + has_types, figsize=(6.5 * (1 + has_types), 3.6), layout="constrained")
    axes = np.atleast_1d(axes)
    for name, style in (("network", {"color": NETWORK}), ("closed_form", {"color": CONTROL, "linestyle": "--"})):
        own = [row for row in rows if row["denoiser"] == name]
        timesteps = [row["timestep"] for row in own]
        label = {"network": "network", "closed_form": "closed form of a Gaussian mixture"}[name]
        axes[0].plot(timesteps, [row["correlation_mean"] for row in own], marker="o", label=label, **style)
        if name == "network":
            for program in np.array([row["correlation"] for row in own]).T:
                axes[0].plot(timesteps, program, color=NETWORK, linewidth=0.4, alpha=0.5)
        if has_types:
            axes[1].plot(timesteps, [row["changed"] for row in own], marker="o", label=label, **style)
    axes[0].set(
        title="programs before and after (thin lines: each program)",
        xlabel="noise up to timestep",
        ylabel="correlation",
    )
    axes[0].legend(frameon=False)
    if has_types:
        axes[1].axhline(rows[0]["chance"], color="black", linestyle=":", label="shuffled cells")
        axes[1].set(title="cells that change their type", xlabel="noise up to timestep", ylabel="fraction")
        axes[1].legend(frameon=False)
    return figure


def _explained_variance_figure(report: dict) -> Figure:
    rows = report["explained_variance"]
    timesteps = [row["timestep"] for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(13, 3.6), layout="constrained")
    axes[0].plot(timesteps, [row["network_mean"] for row in rows], "o-", color=NETWORK, label="network")
    axes[0].plot(timesteps, [row["closed_form_mean"] for row in rows], "o--", color=CONTROL, label="closed form")
    axes[0].set(title="fraction of the programs' variance that is explained", xlabel="timestep")
    axes[1].plot(timesteps, [row["agreement"] for row in rows], "o-", color=NETWORK)
    axes[1].set(title="agreement of the network with the closed form", xlabel="timestep", ylim=(0, 1.02))
    axes[0].legend(frameon=False)
    return figure


def _program_jacobian_figure(report: dict) -> Figure:
    matrices = [np.array(report["program_jacobian"][name]) for name in ("network", "closed_form")]
    off = [matrix - np.diag(np.diag(matrix)) for matrix in matrices]
    limit = max(np.abs(matrix).max() for matrix in off)
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    for axis, matrix, title in zip(axes, off, ("network", "closed form of a Gaussian mixture")):
        image = axis.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set(title=title, xlabel="noisy program", ylabel="expected clean program")
    figure.colorbar(image, ax=axes, label="response (without the diagonal)")
    return figure


def _interventions_figure(report: dict) -> Figure:
    programs = sorted({row["program"] for row in report["interventions"]})
    figure, axes = plt.subplots(1, len(programs), figsize=(6 * len(programs), 4), layout="constrained", squeeze=False)
    for axis, program in zip(axes[0], programs):
        sources = (
            ("training cells", "black", "training cells", "x"),
            ("closed_form", CONTROL, "closed form, held", "o"),
            ("network", NETWORK, "network, held", "o"),
        )
        for name, colour, label, marker in sources:
            row = next(r for r in report["interventions"] if (r["program"], r["source"]) == (program, name))
            others = [i for i in range(len(row["responses"])) if f"program_{i}" != program]
            axis.scatter(
                np.array(row["regression"])[others],
                np.array(row["responses"])[others],
                color=colour,
                marker=marker,
                s=22,
                label=f"{label}: slope {row['slope']:.2f}",
            )
        axis.axline((0, 0), slope=1, color="black", linewidth=0.7)
        axis.axline((0, 0), slope=0, color="black", linewidth=0.7, linestyle=":")
        axis.set(title=f"{program} held", xlabel="regression in held-out cells", ylabel="response of other programs")
        axis.legend(frameon=False)
    return figure
