"""A pipeline judged on held-out cells, beside its floors."""

import anndata as ad
import numpy as np
import torch

from ..pipelines.pipeline_scrna_generation import ScRNAGenerationPipeline
from .metrics import compare


TITLES = {
    "rf_auc": "random forest AUC, genes (0.5 = can't tell)",
    "rf_auc_pca": "random forest AUC, 50 PCs",
    "w2": "2-Wasserstein distance, 30 PCs",
    "mmd2": "MMD², 30 PCs",
    "mean_pearson": "gene means, Pearson",
    "mean_spearman": "gene means, Spearman",
    "variance_pearson": "gene variances, Pearson",
    "variance_ratio": "total variance ratio",
    "zero_fraction_error": "zero fractions, mean absolute error",
    "gene_correlation": "gene-gene correlations, Pearson",
}


def log_normalise(cells: ad.AnnData) -> np.ndarray:
    """log1p(CP10k) of counts, cells × genes."""
    import scanpy as sc

    cells = cells.copy()
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    return cells.X.toarray()


def evaluate(
    pipe: ScRNAGenerationPipeline, train: ad.AnnData, test: ad.AnnData, num_seeds: int = 3, **call_kwargs
) -> dict[str, dict[str, list[float]]]:
    """
    Judges a pipeline trained on counts, over the genes that it models.

    Generated are as many cells as test cells, with their labels. The floors are as many training cells, and one half
    of the test cells against the other. (The principal components are fitted on the training cells, which spreads
    those a little more than cells they have not seen.)

    Args:
        pipe ([`ScRNAGenerationPipeline`]): What is judged.
        train (`AnnData`): Counts of the cells that it was trained on.
        test (`AnnData`): Counts of the held-out cells.
        num_seeds (`int`, defaults to 3): Samples to draw.
        call_kwargs: Further arguments of the pipeline's call, e.g. `num_inference_steps`.

    Returns:
        `dict`: for `"generated"` and both floors, each metric of [`~evaluation.metrics.compare`] as a list over seeds.
    """
    var_names = pipe.processor.var_names
    train_x, test_x = log_normalise(train[:, var_names]), log_normalise(test[:, var_names])
    labels = {key: test.obs[key].astype(str).tolist() for key in pipe.processor.config.label_keys}
    results = {"generated": {}, "real: training cells": {}, "real: halves of the held-out": {}}
    for seed in range(num_seeds):
        generator = torch.Generator().manual_seed(seed)
        cells = pipe(num_cells=test.n_obs, conditions=labels, generator=generator, **call_kwargs).cells
        rng = np.random.default_rng(seed)
        some_train = rng.choice(len(train_x), len(test_x), replace=False)
        half, other_half = rng.permutation(len(test_x) // 2 * 2).reshape(2, -1)
        for name, real, x in (
            ("generated", test_x, log_normalise(cells)),
            ("real: training cells", test_x, train_x[some_train]),
            ("real: halves of the held-out", test_x[half], test_x[other_half]),
        ):
            for metric, value in compare(train_x, real, x, seed=seed).items():
                results[name].setdefault(metric, []).append(value)
    return results


def to_markdown(results: dict[str, dict[str, list[float]]], num_test: int) -> str:
    """The results of [`evaluate`] on `num_test` cells as a table, mean ± standard deviation over seeds."""
    num_seeds = len(next(iter(results["generated"].values())))
    lines = [
        f"Against {num_test} held-out cells; mean ± standard deviation of {num_seeds} samples of as many cells.",
        "",
        "| metric | " + " | ".join(results) + " |",
        "|---|" + "---|" * len(results),
    ]
    for metric, title in TITLES.items():
        cells = [f"{np.mean(column[metric]):.3f} ± {np.std(column[metric]):.3f}" for column in results.values()]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
