"""Generated cells beside real ones: what the figures are drawn from, and a quick judgement."""

from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from sklearn.ensemble import RandomForestClassifier

from ..data.split import CellSplit
from ..evaluation.cells import CellArrays, generated_cells, needs_common_genes, real_cells
from ..evaluation.classifiers import expression_view, two_sample_auc
from ..evaluation.references import draw_matching
from ..evaluation.samples import draw_samples
from ..models.codec_programs import ProgramCodec
from ..pipelines.pipeline_scrna_generation import ScRNAGenerationPipeline


MAX_CELLS_SHOWN = 1000
MAX_CELLS_JUDGED = 300
MIN_GENES = 10
NUM_TREES = 100


@dataclass
class Group:
    """
    Cells of one side in figures.

    Args:
        name (`str`): What the figure calls them.
        expression (`np.ndarray` of shape `(cells, genes)`): On the log scale.
        types (`np.ndarray` of shape `(cells,)`): Cell types; all `""` where there are none.
        activities (`np.ndarray` of shape `(cells, programs)`, *optional*): Of gene programs, if the codec has them.
    """

    name: str
    expression: np.ndarray
    types: np.ndarray
    activities: np.ndarray | None


@dataclass
class QuickJudgement:
    """
    How well a random forest tells cells from held-out ones; 0.5 is not at all.

    Args:
        generated (`float`): AUC of generated cells.
        reference (`float`): AUC of other real cells, as many, with the same types.
        num_cells (`int`): On each side.
        is_held_out (`bool`): Whether training did not see the cells that were compared with.
    """

    generated: float
    reference: float
    num_cells: int
    is_held_out: bool


def type_key(pipe: ScRNAGenerationPipeline, real: ad.AnnData | None = None) -> str | None:
    """The column of cell types: the pipeline's first label key, unless real cells are given and lack it."""
    if not pipe.processor.label_keys:
        return None
    key = pipe.processor.label_keys[0]
    return None if real is not None and (key not in real.obs or real.obs[key].isna().any()) else key


def shown_groups(
    pipe: ScRNAGenerationPipeline, cells: ad.AnnData, real: ad.AnnData | None
) -> tuple[list[Group], pd.Index]:
    """
    Real cells, if there are some, and generated ones, over their common genes: a random 1,000 of each.

    Returns:
        `tuple[list[Group], pd.Index]`: the groups, the generated one last, and the genes.

    Raises:
        ValueError: If the real cells are not of the kind that the pipeline was trained on.
    """
    genes = cells.var_names if real is None else common_genes(cells, real)
    values, layer = pipe.processor.config.values, pipe.processor.config.layer
    cells, groups, within_genes = _some(cells, MAX_CELLS_SHOWN), [], False
    if real is not None:
        real, within_genes = _some(real, MAX_CELLS_SHOWN), needs_common_genes(cells, real)
        pipe.processor.select(real)  # raises where counts are expected and there are none
        expression = real_cells(real, genes, values, layer, within_genes=within_genes).expression
        activities = None
        if isinstance(pipe.codec, ProgramCodec):
            with torch.no_grad():
                activities = pipe.codec.activities(pipe.encode_cells(real)).numpy()
        groups.append(Group("real", expression, _types(real, type_key(pipe, real)), activities))
    expression = generated_cells(cells[:, genes], values, within_genes=within_genes).expression
    activities = cells.obsm.get("X_programs")
    return [*groups, Group("generated", expression, _types(cells, type_key(pipe)), activities)], genes


def common_genes(cells: ad.AnnData, real: ad.AnnData) -> pd.Index:
    """Raises a `ValueError` if there are hardly any."""
    if not real.var_names.is_unique:
        raise ValueError("Gene names of the real cells occur more than once: call `adata.var_names_make_unique()`.")
    genes = cells.var_names[cells.var_names.isin(real.var_names)]
    if len(genes) < min(MIN_GENES, cells.n_vars):
        raise ValueError(
            f"{len(genes)} of the pipeline's {cells.n_vars} genes ({', '.join(cells.var_names[:3])}, …) are among"
            f" those of the real cells ({', '.join(real.var_names[:3])}, …): compare with cells of the same kind."
        )
    return genes


