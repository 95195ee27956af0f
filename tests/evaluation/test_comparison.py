import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt

from wbdit_diffusers.evaluation import compare_cells, comparison_to_markdown, evaluate_cells
from wbdit_diffusers.evaluation.figure import comparison_figure


matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    monkeypatch.setattr("wbdit_diffusers.evaluation.classifiers.NUM_TREES", 20)


@pytest.fixture(scope="module")
def parts(pbmc):
    """Training, held-out and other real cells, and the latter with genes that are shuffled among cells."""
    cells = pbmc[:, :120].copy()
    real = cells[500:600].copy()
    shuffled = real.copy()
    matrix, rng = shuffled.X.toarray(), np.random.default_rng(0)
    shuffled.X = rng.permuted(matrix, axis=0)
    return cells[:400].copy(), cells[400:500].copy(), real, shuffled


def test_generators_stand_beside_each_other(parts):
    train, test, real, shuffled = parts
    report = compare_cells({"shuffled": [shuffled], "real": [real]}, train, test)
    assert list(report["excess"]) == ["shuffled", "real"]
    assert set(report["metrics"]) == {"shuffled", "real", "real reference"}
    assert report["excess"]["shuffled"]["mean"] > report["excess"]["real"]["mean"] + 0.1
    # As each is judged alone
    alone = evaluate_cells([shuffled], train, test)
    by_judge = alone["excess"]["generated"]["by_judge"]
    assert report["excess"]["shuffled"]["by_judge"] == pytest.approx(by_judge, abs=0.02)  # threads add in any order
    lines = comparison_to_markdown(report).splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert names == ["generator", "---", "real", "shuffled", "real reference"]  # the best first


def test_columns_of_types_have_the_names_too(parts):
    train, test, real, shuffled = parts
    report = compare_cells({"a": [real], "b": [shuffled]}, train, test, label_key="cell_type")
    assert report["per_type"] and all({"a", "b"} <= set(entry["metrics"]) for entry in report["per_type"].values())
    figure = comparison_figure(report, {"a": [real], "b": [shuffled]}, test)
    titles = [axis.get_title() for axis in figure.axes]
    assert sorted(titles) == ["", "a", "b"] and figure.axes[0].get_xlabel().startswith("excess")
    plt.close(figure)


def test_only_common_genes_are_judged(parts):
    train, test, real, shuffled = parts
    report = compare_cells({"a": [real[:, 10:]], "b": [shuffled[:, :100]]}, train, test)
    assert report["num_genes"] == 90 and report["within_genes"]


def twice(cells):
    """With one gene's name for all."""
    cells = cells.copy()
    cells.var_names = ["A"] * cells.n_vars
    return cells


def test_types_that_no_real_cell_has_are_refused(parts):
    train, test, real, _ = parts
    alien = real.copy()
    alien.obs["cell_type"] = "alien"
    with pytest.raises(ValueError, match=r"'b' has cells whose obs\['cell_type'\] is 'alien', which no real cell has"):
        compare_cells({"a": [real], "b": [alien]}, train, test, label_key="cell_type")


@pytest.mark.parametrize(
    "generators, message",
    [
        (lambda real: {"a": [real]}, "at least two generators"),
        (lambda real: {"a": [real], "real reference": [real]}, "can't be called 'real reference'"),
        (lambda real: {"a": [real[:, :5]], "b": [real[:, 5:]]}, "a, b have no gene in common"),
        (lambda real: {"a": [real], "b": [real, real]}, "'b' has 2 samples, and 'a' has 1"),
        (lambda real: {"a": [real], "b": [real[:50]]}, "'b' has 50 cells, not as many as the 100 held-out ones"),
        (lambda real: {"a": [real[:50]], "b": [real]}, "'a' has 50 cells, not as many as the 100 held-out ones"),
        (lambda real: {"a": [], "b": []}, "no samples to judge"),
        (lambda real: {"a": [real], "b": [twice(real)]}, "'b' has the gene .* more than once"),
    ],
)
def test_generators_that_are_refused(generators, message, parts):
    train, test, real, _ = parts
    with pytest.raises(ValueError, match=message):
        compare_cells(generators(real), train, test)
