"""Generated cells compared with real cells: their figures, and a two-sample test."""

import contextlib

import anndata as ad
import numpy as np
from matplotlib.figure import Figure

from ..data.split import CellSplit
from ..evaluation import figure as plots
from ..evaluation.cells import CellArrays, combined_labels, generated_cells, needs_common_genes, real_cells
from ..evaluation.report import evaluate_cells
from ..evaluation.samples import draw_samples, split_halves
from ..evaluation.table import GENERATED, NOT_FIT, summary
from ..hub.facts import HIGH_EXCESS
from ..pipelines.pipeline_scrna_generation import ScRNAGenerationPipeline


DPI = 130
MAX_CELLS_SHOWN = 1000
MAX_CELLS_JUDGED = 300
MIN_CELLS_JUDGED = 10
MAX_PROGRAMS = 16


def make_groups(
    pipe: ScRNAGenerationPipeline, cells: ad.AnnData, real: ad.AnnData | None
) -> tuple[dict[str, CellArrays], dict[str, np.ndarray], np.ndarray]:
    """Up to 1,000 real and 1,000 generated cells, the activities of their programs, and their common genes."""
    config, type_key = pipe.processor.config, pipe.processor.label_keys[:1]
    cells, groups, activities = plots.subsample(cells, MAX_CELLS_SHOWN), {}, {}
    genes, within_genes = cells.var_names, False
    if real is not None:
        real = plots.subsample(real, MAX_CELLS_SHOWN)
        latents = pipe.encode_cells(real)
        if "X_programs" in cells.obsm:
            activities["real"] = pipe.codec.activities(latents).detach().numpy()
        genes, within_genes = genes[genes.isin(real.var_names)], needs_common_genes(cells, real)
        groups["real"] = real_cells(real, genes, config.values, config.layer, type_key, within_genes)
    groups["generated"] = generated_cells(cells[:, genes], config.values, type_key, within_genes)
    if "X_programs" in cells.obsm:
        activities["generated"] = cells.obsm["X_programs"]
    return groups, activities, genes.to_numpy()


def map_figure(groups: dict[str, CellArrays], method: str) -> Figure:
    """A joint embedding with one panel for each group. Generated cells lie over real cells in grey."""
    matrices = [group.expression for group in groups.values()]
    if sum(map(len, matrices)) < 10:  # t-SNE and UMAP would fail
        method = "pca"
    points = np.split(plots.embedding(matrices, method), [len(matrices[0])])[: len(groups)]
    figure = Figure(figsize=(3.9 * len(groups) + 1.9, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(groups), squeeze=False, sharex=True, sharey=True)[0]
    titles = [f"{len(group):,} {name} cells" for name, group in groups.items()]
    plots.plot_types(axes, points, [group.labels for group in groups.values()], titles)
    return figure


def marker_figure(groups: dict[str, CellArrays], genes: np.ndarray) -> Figure | None:
    """Dot plot of the markers of each type, which are chosen in the first group; `None` for fewer than two types."""
    types = plots.common_types([group.labels for group in groups.values()])[: plots.MAX_DOT_PLOT_TYPES]
    if len(types) < 2:
        return None
    size = (4.2 + 0.57 * len(types), 1.5 + (0.8 + 0.3 * len(types)) * len(groups))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    panels = {f"{name} cells": (group.expression, group.labels) for name, group in groups.items()}
    plots.plot_markers(figure, panels, types, genes)
    return figure


def program_figure(groups: dict[str, CellArrays], activities: dict[str, np.ndarray], names: np.ndarray) -> Figure:
    """Mean activity of the first 16 gene programs in each type."""
    names, types = names[:MAX_PROGRAMS], plots.common_types([group.labels for group in groups.values()])
    size = (4.4 + 0.34 * max(len(types), 3) * len(groups), 1.8 + 0.3 * len(names))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for axis, (name, group) in zip(axes, groups.items()):
        masks = [group.labels == one for one in types] or [slice(None)]
        means = np.stack([activities[name][mask, : len(names)].mean(axis=0) for mask in masks], axis=1)
        image = plots.plot_heatmap(axis, means, names, types or ["all cells"], cmap="RdBu_r", vmin=-3, vmax=3)
        axis.set_title(f"{name} cells")
    figure.colorbar(image, ax=axes, label="mean activity (sd of training cells)", shrink=0.7, extend="both")
    return figure


def compare_quality(
    pipe: ScRNAGenerationPipeline, real: ad.AnnData, model: str, seed: int, **call_kwargs
) -> tuple[str, str]:
    """The summary of an evaluation on up to 300 held-out cells, and a warning if it is bad."""
    config, label_keys = pipe.processor.config, pipe.processor.label_keys
    rest, test = (real[rows] for rows in split_halves(combined_labels(real, label_keys)))
    # Held out are the cells in the split.json of the model, or else a random half.
    origin = "A random half of the real cells is held out here. Training may have seen these cells."
    with contextlib.suppress(FileNotFoundError):  # such as that of a pipeline on the Hub
        split = CellSplit.load(model)
        known, held_out = (real[real.obs_names.isin(names)] for names in (split.train, split.test))
        if known.n_obs >= held_out.n_obs >= MIN_CELLS_JUDGED:
            rest, test, origin = known, held_out, "Training did not see the held-out cells."
    (drawn,), test = draw_samples(pipe, plots.subsample(test, MAX_CELLS_JUDGED), 1, seed, **call_kwargs)
    report = evaluate_cells([drawn], rest, test, label_keys, config.layer, config.values, seed=seed)
    is_bad = report["excess"][GENERATED]["mean"] > HIGH_EXCESS
    note = f"With {test.n_obs} held-out cells, small differences are overlooked. {origin}"
    return (
        f"{summary(report)}\n\n{note} `wbdit evaluate` judges three samples of up to 5,000.",
        NOT_FIT if is_bad else "",
    )