def judge_quickly(
    pipe: ScRNAGenerationPipeline, real: ad.AnnData, folder: str | Path, seed: int = 0, **call_kwargs
) -> QuickJudgement:
    """
    A random forest tells generated cells from real ones, and real cells from real ones.

    Compared are the cells that the pipeline's split.json holds out, where the folder has one that names these cells;
    if not, a random half of the cells, which training may have seen.

    Args:
        pipe ([`ScRNAGenerationPipeline`]): What is judged: it draws cells with the types of the real ones.
        real (`AnnData`): Real cells.
        folder (`str` or `Path`): Where the pipeline was loaded from.
        seed (`int`, defaults to 0): Seed of the cells and the forest.
        call_kwargs: Further arguments of the pipeline's call.

    Raises:
        ValueError: If the cells are too few, or lack the pipeline's labels.
    """
    label_keys = pipe.processor.label_keys
    missing = [key for key in label_keys if key not in real.obs]
    if missing:
        raise ValueError(f"The real cells have no column {missing[0]!r} in obs: cells are compared by it.")
    real = real[pipe.processor.knows_labels(real)]
    split, is_held_out = _split(real, folder, label_keys)
    rest, test = split.apply(real)
    test = _some(test, MAX_CELLS_JUDGED)
    pipe.set_progress_bar_config(disable=True)
    (drawn,), test = draw_samples(pipe, test, num_samples=1, seed=seed, **call_kwargs)
    genes = common_genes(drawn, real)
    values, layer = pipe.processor.config.values, pipe.processor.config.layer
    within_genes = needs_common_genes(drawn, real)
    rest_cells, test_cells = (real_cells(c, genes, values, layer, label_keys, within_genes) for c in (rest, test))
    sides = {
        "generated": generated_cells(drawn[:, genes], values, label_keys, within_genes),
        "reference": rest_cells[_matching(rest_cells, test_cells, seed)],
    }
    aucs = {
        name: two_sample_auc(test_cells, side, expression_view, _small_forest, seed=seed)
        for name, side in sides.items()
    }
    return QuickJudgement(**aucs, num_cells=test.n_obs, is_held_out=is_held_out)


def _small_forest(shape: tuple[int, int], seed: int = 0, n_jobs: int | None = None) -> RandomForestClassifier:
    """The evaluation's forest with a fifth of its trees."""
    return RandomForestClassifier(NUM_TREES, min_samples_leaf=2, n_jobs=n_jobs, random_state=seed)


def _split(real: ad.AnnData, folder: str | Path, label_keys: list[str]) -> tuple[CellSplit, bool]:
    if (Path(folder) / CellSplit.FILE_NAME).is_file():
        split = CellSplit.load(folder)
        known = set(real.obs_names)
        train, test = ([name for name in names if name in known] for names in (split.train, split.test))
        if len(train) >= len(test) >= MIN_GENES:
            return CellSplit(train, test), True
    return CellSplit.draw(real, 0.5, label_key=label_keys[0] if label_keys else None), False


def _matching(rest: CellArrays, test: CellArrays, seed: int) -> np.ndarray:
    known, wanted = (np.full(len(cells), "") if cells.labels is None else cells.labels for cells in (rest, test))
    return draw_matching(known, wanted, np.random.default_rng(seed))


def _types(cells: ad.AnnData, key: str | None) -> np.ndarray:
    return np.full(cells.n_obs, "") if key is None else cells.obs[key].astype(str).to_numpy(dtype=str)


def _some(cells: ad.AnnData, number: int) -> ad.AnnData:
    """A random part, in the cells' order."""
    if cells.n_obs <= number:
        return cells
    return cells[np.sort(np.random.default_rng(0).choice(cells.n_obs, number, replace=False))]
