"""Reports: every column, their excess, and what is refused."""

import itertools
import json

import anndata as ad
import numpy as np
import pytest
from conftest import make_pipeline

from wbdit_diffusers.data import CellSplit
from wbdit_diffusers.evaluation import classifiers, draw_baselines, draw_samples, evaluate, evaluate_cells, to_markdown
from wbdit_diffusers.evaluation.cells import generated_cells, needs_common_genes, real_cells
from wbdit_diffusers.evaluation.classifiers import JUDGES
from wbdit_diffusers.evaluation.samples import BASELINES, draw_matching
from wbdit_diffusers.evaluation.table import (
    CLASSIFIERS,
    MIXTURE,
    NOT_FIT,
    TITLES,
    excess_and_sd,
    mean_and_sd,
    summary,
    to_json,
    verdict,
)
from wbdit_diffusers.processing.normalize import log_normalize


MEMORY = {"nearest_training_cell", "membership_auc", "membership_auc_donor"}
NUM_GENES = 60


@pytest.fixture(scope="module", autouse=True)
def few_trees():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(classifiers, "NUM_TREES", 40)
        monkeypatch.setattr(classifiers, "NUM_ROUNDS", 30)
        yield


@pytest.fixture(scope="module")
def split(pbmc):
    train, test = (cells.copy() for cells in CellSplit.draw(pbmc, 0.2, label_key="cell_type").apply(pbmc))
    for side in (train, test):
        side.obs["donor"] = np.arange(side.n_obs) % 5
    return train, test


@pytest.fixture(scope="module")
def report(split):
    pipe = make_pipeline(split[0], codec="program", label_keys=["cell_type"], num_genes=NUM_GENES)
    return evaluate(pipe, *split, num_samples=2, donor_key="donor", num_inference_steps=2)


def labels_of(split) -> list[np.ndarray]:
    return [side.obs["cell_type"].to_numpy() for side in split]


def real_sample(split) -> ad.AnnData:
    return split[0][draw_matching(*labels_of(split), np.random.default_rng(0))]


def test_every_column_has_its_metrics(report, split):
    columns = report["metrics"]
    assert list(columns) == ["generated", *BASELINES, "real reference"] and report["generators"] == ["generated"]
    for name, column in columns.items():
        assert set(column) == set(TITLES) - (MEMORY if name == "real reference" else set())
        assert all(len(values) == 2 and np.isfinite(values).all() for values in column.values())
    assert (report["num_test"], report["num_genes"], report["num_samples"]) == (split[1].n_obs, NUM_GENES, 2)
    assert report["label_key"] == "cell_type" and report["donor_key"] == "donor" and not report["within_genes"]
    assert set(report["per_type"]) == set(split[0].obs["cell_type"])  # rare types have their row
    rare = min(report["per_type"].values(), key=lambda entry: entry["num_train"])
    assert rare["num_train"] < 30 and np.isfinite(rare["metrics"]["real reference"]["library_size_w1"]).all()
    assert list(report["excess"]) == ["generated", *BASELINES]
    for name, entry in report["excess"].items():
        ours, real = (np.mean(columns[column][f"auc_{entry['judge']}"]) for column in (name, "real reference"))
        assert entry["mean"] == max(entry["by_judge"].values()) == pytest.approx(ours - real)
    assert report["excess"]["generated"]["mean"] > 0.2  # random weights


def test_real_cells_reach_the_reference(report, split):
    real = report["metrics"]["real reference"]
    assert all(0.35 < np.mean(real[f"auc_{name}"]) < 0.65 for name in JUDGES)
    assert np.mean(real["lfc_slope"]) == pytest.approx(1, abs=0.2)
    assert np.mean(report["metrics"]["generated"]["f1"]) < np.mean(real["f1"])
    genes = split[0].var_names[:200]
    sample = real_sample(split)[:, genes].copy()
    sample.obs["library_size"] = np.asarray(real_sample(split).X.sum(axis=1)).ravel()
    copies = evaluate_cells([sample], *split, label_key="cell_type")
    # They are training cells: as real as the reference, and found out as copies.
    ours = copies["metrics"]["generated"]
    assert abs(copies["excess"]["generated"]["mean"]) < 0.15 and not copies["within_genes"]
    assert ours["nearest_training_cell"] == pytest.approx([0], abs=1e-5) and ours["membership_auc"][0] > 0.55
    assert ours["other_genes_w1"][0] < 0.05


