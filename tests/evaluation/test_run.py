"""`wbdit evaluate` in Python: models and files in one report, and the mistakes that people make."""

import json
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from conftest import awkward, make_pipeline

from wbdit_diffusers.data import CellSplit
from wbdit_diffusers.evaluation.run import EvaluateConfig, run
from wbdit_diffusers.evaluation.table import summary, to_markdown


QUICK = {"num_inference_steps": 2, "num_samples": 1, "baselines": False, "device": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def few_trees():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("wbdit_diffusers.evaluation.classifiers.NUM_TREES", 20)
        monkeypatch.setattr("wbdit_diffusers.evaluation.classifiers.NUM_ROUNDS", 20)
        yield


@pytest.fixture(scope="module")
def folder(pbmc, tmp_path_factory) -> Path:
    """A model, its cells, files of other generators, and damaged files."""
    folder = tmp_path_factory.mktemp("evaluate")
    split = CellSplit.draw(pbmc, label_key="cell_type")
    train, test = split.apply(pbmc)
    pipe = make_pipeline(train, codec="program", label_keys=["cell_type", "phase"], num_genes=60)
    for name, seed in (("model", 0), ("other", 1)):
        pipe.save_pretrained(folder / name)
        CellSplit.draw(pbmc, label_key="cell_type", seed=seed).save(folder / name)
    files = {"pbmc": pbmc, "train": train, "test": test, "half": train[:100]}
    files |= {name: test.copy() for name in ("unlabelled", "nan", "genes", "fractions", "fake", "fake2")}
    for seed, name in enumerate(("fake", "fake2")):
        files[name].X = np.random.default_rng(seed).permuted(test.X.toarray(), axis=0)
    del files["unlabelled"].obs["cell_type"]
    files["copies"] = ad.concat([train[:70], test[:10]], merge="same")
    files["copies"].obs_names, files["copies"].X = [f"x{i}" for i in range(80)], files["copies"].X.astype(np.float64)
    files["copies"] = files["copies"][:, ::-1].copy()
    files["only_copies"] = files["copies"][:70]
    files["nan"].X.data[3] = np.nan
    files["fractions"].X = files["fractions"].X * 0.5
    files["genes"].var_names = [f"x{name}" for name in test.var_names]
    for name, cells in files.items():
        cells.write_h5ad(folder / f"{name}.h5ad")
    return folder


def evaluate(folder: Path, output_dir: Path, generators: list[str], **kwargs) -> dict:
    generators = [text.replace("@", f"{folder}/") for text in generators]
    paths = {name: str(folder / kwargs.pop(name)) for name in ("dataset", "train", "test") if name in kwargs}
    report, text = run(EvaluateConfig(generators=generators, output_dir=output_dir, **paths, **QUICK | kwargs))
    assert json.loads((output_dir / "report.json").read_text())["excess"] == report["excess"]
    assert summary(report) in text and (output_dir / "report.md").read_text() == to_markdown(report)
    assert (output_dir / "report.png").stat().st_size > 30_000
    return report


def without_forest(row: dict) -> dict:
    """Its threads add up in any order, so that the last digits vary."""
    return {metric: values for metric, values in row.items() if metric != "auc_forest"}


def test_a_generator_has_the_same_numbers_in_every_report(folder, tmp_path):
    """Alone and next to others, with the cells in one file or in two. Other files in the folder are left alone."""
    (tmp_path / "notes.txt").write_text("mine")
    alone = evaluate(folder, tmp_path, ["@model"], dataset="pbmc.h5ad", baselines=True)
    assert len(alone["excess"]) == 4 and alone["generators"] == ["generated"] and alone["label_key"] == "cell_type"
    given = {"train": "train.h5ad", "test": "test.h5ad"}
    again = evaluate(folder, tmp_path, ["x=@model"], **given)
    assert without_forest(again["metrics"]["generated"]) == without_forest(alone["metrics"]["generated"])
    files = ["fake=@fake.h5ad", "fake=@fake2.h5ad"]
    both = evaluate(folder, tmp_path, ["ours=@model", *files], dataset="pbmc.h5ad", num_samples=1)
    assert both["generators"] == list(both["excess"]) == ["ours", "fake"] and both["num_samples"] == 2
    twice = evaluate(folder, tmp_path, ["a=@model", "b=@model"], dataset="pbmc.h5ad")
    for name in ("a", "b"):
        assert without_forest(twice["metrics"][name]) == without_forest(alone["metrics"]["generated"])
    halves = evaluate(folder, tmp_path, ["ours=@model", "@fake.h5ad"], **given)
    for name in ("ours", "fake"):
        for metric, values in without_forest(halves["metrics"][name]).items():
            assert values[0] == both["metrics"][name][metric][0]
    without_model = evaluate(folder, tmp_path, ["@fake.h5ad"], label_keys=["cell_type"], **given)
    assert without_model["generators"] == ["generated"] and without_model["num_genes"] == 765
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "report.json", "report.md", "report.png"}


