"""The page's figures: real cells left or above, generated ones beside them, on one scale."""

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from ..evaluation.figure import MAX_DOT_PLOT_TYPES, joint_tsne, plot_markers
from .compare import Group, QuickJudgement


DPI = 130
MAX_PROGRAMS = 16
MIN_CELLS = 5  # of a type, for its mean to be shown
BACKGROUND, REAL, GENERATED = "#d5d9de", "#2563a8", "#e07b26"


def joint_map(groups: list[Group], method: str) -> np.ndarray:
    """
    Where cells lie in two dimensions, all groups together: `(cells, 2)`.

    Args:
        groups (`list[Group]`): The cells.
        method (`str`): `"t-SNE"`, `"UMAP"` or `"PCA"`.
    """
    matrices = [group.expression for group in groups]
    if method == "t-SNE":
        return joint_tsne(matrices)
    x = np.vstack(matrices)
    pcs = PCA(min(30, *x.shape), random_state=0).fit_transform(x)
    if method == "PCA":
        return pcs[:, :2] if pcs.shape[1] > 1 else np.column_stack([pcs, np.zeros(len(pcs))])
    from umap import UMAP

    return UMAP(n_neighbors=min(15, len(x) - 1), random_state=0, n_jobs=1).fit_transform(pcs)


def map_figure(groups: list[Group], points: np.ndarray, method: str) -> Figure:
    """Each group by type; the generated cells over the real ones in grey."""
    names = sorted({name for group in groups for name in group.types})
    colours = colormaps["tab20" if len(names) > 10 else "tab10"]
    figure = Figure(figsize=(4.3 * len(groups) + 1.9, 4.5), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(groups), squeeze=False, sharex=True, sharey=True)[0]
    size, start = float(np.clip(12_000 / len(points), 4, 24)), 0
    for i, (axis, group) in enumerate(zip(axes, groups)):
        own = points[start : start + len(group.types)]
        if i > 0:
            axis.scatter(*points[:start].T, s=size, color=BACKGROUND, linewidths=0, rasterized=True)
        for name in names:
            of_type = group.types == name
            colour = colours(names.index(name) % colours.N) if name else GENERATED if i == len(groups) - 1 else REAL
            axis.scatter(*own[of_type].T, s=size, color=colour, linewidths=0, label=name, rasterized=True)
        over = " over real ones (grey)" if i > 0 else ""
        axis.set_title(f"{len(own):,} {group.name} cells{over}", fontsize=11)
        axis.set(xticks=[], yticks=[], xlabel=f"{method} 1", ylabel=f"{method} 2" if i == 0 else "")
        _no_frame(axis)
        start += len(own)
    if names != [""]:
        handles, labels = axes[-1].get_legend_handles_labels()
        figure.legend(
            *(handles, labels),
            **{"loc": "outside right center", "frameon": False, "fontsize": 9, "ncols": 1 + len(names) // 24},
            markerscale=float(np.sqrt(40 / size)),
        )
    return figure


def marker_figure(groups: list[Group], genes: pd.Index) -> Figure | None:
    """Dot plot of each type's markers, chosen in the real cells where there are some; `None` without two types."""
    types = _common_types(groups)[:MAX_DOT_PLOT_TYPES]
    if len(types) < 2:
        return None
    figure = Figure(figsize=(1.5 + 0.19 * 3 * len(types) * len(groups) + 2, 1.9 + 0.36 * len(types)), dpi=DPI)
    figure.set_layout_engine("constrained")
    plot_markers(figure, {g.name: (g.expression, g.types) for g in groups}, types, genes.to_numpy())
    return figure


def program_figure(groups: list[Group], names: np.ndarray) -> Figure | None:
    """
    Mean activity of each gene program in each type, the first 16 programs; `None` where the codec has no programs.

    Args:
        groups (`list[Group]`): The cells.
        names (`np.ndarray`): Names of the programs by their top genes.
    """
    if any(group.activities is None for group in groups):
        return None
    types = _common_types(groups)
    shown = min(MAX_PROGRAMS, len(names))
    rows = types or ["all cells"]
    width = 3.2 + 0.34 * max(len(rows), 3) * len(groups)
    figure = Figure(figsize=(width + 1.2, 1.8 + 0.3 * shown), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    means = []
    for group in groups:
        cells_of = [group.types == name if types else np.ones(len(group.types), dtype=bool) for name in rows]
        means.append(
            np.stack([np.asarray(group.activities)[cells, :shown].mean(axis=0) for cells in cells_of], axis=1)
        )
    limit = max(1.0, float(np.abs(means).max()))
    for axis, group, mean in zip(axes, groups, means):
        image = axis.imshow(mean, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axis.set_title(f"{group.name} cells", fontsize=11)
        axis.set_xticks(np.arange(len(rows)), rows, rotation=60, ha="right", rotation_mode="anchor", fontsize=9)
        axis.set_yticks(np.arange(shown), [str(name) for name in names[:shown]], fontsize=9)
        axis.tick_params(length=0)
        _no_frame(axis)
    figure.colorbar(image, ax=axes, label="mean activity (sd of training cells)", shrink=0.7)
    return figure


def judgement_figure(judgement: QuickJudgement) -> Figure:
    """The AUC of generated cells and that of real ones on one scale."""
    figure = Figure(figsize=(7.6, 1.7), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    axis.axhline(0, color=BACKGROUND, linewidth=3, zorder=0)
    sides = [
        ("other real cells", judgement.reference, REAL, 1),
        ("generated cells", judgement.generated, GENERATED, -1),
    ]
    for name, value, colour, side in sides:
        axis.scatter(value, 0, s=130, color=colour, edgecolors="white", zorder=2)
        align = "left" if value < 0.55 else "right" if value > 0.95 else "center"
        axis.annotate(
            f"{name} {value:.2f}", (value, 0), (0, 13 * side), textcoords="offset points", color=colour, ha=align,
            va="bottom" if side > 0 else "top", fontsize=10, weight="bold",
        )  # fmt: skip
    low = min(0.48, judgement.generated - 0.02, judgement.reference - 0.02)
    axis.set(xlim=(low, 1.02), ylim=(-1, 1), yticks=[])
    ticks = np.arange(0.5, 1.01, 0.1)
    axis.set_xticks(ticks, ["0.5\nnot told apart", *(f"{tick:.1f}" for tick in ticks[1:-1]), "1.0\nat once"])
    axis.tick_params(length=0)
    _no_frame(axis)
    return figure


def loss_figure(losses: pd.DataFrame) -> Figure:
    """The curves of [`TrainingRun.losses`], by step."""
    figure = Figure(figsize=(8.2, 3.6), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    for name, colour in (("training", "#94a3b8"), ("held out", GENERATED)):
        curve = losses[losses["cells"] == name]
        axis.plot(curve["step"], curve["loss"], color=colour, marker="o", markersize=3, label=f"{name} cells")
    axis.set(xlabel="step", ylabel="loss of the denoiser")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color=BACKGROUND, linewidth=0.6)
    axis.legend(frameon=False)
    return figure


def _common_types(groups: list[Group]) -> list[str]:
    """Types of which every group has enough cells, the most frequent first."""
    names, numbers = np.unique(groups[0].types, return_counts=True)
    order = names[np.argsort(-numbers, kind="stable")]
    return [str(name) for name in order if name and min((g.types == name).sum() for g in groups) >= MIN_CELLS]


def _no_frame(axis: Axes):
    for spine in axis.spines.values():
        spine.set_visible(False)