def test_copies_of_training_cells_score_as_the_reference(split):
    """By every metric but those of memory. Components of training cells gave copies half of the density."""
    drawn = [split[0][rows] for rows in (draw_matching(*labels_of(split), np.random.default_rng(i)) for i in range(4))]
    report = evaluate_cells(drawn, *split, label_key="cell_type")
    ours, real = (report["metrics"][name] for name in ("generated", "real reference"))
    for metric in set(ours) - MEMORY:
        scale = max(abs(np.mean(real[metric])), 0.2)
        assert abs(np.mean(ours[metric]) - np.mean(real[metric])) < 0.15 * scale, metric
    assert np.mean(ours["density"]) > 0.8 and np.mean(ours["membership_auc"]) > 0.55
    frequent = [entry["metrics"]["generated"] for entry in report["per_type"].values() if entry["num_test"] >= 20]
    assert len(frequent) >= 2 and all(np.mean(of_type["w2"]) > 0 for of_type in frequent)
    assert all(abs(np.mean(of_type["mmd2"])) < 0.05 for of_type in frequent)


def test_a_report_begins_with_a_verdict(report):
    """Then come six rows. All else is folded."""
    shown, folded = to_markdown(report).split("<details>", 1)
    best = report["excess"]["generated"]
    assert shown.startswith(f"**{NOT_FIT}** {CLASSIFIERS[best['judge']]} separates generated cells from 142 held-out")
    assert f"the excess, **{best['mean']:.3f} ± {best['sd']:.3f}**" in shown
    assert "Gaussian mixture" in shown and excess_and_sd(report, MIXTURE) in verdict(report)
    columns = ["metric", "generated", "real reference", *BASELINES, "generated minus reference"]
    assert f"| {' | '.join(columns)} |" in shown and summary(report) == shown.strip()
    assert len([line for line in shown.splitlines() if line.startswith("|")]) == 2 + 6
    assert all(f"| {title} | " in folded for title in [*TITLES.values(), *report["per_type"]])
    assert folded.count("</details>") == 2 and "<summary>By cell_type</summary>" in folded


def test_the_verdict_follows_the_excess(report):
    def verdict_of(mean: float, mixture: float) -> str:
        excess = report["excess"]["generated"] | {"mean": mean, "sd": 0.01}
        columns = {"generated": excess, MIXTURE: excess | {"mean": mixture}}
        return verdict(report | {"excess": report["excess"] | columns})

    assert verdict_of(0.02, 0.1).startswith("**As real as training cells") and "longer" not in verdict_of(0.02, 0.1)
    assert verdict_of(0.08, 0.1).startswith("**Close to real cells.**")
    assert "Distinguishable" in verdict_of(0.2, 0.1) and "Train longer: the Gaussian" in verdict_of(0.2, 0.1)
    assert "Train longer" not in verdict_of(0.105, 0.1)  # within the spread


def test_the_judged_genes_are_chosen_on_both_sides(split, monkeypatch):
    """All genes count for library sizes and means."""
    monkeypatch.setattr("wbdit_diffusers.evaluation.report.MAX_JUDGED_GENES", 50)
    sample = real_sample(split)[:, :400].copy()
    sample.obs["library_size"] = np.asarray(real_sample(split).X.sum(axis=1)).ravel()
    doubled = int(np.argmax(np.asarray(sample.X.sum(axis=0))))
    sample.X = sample.X.multiply(np.where(np.arange(400) == doubled, 2, 1)).tocsr()
    report = evaluate_cells([sample], *split, label_key="cell_type")
    assert (report["num_genes"], report["num_judged_genes"]) == (400, 50)
    assert report["metrics"]["generated"]["library_size_w1"][0] < 0.1
    assert "The genes are those of 400 that vary most in real cells." in to_markdown(report)
    # Copies of training cells are as good as the reference, as both are drawn from the same cells.
    copies = evaluate_cells([real_sample(split)], *split, label_key="cell_type")
    assert copies["num_judged_genes"] == 50 and abs(copies["excess"]["generated"]["mean"]) < 0.15


def test_several_generators_over_their_common_genes(split):
    train, test = (side[:, :100] for side in split)
    real = real_sample(split)[:, :120].copy()
    shuffled = real[:, 10:].copy()
    shuffled.X = np.random.default_rng(0).permuted(shuffled.X.toarray(), axis=0)
    generators = {"shuffled": [shuffled[:, :90]], "real": 2 * [real[:, :100]]}
    report = evaluate_cells(generators, train, test, label_key="cell_type")
    assert report["generators"] == list(report["excess"]) == ["shuffled", "real"]
    assert report["num_genes"] == 90 and report["num_samples"] == 2 and report["within_genes"]
    assert [len(report["metrics"][name]["w2"]) for name in ("shuffled", "real", "real reference")] == [1, 2, 2]
    assert report["excess"]["shuffled"]["mean"] > report["excess"]["real"]["mean"] + 0.1
    assert all({"shuffled", "real"} <= set(entry["metrics"]) for entry in report["per_type"].values())
    text = to_markdown(report)
    assert "| metric | real | shuffled | real reference |" in text and "separates cells of real from 142" in text


