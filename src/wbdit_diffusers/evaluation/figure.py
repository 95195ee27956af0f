"""Figures from cells: matplotlib in, matplotlib out."""

from functools import reduce

import anndata as ad
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from .cells import generated_cells, needs_common_genes, real_cells
from .metrics import log_fold_changes, rank_markers


REAL, GENERATED = "tab:blue", "tab:orange"
MAX_DOT_PLOT_TYPES = 12
MAX_COLUMNS = 4  # of panels in a row
MIN_CELLS = 5  # of a type, for its markers to be shown


def report_figure(
    real: ad.AnnData,
    generated: ad.AnnData,
    label_key: str | None = None,
    values: str = "counts",
    layer: str | None = None,
) -> Figure:
    """
    One page: real and generated cells in a joint t-SNE, by source and by type; gene means, variances and zeros; and,
    with labels, the markers of each type and their log fold changes.

    Args:
        real (`AnnData`): Held-out cells, with all their genes: they are normalised by the total of all.
        generated (`AnnData`):
            Generated cells, normalised by `obs["library_size"]`, see [`~evaluation.evaluate_cells`]; their genes are
            those shown.
        label_key (`str`, *optional*): Column of `obs` with the cell type, in both.
        values (`str`, defaults to `"counts"`): What the matrices hold: `"counts"`, or `"log"`.
        layer (`str`, *optional*): Layer of `real` that holds its matrix; `X` by default.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        ValueError: If `real` lacks genes of `generated`.
    """
    within_genes = needs_common_genes(generated, real)
    x = real_cells(real, generated.var_names, values, layer, within_genes=within_genes).expression
    y = generated_cells(generated, values, within_genes=within_genes).expression
    has_labels = label_key is not None
    figure = plt.figure(figsize=(17, 15.5 if has_labels else 10), layout="constrained")
    rows = figure.subfigures(3 if has_labels else 2, 1, height_ratios=[1, 0.9, 1.1] if has_labels else [1, 0.9])

    _plot_tsne(rows[0].subplots(1, 3 if has_labels else 1, squeeze=False)[0], x, y, real, generated, label_key)
    axes = rows[1].subplots(1, 4 if has_labels else 3)
    for axis, title, statistic in (
        (axes[0], "mean of each gene", lambda m: m.mean(axis=0)),
        (axes[1], "share of zeros of each gene", lambda m: (m == 0).mean(axis=0)),
    ):
        axis.scatter(statistic(x), statistic(y), s=5, color=GENERATED, alpha=0.5, linewidths=0)
        axis.axline((0, 0), slope=1, color="black", linewidth=0.7)
        axis.set(title=title, xlabel="real, held out", ylabel="generated")
    for matrix, colour, name in ((x, REAL, "real, held out"), (y, GENERATED, "generated")):
        axes[2].scatter(matrix.mean(0), matrix.var(0), s=5, color=colour, alpha=0.5, linewidths=0, label=name)
    axes[2].set(title="mean and variance of each gene", xlabel="mean", ylabel="variance")
    axes[2].legend(markerscale=3, frameon=False)

    if has_labels:
        x_labels, y_labels = (c.obs[label_key].astype(str).to_numpy() for c in (real, generated))
        names, numbers = np.unique(x_labels, return_counts=True)
        order = names[np.argsort(-numbers)]
        # Of fewer cells a fold change is noise.
        common = [name for name in order if min((x_labels == name).sum(), (y_labels == name).sum()) >= MIN_CELLS]
        if common:
            _plot_fold_changes(axes[3], x, x_labels, y, y_labels, common)
            shown = common[:MAX_DOT_PLOT_TYPES]
            panels = {"real, held out": (x, x_labels), "generated": (y, y_labels)}
            plot_markers(rows[2], panels, shown, generated.var_names.to_numpy())
    return figure


