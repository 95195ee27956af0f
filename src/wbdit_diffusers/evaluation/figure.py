"""Figures of cells, drawn with matplotlib."""

import itertools
from collections.abc import Sequence
from functools import reduce

import anndata as ad
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from .cells import generated_cells, needs_common_genes, real_cells
from .metrics import log_fold_changes, name_markers, rank_markers


# The colours of every figure: seaborn's "colorblind", with an indigo instead of grey
PALETTE = "#0173B2 #DE8F05 #029E73 #D55E00 #CC78BC #CA9161 #FBAFE4 #332288 #ECE133 #56B4E9".split()
REAL, GENERATED, CONTROL, BACKGROUND = PALETTE[0], PALETTE[3], "#6B7280", "#D5D9DE"
MAX_DOT_PLOT_TYPES = 12
MAX_COLUMNS = 4  # panels in a row
MAX_CELLS = 2000  # of a group in the figure of a report
MIN_CELLS = 5  # of a type; fold changes of fewer cells are noise


def report_figure(
    real: ad.AnnData,
    generated: ad.AnnData | dict[str, ad.AnnData],
    label_key: str | None = None,
    values: str = "counts",
    layer: str | None = None,
) -> Figure:
    """A page of maps and gene statistics. For one generator with labels also its types and markers."""
    samples = generated if isinstance(generated, dict) else {"generated cells": generated}
    real, samples = subsample(real), {name: subsample(cells) for name, cells in samples.items()}
    genes = reduce(lambda common, names: common[common.isin(names)], [sample.var_names for sample in samples.values()])
    within_genes = any(needs_common_genes(sample, real) for sample in samples.values())
    x = real_cells(real, genes, values, layer, within_genes=within_genes).expression
    ys = [generated_cells(s[:, genes], values, within_genes=within_genes).expression for s in samples.values()]
    types = None
    if label_key is not None and len(samples) == 1:
        types = [cells.obs[label_key].astype(str).to_numpy() for cells in (real, *samples.values())]
    num_panels = len(samples) if types is None else 3
    rows_of_maps = -(-num_panels // MAX_COLUMNS)
    shown = [] if types is None else common_types(types)[:MAX_DOT_PLOT_TYPES]
    heights = [5.5 * rows_of_maps, 5, *([3 + 0.6 * len(shown)] if shown else [])]
    figure = plt.figure(figsize=(17, sum(heights)), layout="constrained")
    rows = figure.subfigures(len(heights), 1, height_ratios=heights)

    axes = rows[0].subplots(rows_of_maps, min(num_panels, MAX_COLUMNS), squeeze=False).ravel()
    points = np.split(embedding([x, *ys], "tsne"), np.cumsum([len(x), *map(len, ys)])[:-1])
    for axis, title, cells in zip(axes, samples, points[1:]):
        for group, colour, name in ((points[0], REAL, "held-out"), (cells, GENERATED, "generated")):
            label, size = f"{name} ({len(group)})", point_size(len(x) + len(cells))
            axis.scatter(*group.T, s=size, color=colour, label=label, linewidths=0, alpha=0.8)
        axis.set(title=title, xticks=[], yticks=[])
        axis.legend(markerscale=2, frameon=False)
    for axis in axes[num_panels:]:
        axis.remove()
    statistics = rows[1].subplots(1, 3 if types is None else 4)
    colours = [GENERATED] if len(ys) == 1 else list(type_colours([list(samples)], PALETTE[1:]).values())
    for name, y, colour in [("held-out", x, REAL), *zip(samples, ys, colours)]:
        statistics[2].scatter(y.mean(axis=0), y.var(axis=0), s=5, color=colour, alpha=0.5, linewidths=0, label=name)
    for y, colour in zip(ys, colours):
        _plot_against_real(statistics[0], "mean of each gene", x.mean(axis=0), y.mean(axis=0), colour)
        _plot_against_real(statistics[1], "zeros of each gene", (x == 0).mean(axis=0), (y == 0).mean(axis=0), colour)
    statistics[2].set(title="mean and variance of each gene", xlabel="mean", ylabel="variance")
    statistics[2].legend(markerscale=3, frameon=False)
    if types is not None:
        plot_types(axes[1:], points, types, [f"real cells by {label_key}", f"generated cells by {label_key}"])
        by_type = type_colours(types)
        for name in common_types(types):
            markers = rank_markers(x, types[0], name)[:50]  # chosen in the real cells
            change, ours = (log_fold_changes(matrix, of, name)[markers] for matrix, of in zip((x, ys[0]), types))
            _plot_against_real(statistics[3], "markers: log2 fold change", change, ours, by_type[name])
        if shown:
            panels = {"held-out cells": (x, types[0]), "generated cells": (ys[0], types[1])}
            plot_markers(rows[2], panels, shown, genes.to_numpy())
    return figure


def embedding(matrices: Sequence[np.ndarray], method: str = "umap") -> np.ndarray:
    """A joint `"umap"`, `"tsne"` or `"pca"` of groups of cells `(cells, genes)`: `(all cells, 2)`."""
    x = np.vstack(matrices)
    # Principal components of one group alone would pull the others inward.
    pcs = PCA(min(30, *x.shape), random_state=0).fit_transform(x)
    if method == "pca":
        return pcs[:, :2] if pcs.shape[1] > 1 else np.column_stack([pcs, np.zeros(len(pcs))])
    if method == "tsne":
        return TSNE(random_state=0, perplexity=min(30, (len(pcs) - 1) / 3)).fit_transform(pcs)
    from umap import UMAP  # slow to import

    return UMAP(n_neighbors=min(15, len(x) - 1), random_state=0, n_jobs=1).fit_transform(pcs)


def type_colours(types: Sequence[Sequence[str]], palette: Sequence[str] = PALETTE) -> dict[str, str]:
    """A colour for each type in groups of cells, in alphabetic order: one of Scanpy's if the palette has too few."""
    names = sorted(set(itertools.chain(*types)))
    if len(names) > len(palette):
        from scanpy.plotting import palettes  # slow to import

        palette = palettes.default_20 if len(names) <= 20 else palettes.default_102
    return dict(zip(names, itertools.cycle(palette)))


def plot_types(axes: Sequence[Axes], points: Sequence[np.ndarray], types: Sequence[np.ndarray], titles: Sequence[str]):
    """One panel for each group of cells `(cells, 2)`, coloured by type, over the first group in grey."""
    order = list(dict.fromkeys(name for group in types for name in pd.Series(group).value_counts().index))
    colours = type_colours(types)
    size = point_size(sum(map(len, points)))
    for i, (axis, own, own_types) in enumerate(zip(axes, points, types)):
        if i > 0:
            axis.scatter(*points[0].T, s=size, color=BACKGROUND, linewidths=0)
        for name in order:
            colour = colours[name] if name else GENERATED if i == len(points) - 1 else REAL
            axis.scatter(*own[own_types == name].T, s=size, color=colour, linewidths=0, label=name)
        axis.set(title=titles[i], xticks=[], yticks=[])
    if order != [""]:
        columns = 1 + len(order) // 25
        axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2, frameon=False, ncols=columns)


