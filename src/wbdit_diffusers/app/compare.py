"""Generated cells compared with real cells: their figures, and a quick two-sample test."""

from dataclasses import dataclass

import anndata as ad
import numpy as np
from matplotlib.figure import Figure

from ..data.split import CellSplit
from ..evaluation.cells import combined_labels, generated_cells, needs_common_genes, real_cells
from ..evaluation.classifiers import JUDGES, two_sample_auc
from ..evaluation.figure import MAX_DOT_PLOT_TYPES, common_types, embedding, plot_markers, plot_types
from ..evaluation.references import draw_matching, split_halves
from ..evaluation.samples import draw_samples
from ..pipelines.pipeline_scrna_generation import ScRNAGenerationPipeline


DPI = 130
MAX_CELLS_SHOWN = 1000
MAX_CELLS_JUDGED = 300
MIN_CELLS_JUDGED = 10
MIN_CELLS_EMBEDDED = 10  # with fewer, t-SNE and UMAP fail
MAX_PROGRAMS = 16


@dataclass
class Group:
    """
    Real or generated cells in the figures.

    Args:
        name (`str`): `"real"` or `"generated"`.
        expression (`np.ndarray` of shape `(cells, genes)`): Expression on the log scale.
        types (`np.ndarray` of shape `(cells,)`): Cell types; `""` without types.
        activities (`np.ndarray` of shape `(cells, programs)`, *optional*): Activities of the gene programs.
    """

    name: str
    expression: np.ndarray
    types: np.ndarray
    activities: np.ndarray | None


def make_groups(
    pipe: ScRNAGenerationPipeline, cells: ad.AnnData, real: ad.AnnData | None
) -> tuple[list[Group], np.ndarray]:
    """
    A random 1,000 of the real cells, if there are any, and of the generated cells, over their common genes.

    Returns:
        `tuple[list[Group], np.ndarray]`: the groups, generated cells last, and the names of the genes.

    Raises:
        ValueError: If the real cells are not of the kind that the pipeline was trained on.
    """
    values, layer = pipe.processor.config.values, pipe.processor.config.layer
    genes, within_genes, groups, cells = cells.var_names, False, [], _sample(cells)
    if real is not None:
        real = _sample(real)
        latents = pipe.encode_cells(real)
        activities = pipe.codec.activities(latents).detach().numpy() if "X_programs" in cells.obsm else None
        genes, within_genes = genes[genes.isin(real.var_names)], needs_common_genes(cells, real)
        expression = real_cells(real, genes, values, layer, within_genes=within_genes).expression
        groups.append(Group("real", expression, _types(pipe, real), activities))
    expression = generated_cells(cells[:, genes], values, within_genes=within_genes).expression
    groups.append(Group("generated", expression, _types(pipe, cells), cells.obsm.get("X_programs")))
    return groups, genes.to_numpy()


def map_figure(groups: list[Group], method: str) -> Figure:
    """A joint embedding with one panel for each group. Generated cells lie over real cells in grey."""
    matrices = [group.expression for group in groups]
    if sum(map(len, matrices)) < MIN_CELLS_EMBEDDED:
        method = "pca"
    points = np.split(embedding(matrices, method), [len(matrices[0])])[: len(groups)]
    figure = Figure(figsize=(4.3 * len(groups) + 1.9, 4.5), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(groups), squeeze=False, sharex=True, sharey=True)[0]
    titles = [f"{len(own):,} {group.name} cells" for own, group in zip(points, groups)]
    plot_types(axes, points, [group.types for group in groups], titles)
    return figure


def marker_figure(groups: list[Group], genes: np.ndarray) -> Figure | None:
    """Dot plot of the markers of each type, which are chosen in the first group; `None` for fewer than two types."""
    types = common_types([group.types for group in groups])[:MAX_DOT_PLOT_TYPES]
    if len(types) < 2:
        return None
    size = (3.5 + 0.57 * len(types) * len(groups), 1.9 + 0.36 * len(types))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    plot_markers(figure, {f"{group.name} cells": (group.expression, group.types) for group in groups}, types, genes)
    return figure