def comparison_figure(
    report: dict,
    generators: dict[str, list[ad.AnnData]],
    test: ad.AnnData,
    values: str = "counts",
    layer: str | None = None,
) -> Figure:
    """
    One page: the excess of each generator, and its first sample over the held-out cells in one joint t-SNE.

    Args:
        report (`dict`): What [`~evaluation.compare_cells`] returns.
        generators (`dict[str, list[AnnData]]`): As they were compared.
        test (`AnnData`): The held-out cells.
        values (`str`, defaults to `"counts"`): What the matrices hold.
        layer (`str`, *optional*): Layer of `test` that holds its matrix; `X` by default.

    Returns:
        `matplotlib.figure.Figure`
    """
    names = sorted(report["excess"], key=lambda name: report["excess"][name]["mean"])
    first = {name: generators[name][0] for name in names}
    every = [sample.var_names for samples in generators.values() for sample in samples]
    genes, within_genes = reduce(lambda common, one: common[common.isin(one)], every), report["within_genes"]
    matrices = [real_cells(test, genes, values, layer, within_genes=within_genes).expression]
    matrices += [
        generated_cells(sample[:, genes], values, within_genes=within_genes).expression for sample in first.values()
    ]
    points = np.split(joint_tsne(matrices), np.cumsum([len(matrix) for matrix in matrices])[:-1])
    columns = min(len(names), MAX_COLUMNS)
    rows = -(-len(names) // columns)
    figure = plt.figure(figsize=(4.2 * columns, 0.45 * len(names) + 1.4 + 4 * rows), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[0.45 * len(names) + 1.4, 4 * rows])

    axis = top.subplots()
    means, sds = ([report["excess"][name][key] for name in names] for key in ("mean", "sd"))
    axis.barh(names, means, xerr=sds, color=GENERATED, ecolor="black", capsize=3, height=0.6)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.7)
    axis.set(
        xlabel="excess (0 = as good as real cells, 0.5 = told apart at once)",
        xlim=(min(0, *means) - 0.02, max(0.52, *np.add(means, sds))),
    )
    axis.spines[["top", "right"]].set_visible(False)

    axes = bottom.subplots(rows, columns, squeeze=False).ravel()
    size = np.clip(12_000 / len(points[0]) / 2, 2, 12)
    for axis, name, cells in zip(axes, names, points[1:]):
        axis.scatter(*points[0].T, s=size, color=REAL, linewidths=0, label="real, held out")
        axis.scatter(*cells.T, s=size, color=GENERATED, linewidths=0, label="generated", alpha=0.8)
        axis.set(title=name, xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
    axes[0].legend(markerscale=2, frameon=False)
    for axis in axes[len(names) :]:
        axis.remove()
    return figure


def joint_tsne(matrices: list[np.ndarray]) -> np.ndarray:
    """
    One t-SNE of several groups of cells, of their joint principal components: components of one group alone would
    spread that one, and draw the others inward.

    Args:
        matrices (`list[np.ndarray]`): Expression of each group, (cells, genes).

    Returns:
        `np.ndarray` of shape `(all cells, 2)`, in the order of the groups.
    """
    x = np.vstack(matrices)
    pcs = PCA(min(30, *x.shape), random_state=0).fit_transform(x)
    return TSNE(random_state=0, perplexity=min(30, (len(pcs) - 1) / 3)).fit_transform(pcs)


def _plot_tsne(
    axes: list[Axes], x: np.ndarray, y: np.ndarray, real: ad.AnnData, generated: ad.AnnData, label_key: str | None
):
    points = joint_tsne([x, y])
    is_real = np.arange(len(points)) < len(x)
    size = np.clip(12_000 / len(points), 2, 12)
    for name, cells, colour in (("generated", ~is_real, GENERATED), ("real, held out", is_real, REAL)):
        axes[0].scatter(*points[cells].T, s=size, color=colour, label=f"{name} ({cells.sum()})", linewidths=0)
    axes[0].set_title("joint t-SNE")
    axes[0].legend(markerscale=2, frameon=False)
    if label_key is not None:
        cell_types = real.obs[label_key].astype(str).value_counts().index
        colours = plt.get_cmap("tab20" if len(cell_types) > 10 else "tab10")
        for axis, cells, adata, name in zip(axes[1:], (is_real, ~is_real), (real, generated), ("real", "generated")):
            for i, cell_type in enumerate(cell_types):
                of_type = (adata.obs[label_key].astype(str) == cell_type).to_numpy()
                colour = colours(i % colours.N)
                axis.scatter(*points[cells][of_type].T, s=size, color=colour, label=cell_type, linewidths=0)
            axis.set_title(f"{name} cells by {label_key}")
        axes[-1].legend(
            loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2, frameon=False, ncols=1 + len(cell_types) // 25
        )
    for axis in axes:
        axis.set(xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")


def _plot_fold_changes(axis: Axes, x, x_labels: np.ndarray, y, y_labels: np.ndarray, labels: list[str]):
    """The 50 markers of each type, chosen in the real cells."""
    for i, label in enumerate(labels):
        markers = rank_markers(x, x_labels, label)[:50]
        changes = [log_fold_changes(m, names, label)[markers] for m, names in ((x, x_labels), (y, y_labels))]
        axis.scatter(*changes, s=6, alpha=0.6, linewidths=0, color=plt.get_cmap("tab20")(i % 20))
    axis.axline((0, 0), slope=1, color="black", linewidth=0.7)
    axis.set(title="markers: log2 fold change", xlabel="real, held out", ylabel="generated")


def plot_markers(
    figure: Figure | SubFigure,
    panels: dict[str, tuple[np.ndarray, np.ndarray]],
    cell_types: list[str],
    var_names: np.ndarray,
):
    """
    Dot plots of the three first markers of each type: colour is the mean, size the share of expressing cells.

    Args:
        figure (`Figure` or `SubFigure`): Where to draw.
        panels (`dict`): Expression `(cells, genes)` and cell types `(cells,)` by title; the first has the markers.
        cell_types (`list[str]`): The types to show.
        var_names (`np.ndarray` of shape `(genes,)`): Names of the genes.
    """
    x, labels = next(iter(panels.values()))
    markers = list(dict.fromkeys(int(gene) for name in cell_types for gene in rank_markers(x, labels, name)[:3]))
    highest = max(x[labels == name][:, markers].mean(0).max() for name in cell_types)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, (matrix, names)) in zip(axes, panels.items()):
        for row, name in enumerate(cell_types):
            of_type = matrix[names == name][:, markers]
            dots = axis.scatter(
                np.arange(len(markers)),
                np.full(len(markers), row),
                s=90 * (of_type > 0).mean(axis=0),
                c=of_type.mean(axis=0),
                cmap="Reds",
                vmin=0,
                vmax=highest,
                edgecolors="grey",
                linewidths=0.3,
            )
        axis.set_title(f"{title}: three markers of each type")
        axis.set_xticks(np.arange(len(markers)), var_names[markers], rotation=90, fontsize=7)
    axes[0].set_yticks(np.arange(len(cell_types)), cell_types)
    axes[0].invert_yaxis()
    figure.colorbar(dots, ax=axes, label="mean log1p(CP10k); size: share of cells", shrink=0.8)
