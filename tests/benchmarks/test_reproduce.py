"""The tables of benchmarks/reproduce.py. The command itself takes an hour."""

import json
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pytest
import reproduce
import reproduce_report as report
from conftest import ROOT
from reproduce_report import DEFAULT, DIT, LARGE, WHITE_BOX
from scipy import sparse

from wbdit_diffusers.data import CellSplit
from wbdit_diffusers.evaluation import classifiers
from wbdit_diffusers.processing.normalize import log_normalize


def run(losses: list[float], seconds_per_epoch: float) -> dict:
    epochs = list(range(1, len(losses) + 1))
    return {
        "minutes": 1.0,
        "seconds_per_epoch": seconds_per_epoch,
        "epochs": float(epochs[-1]),
        "peak_memory_mib": 500.0,
        "log": {
            "epoch": epochs,
            "seconds": [seconds_per_epoch * epoch for epoch in epochs],
            "loss": losses,
            "validation_loss": losses,
        },
    }


def results_of(metrics: dict, real: dict) -> dict:
    """A JSON of one dataset that is complete, and of one that is not."""
    parts = {"samplers": {"20": metrics}, "epochs": {"1": metrics}}
    runs = {WHITE_BOX: run([0.8, 0.4], 1.0), DIT: run([0.8, 0.5], 2.0), LARGE: run([0.9, 0.6], 2.0)}
    models = {model: {"runs": {"0": one}, **parts} for model, one in (runs | {DEFAULT: run([0.5], 0.1)}).items()}
    network = {"parameters": 311272, "flop_per_step": 7e8}
    entry = {"models": models, "floors": {"real reference": real}, "seconds": 60.0}
    return {"networks": {model: network for model in runs}, "datasets": {"cells": entry, "begun": {"models": {}}}}


def test_losses_are_compared_at_the_last_epoch_and_second_that_both_have_reached():
    white_box = {"0": run([0.8, 0.6, 0.4, 0.3], 1.0)}
    dit = {"0": run([0.8, 0.5], 2.0)}
    assert report.ratio_at(white_box, dit, "epoch") == [pytest.approx(0.6 / 0.5)]  # after two epochs
    assert report.ratio_at(white_box, dit, "seconds") == [pytest.approx(0.3 / 0.5)]  # after four seconds
    assert report.ratio_at(white_box, {}, "epoch") == []


def test_tables_of_what_is_complete():
    metrics = {key: [0.5, 0.7] for key in report.METRICS}
    results = results_of(metrics, real=metrics)
    verdict, cost, quality, epochs, missing = report.tables(results).strip().split("\n\n")
    assert "| cells | 2.00 | 0.800 | " in verdict
    assert f"| cells | {WHITE_BOX} | 311,272 | 0.7 | 1.00 | 1.00 | 2.0 | 500 | 0.800 | 0.400 |" in cost
    assert f"| cells | {DEFAULT} | – | – | 1.00 | – | – | 500 | – | – |" in cost
    assert f"| cells | {DIT} | 20 | 0.600 ± 0.100 |" in quality
    assert f"| cells | {DIT} | 1 | 2 | 0.800 | 0.600 ± 0.100 |" in epochs
    assert missing == "Not complete: begun."
    for table in (verdict, cost, quality, epochs):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_the_table_of_layers_has_trained_and_untrained_matrices():
    results = results_of({"w2": [3.0]}, {"w2": [2.0]})
    step = {"own": -0.1, "random": 0.05, "cosine": 0.25, "objective": -0.4}
    rows = [{"network": network, "layer": 1, **step} for network in ("trained", "untrained")]
    layers = {"0": {"rows": [{"network": "trained", "layer": 0}, *rows]}}
    results["datasets"]["cells"]["models"][WHITE_BOX]["layers"] = layers
    lines = report.tables(results).strip().split("\n\n")[4].splitlines()
    assert lines[2] == f"| cells | {WHITE_BOX} | trained | -10.0% | +5.0% | 0.250 | -40.0% |"
    assert "untrained" in lines[3] and len(lines) == 4


