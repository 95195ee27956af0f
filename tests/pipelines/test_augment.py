"""Real cells with generated ones of rare types: what is added, and what stays."""

import anndata as ad
import numpy as np
import pytest
import torch

from wbdit_diffusers import ScRNAGenerationPipeline, cli
from wbdit_diffusers.pipelines import augment
from wbdit_diffusers.pretrained import PBMC


@pytest.fixture(scope="module")
def pipe() -> ScRNAGenerationPipeline:
    pipe = ScRNAGenerationPipeline.from_pretrained(PBMC)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_rare_types_get_cells_until_they_have_the_number(pipe, pbmc):
    before = pbmc.copy()
    cells = augment(pipe, pbmc, ["CD34+", "CD4+/CD45RO+ Memory"], 40, torch.Generator().manual_seed(0))
    own = cells.obs["cell_type"].value_counts()
    assert own["CD34+"] == own["CD4+/CD45RO+ Memory"] == 40
    others = [name for name in own.index if name not in ("CD34+", "CD4+/CD45RO+ Memory")]
    assert len(others) == 8 and (own[others] == pbmc.obs["cell_type"].value_counts()[others]).all()
    is_real = ~cells.obs["generated"].to_numpy()
    assert list(cells.obs_names[is_real]) == list(pbmc.obs_names) and cells.obs_names.is_unique
    np.testing.assert_array_equal(cells[is_real].X.toarray(), pbmc[:, cells.var_names].X.toarray())
    assert list(cells[is_real].obs["phase"]) == list(pbmc.obs["phase"])
    assert list(cells[is_real].obs["library_size"]) == list(np.asarray(pbmc.X.sum(axis=1)).ravel())
    assert np.isfinite(cells.obsm["X_programs"]).all() and np.isfinite(cells.X.data).all()
    assert (pbmc.X != before.X).nnz == 0 and list(pbmc.obs) == list(before.obs)


def test_the_median_type_sets_the_number(pipe, pbmc):
    cells = augment(pipe, pbmc, "CD34+")
    median = int(pbmc.obs["cell_type"].value_counts().median())
    assert (cells.obs["cell_type"] == "CD34+").sum() == median


def test_generated_cells_teach_a_type_that_was_cut(pipe, pbmc):
    """The pipeline has seen all cells: its cells carry the type. How well a rare one is learned is in benchmarks/."""
    from sklearn.linear_model import LogisticRegression

    types = pbmc.obs["cell_type"].astype(str).to_numpy()
    rows = np.flatnonzero(types == "CD19+ B")
    train = np.setdiff1d(np.arange(700)[::2], rows[3:])
    cut = pbmc[np.union1d(train, rows[:3])].copy()
    cells = augment(pipe, cut, "CD19+ B", 60, torch.Generator().manual_seed(0))
    test = pbmc[np.setdiff1d(np.arange(700), np.union1d(train, rows[:3]))]

    def recall(train: ad.AnnData) -> float:
        expression = [
            np.log1p(one.X.toarray() / one.X.sum(1).A1[:, None] * 1e3) for one in (train, test[:, train.var_names])
        ]
        model = LogisticRegression(max_iter=300).fit(expression[0], train.obs["cell_type"].astype(str))
        is_b = (test.obs["cell_type"] == "CD19+ B").to_numpy()
        return (model.predict(expression[1])[is_b] == "CD19+ B").mean()

    assert recall(cells) > recall(cut[:, cells.var_names]) + 0.1


def test_mistakes_are_named(pipe, pbmc):
    with pytest.raises(ValueError, match="have 5 cells or more: give a larger `num_cells`"):
        augment(pipe, pbmc, "CD34+", 5)
    with pytest.raises(ValueError, match="'CD35' is not a cell_type of this model"):
        augment(pipe, pbmc, "CD35", 40)
    other = pbmc.copy()
    del other.obs["cell_type"]
    with pytest.raises(ValueError, match="cell_type"):
        augment(pipe, other, "CD34+")


def test_the_command_writes_a_file(pbmc_path, tmp_path, capsys):
    output = tmp_path / "more.h5ad"
    words = ["--dataset", str(pbmc_path), "--cell_types", "CD34+", "--num_cells", "20", "--output", str(output)]
    cli.main(["augment", PBMC, *words])
    assert "700 real and 7 generated cells" in capsys.readouterr().out
    assert ad.read_h5ad(output).obs["generated"].sum() == 7
    with pytest.raises(SystemExit):
        cli.main(["augment", PBMC, *words])  # nothing is overwritten
