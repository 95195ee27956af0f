"""The arithmetic of benchmarks/reproduce.py; the command itself takes an hour."""

import pytest
import reproduce
from reproduce import DEFAULT, DIT, LARGE, WHITE_BOX


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


def test_losses_are_compared_at_the_last_epoch_and_second_that_both_have_reached():
    white_box = {"0": run([0.8, 0.6, 0.4, 0.3], 1.0)}
    dit = {"0": run([0.8, 0.5], 2.0)}
    assert reproduce.ratio_at(white_box, dit, "epoch") == [pytest.approx(0.6 / 0.5)]  # after two epochs
    assert reproduce.ratio_at(white_box, dit, "seconds") == [pytest.approx(0.3 / 0.5)]  # after four seconds
    assert reproduce.ratio_at(white_box, {}, "epoch") == []


def test_tables_of_what_is_complete():
    metrics = {key: [0.5, 0.7] for key in reproduce.METRICS}
    parts = {"samplers": {"20": metrics}, "epochs": {"1": metrics}}
    runs = {WHITE_BOX: run([0.8, 0.4], 1.0), DIT: run([0.8, 0.5], 2.0), LARGE: run([0.9, 0.6], 2.0)}
    models = {model: {"runs": {"0": one}, **parts} for model, one in (runs | {DEFAULT: run([0.5], 0.1)}).items()}
    network = {"parameters": 311272, "flop_per_step": 7e8}
    entry = {"models": models, "floors": {floor: metrics for floor in reproduce.FLOORS}, "seconds": 60.0}
    results = {"networks": {model: network for model in runs}, "datasets": {"cells": entry, "begun": {"models": {}}}}
    verdict, cost, quality, epochs, missing = reproduce.tables(results).strip().split("\n\n")
    assert "| cells | 2.00 | 0.800 | " in verdict
    assert f"| cells | {WHITE_BOX} | 311,272 | 0.7 | 1.00 | 1.00 | 2.0 | 500 | 0.800 | 0.400 |" in cost
    assert f"| cells | {DEFAULT} | – | – | 1.00 | – | – | 500 | – | – |" in cost
    assert f"| cells | {DIT} | 20 | 0.600 ± 0.100 |" in quality
    assert f"| cells | {DIT} | 1 | 2 | 0.800 | 0.600 ± 0.100 |" in epochs
    assert missing == "Not complete: begun."
    for table in (verdict, cost, quality, epochs):
        assert len({line.count("|") for line in table.splitlines()}) == 1