def plot_markers(figure: Figure | SubFigure, panels: dict[str, tuple], cell_types: list[str], var_names: np.ndarray):
    """Dot plots of three markers of each type, chosen in the first of the `panels`: expression and types by title."""
    colours = type_colours([types for _, types in panels.values()])
    x, labels = next(iter(panels.values()))
    markers = list(dict.fromkeys(int(gene) for name in cell_types for gene in name_markers(x, labels, name)[:3]))
    highest = max(x[labels == name][:, markers].mean(0).max() for name in cell_types)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, (matrix, names)) in zip(axes, panels.items()):
        for row, name in enumerate(cell_types):
            of_type = matrix[names == name][:, markers]
            places = np.arange(len(markers)), np.full(len(markers), row)
            sizes = 90 * (of_type > 0).mean(axis=0)
            dots = axis.scatter(*places, s=sizes, c=of_type.mean(axis=0), cmap="Reds", vmin=0, vmax=highest)
            dots.set(edgecolors="grey", linewidths=0.3)
            axis.scatter(-1, row, marker="s", color=colours[name])
        axis.set_title(f"{title}: three markers of each type")
        axis.set_xticks(np.arange(len(markers)), var_names[markers], rotation=90, fontsize=9)
        axis.set_yticks(np.arange(len(cell_types)), cell_types)
        axis.invert_yaxis()
    figure.colorbar(dots, ax=axes, label="mean log1p(CP10k); size: fraction of cells", shrink=0.8)


def plot_heatmap(axis: Axes, matrix, rows: Sequence, columns: Sequence, rotation: float = 60, **kwargs) -> AxesImage:
    """A matrix as colours, with the names of its rows and columns."""
    turned = {"rotation": rotation, "rotation_mode": "anchor", "ha": "right"} if rotation else {}
    axis.set_xticks(range(len(columns)), columns, **turned)
    axis.set_yticks(range(len(rows)), rows)
    return axis.imshow(matrix, aspect="auto", **kwargs)


def common_types(types: Sequence[np.ndarray]) -> list[str]:
    """Types with at least five cells in each group, sorted by their number in the first group."""
    names, numbers = np.unique(types[0], return_counts=True)
    order = names[np.argsort(-numbers, kind="stable")]
    return [str(name) for name in order if name and min((group == name).sum() for group in types) >= MIN_CELLS]


def subsample(cells: ad.AnnData, max_cells: int = MAX_CELLS) -> ad.AnnData:
    """A random sample of the cells, in their order."""
    return cells[np.sort(np.random.default_rng(0).permutation(cells.n_obs)[:max_cells])]


def point_size(number: int) -> float:
    """Area of a point, smaller for many cells."""
    return float(np.clip(12_000 / number, 2, 12))


def _plot_against_real(axis: Axes, title: str, x: np.ndarray, y: np.ndarray, colour):
    """A statistic of generated cells against that of real cells, with the diagonal."""
    axis.scatter(x, y, s=5, color=colour, alpha=0.5, linewidths=0)
    axis.axline((0, 0), slope=1, color="black", linewidth=0.7)
    axis.set(title=title, xlabel="held-out cells", ylabel="generated cells")