def test_tables_have_the_metrics_that_were_measured():
    measured = {"auc_forest": [0.75], "w2": [3.0], "nearest_training_cell": [1.0]}
    real = {"auc_forest": [0.5], "w2": [2.0]}  # the nearest training cell of a training cell says nothing
    _, _, quality, epochs, _ = report.tables(results_of(measured, real)).strip().split("\n\n")
    assert quality.splitlines()[0] == "| dataset | cells | steps | AUC, forest | W2 | nearest train |"
    assert "| cells | real reference |  | 0.500 | 2.000 | – |" in quality
    assert f"| cells | {DEFAULT} | 20 | 0.750 | 3.000 | 1.000 |" in quality
    assert epochs.splitlines()[0] == "| dataset | model | epochs | seconds | held-out loss | AUC, forest | W2 |"


def test_tables_of_the_committed_results():
    """They were judged by one random forest, beside two kinds of real cells."""
    results = json.loads((ROOT / "lab" / "results" / "reproduction_cpu.json").read_text())
    verdict, _, quality, epochs = report.tables(results).strip().split("\n\n")
    assert "| pbmc3k | 1.63 ± 0.08 | 1.052 ± 0.009 | 1.028 ± 0.006 | 1.028 | 1.046 |" in verdict
    assert quality.startswith(
        "| dataset | cells | steps | RF-AUC | W2 | MMD² | variance | zeros | gene-gene | nearest"
    )
    assert "| pbmc3k | real: halves of the held-out |  | " in quality
    assert epochs.startswith("| dataset | model | epochs | seconds | held-out loss | RF-AUC | W2 | MMD² |")


def test_the_paper_s_metrics_reward_collapse(pbmc):
    """A block of genes that few cells express has no bandwidth."""
    expression = log_normalize(pbmc.X, np.asarray(pbmc.X.sum(axis=1)).ravel()).toarray()[:, :100]
    real, generated = expression[:150], expression[150:300]
    assert all(abs(value) < 0.02 for value in reproduce.paper_metrics(real, real).values())
    of_mean_cell = reproduce.paper_metrics(real, np.tile(real.mean(axis=0), (len(real), 1)))
    assert of_mean_cell["paper_kl"] < reproduce.paper_metrics(real, generated)["paper_kl"]
    first = real[:, np.argsort(-(real > 0).mean(axis=0))[:20]]
    rare = np.hstack([first, np.eye(150, 20)])
    assert reproduce.paper_metrics(rare, rare)["paper_mmd"] == reproduce.paper_metrics(first, first)["paper_mmd"]


def test_real_cells_are_judged_by_the_paper_s_metrics_too(pbmc, monkeypatch):
    monkeypatch.setattr(classifiers, "NUM_TREES", 20)
    monkeypatch.setattr(classifiers, "NUM_ROUNDS", 20)
    adata = ad.AnnData(log_normalize(pbmc.X, np.asarray(pbmc.X.sum(axis=1)).ravel()), pbmc.obs, pbmc.var)
    train, test = CellSplit.draw(adata, label_key="cell_type").apply(adata)
    data = SimpleNamespace(train=train, test=test)
    genes = train.var_names[:60]
    mean_cells = sparse.csr_matrix(np.tile(train[:, genes].X.mean(axis=0), (test.n_obs, 1)))
    sample = ad.AnnData(mean_cells, test.obs[[]], train[:, genes].var)
    metrics = reproduce.Dataset.judge(data, [sample])
    assert set(report.METRICS) - {"rf_auc"} <= set(metrics["generated"])
    real = metrics["real reference"]
    assert 0 < metrics["generated"]["paper_kl"][0] < real["paper_kl"][0]  # of the mean cell, which no cell is
    assert real["paper_wasserstein"][0] < metrics["generated"]["paper_wasserstein"][0]