def program_figure(groups: list[Group], names: np.ndarray) -> Figure | None:
    """Mean activity of the first 16 gene programs in each type; `None` if the pipeline has no programs."""
    if any(group.activities is None for group in groups):
        return None
    names, types = names[:MAX_PROGRAMS], common_types([group.types for group in groups])
    figure = Figure(figsize=(4.4 + 0.34 * max(len(types), 3) * len(groups), 1.8 + 0.3 * len(names)), dpi=DPI)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for axis, group in zip(axes, groups):
        masks = [group.types == name for name in types] or [slice(None)]
        means = np.stack([group.activities[mask, : len(names)].mean(axis=0) for mask in masks], axis=1)
        image = axis.imshow(means, cmap="RdBu_r", vmin=-3, vmax=3, aspect="auto")
        axis.set_title(f"{group.name} cells")
        axis.set_xticks(np.arange(len(masks)), types or ["all cells"], rotation=60, ha="right")
        axis.set_yticks(np.arange(len(names)), names)
    figure.colorbar(image, ax=axes, label="mean activity (sd of training cells)", shrink=0.7)
    return figure


def quick_test(
    pipe: ScRNAGenerationPipeline, real: ad.AnnData, model: str, seed: int = 0, **call_kwargs
) -> tuple[float, float, int, bool]:
    """
    Compares generated cells with held-out cells by one classifier, and other real cells in the same way.

    Args:
        pipe ([`ScRNAGenerationPipeline`]): Generates cells with the labels of the held-out cells.
        real (`AnnData`): Real cells. Their held-out cells are those of the pipeline's split.json, if it has one that
            names these cells, or else a random half.
        model (`str`): Folder or name from which the pipeline was loaded.
        seed (`int`, defaults to 0): Seed of the cells and of the classifier.
        call_kwargs: Further arguments of the pipeline's call.

    Returns:
        `tuple`: AUC of generated cells and of real cells, the number of cells a side, and whether training did not see
        the held-out cells.

    Raises:
        ValueError: If there are too few cells, or a column of labels is missing.
    """
    config, label_keys = pipe.processor.config, pipe.processor.label_keys
    rest, test = (real[rows] for rows in split_halves(combined_labels(real, label_keys, "The file")))
    is_held_out = False
    try:
        split = CellSplit.load(model)
        known, held_out = (real[real.obs_names.isin(names)] for names in (split.train, split.test))
        if is_held_out := known.n_obs >= held_out.n_obs >= MIN_CELLS_JUDGED:
            rest, test = known, held_out
    except FileNotFoundError:  # such as that of a pipeline on the Hub
        pass
    (drawn,), test = draw_samples(pipe, test, 1, seed, MAX_CELLS_JUDGED, **call_kwargs)
    wanted = combined_labels(test, label_keys)
    reference = rest[draw_matching(combined_labels(rest, label_keys), wanted, np.random.default_rng(seed))]
    genes, within_genes = drawn.var_names[drawn.var_names.isin(real.var_names)], needs_common_genes(drawn, real)
    test_cells, reference_cells = (
        real_cells(side, genes, config.values, config.layer, label_keys, within_genes) for side in (test, reference)
    )
    sides = generated_cells(drawn[:, genes], config.values, label_keys, within_genes), reference_cells
    generated_auc, reference_auc = (two_sample_auc(test_cells, side, *JUDGES["boosting"], seed=seed) for side in sides)
    return generated_auc, reference_auc, test.n_obs, is_held_out


def _types(pipe: ScRNAGenerationPipeline, cells: ad.AnnData) -> np.ndarray:
    """The cell type of each cell, `""` without a complete column of types."""
    key = next(iter(pipe.processor.label_keys), None)
    if key not in cells.obs or cells.obs[key].isna().any():
        return np.full(cells.n_obs, "")
    return cells.obs[key].astype(str).to_numpy(dtype=str)


def _sample(cells: ad.AnnData) -> ad.AnnData:
    """A random sample of the cells, in their order."""
    return cells[np.sort(np.random.default_rng(0).permutation(cells.n_obs)[:MAX_CELLS_SHOWN])]