def test_library_sizes_count_all_genes(split):
    """Those of real cells are the sum of the row, regardless of obs."""
    train, genes = split[0].copy(), split[0].var_names[:50]
    total, counts = np.asarray(train.X.sum(axis=1)).ravel(), train[:, genes].X.toarray()
    train.obs["library_size"] = 1.0
    real, generated = real_cells(train, genes), train[:, genes].copy()
    np.testing.assert_array_equal(real.library_size, total)
    np.testing.assert_allclose(real.expression, np.log1p(counts / total[:, None] * 1e4), rtol=1e-5)
    np.testing.assert_allclose(real.other_genes_share(), 1 - counts.sum(1) / total, rtol=1e-5)
    within = generated_cells(generated, within_genes=True)
    np.testing.assert_array_equal(within.expression, real_cells(train, genes, within_genes=True).expression)
    generated.obs["library_size"] = total
    np.testing.assert_array_equal(generated_cells(generated).expression, real.expression)
    assert needs_common_genes(train, train) and not needs_common_genes(generated, train)


def test_without_library_sizes_only_common_genes_count(split):
    report = evaluate_cells([real_sample(split)[:, :40].copy()], *split)
    assert report["within_genes"] and report["label_key"] is None and report["per_type"] == {}
    assert report["metrics"]["generated"]["other_genes_w1"][0] == pytest.approx(0, abs=1e-6)
    assert "normalised within 40 genes" in to_markdown(report)
    assert "purity" not in report["metrics"]["generated"]


def test_log_values_of_a_layer(split):
    train, test = (side[:, :30].copy() for side in split)
    for side in (train, test):
        side.layers["log"] = log_normalize(side.X, np.asarray(side.X.sum(axis=1)).ravel() + 1)
        side.X = None
    sample = ad.AnnData(train.layers["log"][: test.n_obs], var=train.var)
    report = evaluate_cells([sample], train, test, values="log", layer="log")
    assert report["metrics"]["generated"]["variance_ratio"][0] == pytest.approx(1, abs=0.3)
    assert "library_size_w1" not in report["metrics"]["generated"]
    assert "–" in to_markdown(report)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (lambda train, test: {"samples": [test[:, [0, 0]]]}, "has a gene more than once"),
        (lambda train, test: {"samples": {"a": [test[:, :5]], "b": [test[:, 5:]]}}, "a, b have no gene in common"),
        (lambda train, test: {"samples": [test[:, :5]], "train": train[:, 5:]}, "5 generated genes are not among"),
        (lambda train, test: {"samples": [test], "train": train[:20]}, "20 training and 142 held-out cells"),
        (lambda train, test: {"samples": [test[:3]], "test": test[:3]}, "3 held-out cells are too few"),
    ],
)
def test_bad_input_is_refused(split, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_cells(**dict(zip(("train", "test"), split)) | arguments(*split))
    alien = split[1].copy()
    alien.obs["cell_type"] = "alien"
    with pytest.raises(ValueError, match="'generated' has the unknown type 'alien'"):
        evaluate_cells([alien], *split, label_key="cell_type")
    message = "has a library size of .*: give total counts"
    for cells, wrong in itertools.product((alien, alien[:, :40].copy()), (np.nan, 0, -5)):
        cells.obs["library_size"] = np.where(np.arange(cells.n_obs) == 3, wrong, 1000.0)
        with pytest.raises(ValueError, match=message):
            evaluate_cells([cells], *split)


def test_samples_and_baselines_have_the_labels_of_the_held_out_cells(split, monkeypatch):
    """Held-out cells with labels that the pipeline does not know are left out."""
    train, test = split
    rare = train.obs["cell_type"].value_counts().index[-1]
    train = train[train.obs["cell_type"] != rare]
    pipe = make_pipeline(train, codec="program", label_keys=["cell_type"], num_genes=50)
    monkeypatch.setattr("wbdit_diffusers.evaluation.samples.MAX_CELLS", 100)
    samples, known = draw_samples(pipe, test, num_samples=2, num_inference_steps=1)
    assert rare not in set(known.obs["cell_type"]) and known.n_obs == 100
    with pytest.raises(ValueError, match="No held-out cell has labels that training knows"):
        draw_samples(pipe, test[test.obs["cell_type"] == rare])
    baselines, again = (draw_baselines(pipe, train, known, num_samples=2) for _ in range(2))
    assert list(baselines) == list(BASELINES)
    for drawn in (samples, *baselines.values()):
        assert all(cells.obs["cell_type"].tolist() == known.obs["cell_type"].tolist() for cells in drawn)
        assert (drawn[0].X != drawn[1].X).nnz > 0
    assert all((baselines[name][1].X != again[name][1].X).nnz == 0 for name in BASELINES)


def test_json_has_no_nan():
    row = json.loads(to_json({"w2": [float("nan"), 1.5], "purity": [float("nan")]}))
    assert row == {"w2": [None, 1.5], "purity": [None]}
    assert mean_and_sd(row["w2"]) == "1.500 ± 0.000" and mean_and_sd(row["purity"]) == "–"
