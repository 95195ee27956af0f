import json

import anndata as ad
import numpy as np
import pytest
from conftest import make_pipeline

from wbdit_diffusers.data import split_cells
from wbdit_diffusers.evaluation import report as report_module
from wbdit_diffusers.evaluation.report import (
    TITLES,
    draw_samples,
    evaluate,
    evaluate_cells,
    log_normalise,
    to_markdown,
)


@pytest.fixture(scope="module")
def split(pbmc):
    return tuple(pbmc[cells] for cells in split_cells(pbmc, 0.2, label_key="cell_type"))


def test_floors_stand_beside_the_generated_cells(split):
    train, test = split
    pipe = make_pipeline(train, space="program", label_keys=["cell_type"], num_genes=50)
    report = evaluate(pipe, train, test, num_seeds=1, num_inference_steps=2)
    columns = report["metrics"]
    assert list(columns) == ["generated", "real: training cells", "real: halves of the held-out"]
    parity = {"paper_kl", "paper_wasserstein", "paper_mmd"}
    assert all(set(column) == set(TITLES) - parity for column in columns.values())
    assert all(np.isfinite(values).all() for column in columns.values() for values in column.values())
    # An untrained model is told from real cells; real cells are not.
    aucs = [columns[name]["rf_auc"][0] for name in columns]
    assert aucs[0] > 0.9 and 0.35 < aucs[1] < 0.65 and 0.25 < aucs[2] < 0.75
    # Its types are nothing alike; those of training cells are (copies, in a way: their nearest distance is 0).
    assert columns["generated"]["f1"][0] < 0.5 < columns["real: training cells"]["f1"][0]
    assert columns["real: training cells"]["nearest_training_cell"][0] == 0
    assert report["num_test"] == test.n_obs and report["num_genes"] == 50
    assert all(entry["num_train"] >= 30 for entry in report["per_type"].values())
    json.dumps(report)
    table = to_markdown(report)
    assert f"Against {test.n_obs} held-out cells" in table
    assert all(title in table for metric, title in TITLES.items() if metric not in parity)
    assert all(f"| {label} |" in table for label in report["per_type"])


def test_real_cells_as_samples_reach_the_floor(split):
    """Cells of any generator: here other real ones."""
    train, test = split
    genes = train.var_names[:300]
    labels = [cells.obs["cell_type"].to_numpy() for cells in split]
    sample = train[report_module.same_labels(*labels, np.random.default_rng(0))]
    report = evaluate_cells([sample[:, genes]], train, test, label_key="cell_type", floors=False, parity=True)
    assert list(report["metrics"]) == ["generated"]
    assert set(report["metrics"]["generated"]) == set(TITLES)
    assert report["metrics"]["generated"]["rf_auc"][0] < 0.65
    assert report["metrics"]["generated"]["lfc_slope"][0] == pytest.approx(1, abs=0.15)


def test_without_labels_and_with_log_values(split):
    train, test = (ad.AnnData(log_normalise(cells)[:, :30], var=cells.var.iloc[:30]) for cells in split)
    report = evaluate_cells([train[: test.n_obs]], train, test, values="log", floors=False)
    assert "purity" not in report["metrics"]["generated"] and report["per_type"] == {}
    assert report["metrics"]["generated"]["variance_ratio"][0] == pytest.approx(1, abs=0.3)


def test_samples_that_do_not_fit_are_refused(split):
    train, test = split
    with pytest.raises(ValueError, match="not as many as the"):
        evaluate_cells([train], train, test)
    renamed = test.copy()
    renamed.var_names = [f"x{name}" for name in test.var_names]
    with pytest.raises(ValueError, match="generated genes are not among"):
        evaluate_cells([renamed], train, test)


def test_unknown_types_are_left_out(split, caplog):
    train, test = split
    rare = train.obs["cell_type"].value_counts().index[-1]
    train = train[train.obs["cell_type"] != rare]
    pipe = make_pipeline(train, space="program", label_keys=["cell_type"], num_genes=50)
    samples, known = draw_samples(pipe, test, num_seeds=1, num_inference_steps=1)
    assert rare not in set(known.obs["cell_type"]) and known.n_obs < test.n_obs
    assert samples[0].obs["cell_type"].astype(str).tolist() == known.obs["cell_type"].astype(str).tolist()


def test_log_normalise_leaves_its_input_alone(pbmc):
    before = pbmc.X.copy()
    x = log_normalise(pbmc)
    assert (pbmc.X != before).nnz == 0
    np.testing.assert_allclose(np.expm1(x).sum(1), 1e4, rtol=1e-4)


def test_dense_counts_are_judged_like_sparse_ones(pbmc):
    dense = pbmc[:50].copy()
    dense.X = dense.X.toarray()
    np.testing.assert_array_equal(log_normalise(dense), log_normalise(pbmc[:50]))
