"""The parts of benchmarks/race.py that need no other package. The race itself takes hours."""

import json

import numpy as np
import pytest
import race
from conftest import ROOT
from scipy import sparse


@pytest.fixture(scope="module")
def train(pbmc):
    """700 PBMCs and the 60 genes with most counts."""
    most = np.argsort(-np.asarray(pbmc.X.sum(axis=0)).ravel())[:60]
    cells = pbmc[:, most].copy()
    cells.X = sparse.csr_matrix(cells.X, dtype=np.float32)
    cells.obs[race.LABEL] = cells.obs["cell_type"].astype(str).to_numpy(dtype=object)
    return cells


def test_the_copula_keeps_means_and_correlations_of_each_label(train):
    labels = np.repeat(["CD19+ B", "CD14+ Monocyte"], 1000)
    counts = race.copula(train, 0)[""](labels)
    assert counts.shape == (2000, 60) and (counts == np.rint(counts)).all()
    for label in np.unique(labels):
        real, drawn = train[train.obs[race.LABEL] == label].X.toarray(), counts[labels == label]
        np.testing.assert_allclose(drawn.mean(0), real.mean(0), rtol=0.2, atol=0.1)
        upper = np.triu_indices(20, k=1)
        correlations = [np.corrcoef(np.log1p(values[:, :20]).T)[upper] for values in (real, drawn)]
        assert np.corrcoef(*correlations)[0, 1] > 0.6


def test_draws_have_their_labels_and_their_depth(train):
    rng, labels = np.random.default_rng(0), np.array(["CD34+", "CD19+ B", "CD34+"])
    assert (train.obs[race.LABEL].to_numpy()[race.like(train, labels, rng)] == labels).all()
    latents = (
        np.random.default_rng(1).normal(size=(train.n_obs, 3))
        + (train.obs[race.LABEL] == "CD34+").to_numpy()[:, None] * 5
    )
    drawn = race.gaussians(latents, train.obs[race.LABEL].to_numpy(), np.repeat(labels[:2], 200), rng)
    assert abs(drawn[:200].mean() - 5) < 0.5 and abs(drawn[200:].mean()) < 0.5
    log_values = np.log1p(train.X.toarray() / np.asarray(train.X.sum(axis=1)).reshape(-1, 1) * 1e4)
    np.testing.assert_allclose(race.counts_of(log_values, np.full(train.n_obs, 500)).sum(1), 500, atol=30)


def test_the_table_has_a_row_for_each_generator():
    trainings = json.loads((ROOT / "lab" / "results" / "race_cpu.json").read_text())
    table = race.table(trainings)
    for training in trainings:
        for name in ("real reference", *training["costs"]):
            assert f"| {name} | " in table
