"""Generated cells beside the real ones, as Scanpy's users put them: categories, concatenation and one scale."""

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import torch
from conftest import make_pipeline

from wbdit_diffusers.processing import log_normalize


@pytest.fixture(scope="module")
def pipe(pbmc):
    return make_pipeline(pbmc, codec="program", label_keys=["cell_type", "phase"], num_genes=200)


def generate(pipe, **call):
    return pipe(num_cells=300, generator=torch.Generator().manual_seed(0), **call).cells


def test_categories_are_those_of_the_training_cells(pipe, pbmc):
    """Also where only one of them was asked for: colours, plots and concatenated cells agree."""
    for cells in (generate(pipe), generate(pipe, cell_types="CD34+", batch_size=128)):
        for key in ("cell_type", "phase"):
            assert set(cells.obs[key].cat.categories) == set(pbmc.obs[key].cat.categories)
    assert cells.obs["cell_type"].unique().tolist() == ["CD34+"]


def test_they_concatenate(pipe, pbmc):
    cells = generate(pipe)
    both = ad.concat({"real": pbmc, "generated": cells}, label="source")
    assert both.shape == (1000, 200) and both.obs_names.is_unique
    assert both.obs["cell_type"].dtype == "category" and both.obs["source"].value_counts()["generated"] == 300
    assert (both[700:, cells.var_names].X != cells.X).nnz == 0


def test_one_call_puts_them_on_the_scale_of_the_training_cells(pipe, pbmc):
    """`sc.pp.normalize_total` divides by the genes that are there, which are all of a real cell's but not all of a
    generated one's."""
    scanpy_s = pbmc.copy()
    sc.pp.normalize_total(scanpy_s, target_sum=1e4)
    sc.pp.log1p(scanpy_s)
    modelled = pbmc[:, pipe.processor.var_names].copy()
    modelled.obs["library_size"] = np.asarray(pbmc.X.sum(axis=1)).ravel()
    ours = log_normalize(modelled.X, modelled.obs["library_size"])
    assert np.allclose(ours.toarray(), scanpy_s[:, modelled.var_names].X.toarray(), atol=1e-5)

    cells = generate(pipe)
    cells.X = log_normalize(cells.X, cells.obs["library_size"])
    per_cell = np.expm1(cells.X).sum(axis=1)
    assert per_cell.max() <= 1e4 * (1 + 1e-5) and per_cell.mean() < 9e3  # the rest is that of the other genes