def test_cells_are_judged_as_the_model_reads_them(folder, pbmc, tmp_path):
    """The same numbers as with the same counts in `X`."""
    cells, settings = awkward(pbmc)
    cells.write_h5ad(tmp_path / "awkward.h5ad")
    shutil.copytree(folder / "model", tmp_path / "model")
    config = tmp_path / "model/processor/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    expected = evaluate(folder, tmp_path / "a", ["@model"], dataset="pbmc.h5ad")
    found = evaluate(tmp_path, tmp_path / "b", ["@model"], dataset="awkward.h5ad")
    assert without_forest(found["metrics"]["generated"]) == without_forest(expected["metrics"]["generated"])


@pytest.mark.parametrize(
    "generators, kwargs, message",
    [
        (["@absent"], {"dataset": "pbmc.h5ad"}, "There is no folder or file .*absent"),
        (["@model"], {}, "Give --dataset for a model, or --train and --test"),
        (["@fake.h5ad"], {"dataset": "pbmc.h5ad"}, "Give --dataset for a model, or --train and --test"),
        (["@fake.h5ad", "@fake.h5ad"], {}, "Two generators are called 'fake'"),
        (["a=@model", "b=@other"], {"dataset": "pbmc.h5ad"}, "'b' was trained on other cells than 'a'"),
        (["@model"], {"train": "half.h5ad", "test": "test.h5ad"}, "'model' was trained on other cells than --train"),
        (["@model"], {"dataset": "pbmc.h5ad", "donor_key": "who"}, "has no column 'who'"),
        (["@model", "@half.h5ad"], {"dataset": "pbmc.h5ad"}, "'half' has 100 cells, and 142 are held out"),
        (["@model", "@unlabelled.h5ad"], {"dataset": "pbmc.h5ad"}, "'unlabelled' has no column 'cell_type' in obs"),
        (["@fake.h5ad"], {"label_keys": ["kind"]}, "The training data has no column 'kind'"),
        (["a=@model", "b=@other"], {"train": "train.h5ad", "test": "test.h5ad"}, "'b' was trained on .* than --train"),
        (["@model"], {"dataset": "copies.h5ad"}, "The data have no cell '.*', nor .* others of the split"),
        (
            ["@model"],
            {"train": "train.h5ad", "test": "only_copies.h5ad"},
            "70 of 70 held-out cells have the values of",
        ),
        (["@genes.h5ad"], {}, "765 generated genes are not among the genes of the real cells, e.g. 'x"),
        (["@nan.h5ad"], {}, "Some values of the generated cells are NaN, infinite or negative"),
        (["@fractions.h5ad"], {}, "not integer counts: give counts, or --values log"),
    ],
)
def test_mistakes_are_refused_and_nothing_is_written(folder, tmp_path, generators, kwargs, message):
    if not any("model" in name or "dataset" in kwargs for name in generators):
        kwargs = {"train": "train.h5ad", "test": "test.h5ad"} | kwargs
    with pytest.raises((ValueError, OSError), match=message) as error:
        evaluate(folder, tmp_path / "report", generators, **kwargs)
    assert "\n" not in str(error.value) and not (tmp_path / "report").exists()


def test_held_out_cells_that_training_has_under_other_names_are_left_out(folder, tmp_path, monkeypatch):
    """Also with genes in another order. A file of generated cells has a cell for each, and keeps the others."""
    messages: list[str] = []
    monkeypatch.setattr("wbdit_diffusers.evaluation.run.logger.warning", messages.append)
    given = {"train": "train.h5ad", "test": "copies.h5ad"}
    report = evaluate(folder, tmp_path, ["ours=@model", "file=@copies.h5ad"], **given)
    assert (report["num_test"], report["num_copies"]) == (10, 70)
    assert messages == ["70 of 80 held-out cells have the values of a training cell ('x0' first): they are left out."]
    assert "70 more held-out cells are left out" in (tmp_path / "report.md").read_text()


def test_an_output_dir_that_is_a_file_is_refused(folder):
    with pytest.raises(OSError, match="test.h5ad is not a folder that can be written to"):
        evaluate(folder, folder / "test.h5ad", ["@model"], dataset="pbmc.h5ad")
