"""The `wbdit` command, called as a user calls it."""

import json

import anndata as ad
import numpy as np
import pytest
from conftest import make_pipeline

from wbdit_diffusers.cli import main
from wbdit_diffusers.data import CellSplit, load_pbmc


@pytest.fixture(scope="module")
def folder(pbmc, tmp_path_factory):
    """A pipeline of random weights with the split.json that a training leaves beside it."""
    folder = tmp_path_factory.mktemp("model")
    split = CellSplit.draw(pbmc, label_key="cell_type")
    pipe = make_pipeline(split.apply(pbmc)[0], codec="program", label_keys=["cell_type", "phase"], num_genes=60)
    pipe.save_pretrained(folder)
    split.save(folder)
    return folder


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    """The forest's 500 trees take most of a report's time."""
    monkeypatch.setattr("wbdit_diffusers.evaluation.classifiers.NUM_TREES", 20)


def test_generate(folder, tmp_path):
    arguments = ["generate", str(folder), "--num_cells", "30", "--num_inference_steps", "2"]
    main([*arguments, "--cell_types", "Dendritic", "--conditions", "phase=S", "--output", str(tmp_path / "a.h5ad")])
    cells = ad.read_h5ad(tmp_path / "a.h5ad")
    assert cells.shape == (30, 60) and (cells.X.data == np.rint(cells.X.data)).all()
    assert set(cells.obs["cell_type"]) == {"Dendritic"} and set(cells.obs["phase"]) == {"S"}
    main([*arguments, "--seed", "1", "--output", str(tmp_path / "b.h5ad")])
    main([*arguments, "--seed", "1", "--output", str(tmp_path / "c.h5ad")])
    b, c = ad.read_h5ad(tmp_path / "b.h5ad"), ad.read_h5ad(tmp_path / "c.h5ad")
    main([*arguments, "--scheduler", "unipc", "--batch_size", "10", "--output", str(tmp_path / "d.h5ad")])
    d = ad.read_h5ad(tmp_path / "d.h5ad")
    assert d.n_obs == 30 and d.uns["wbdit"]["scheduler"] == "UniPCMultistepScheduler"
    assert (b.X != c.X).nnz == 0 and (b.X != cells.X).nnz > 0


def test_train_generate_evaluate(tmp_path, capsys):
    """The three commands in a row, as after `pip install`."""
    load_pbmc()[:, :150].write_h5ad(tmp_path / "cells.h5ad")
    folder = tmp_path / "model"
    arguments = ["--dataset", tmp_path / "cells.h5ad", "--label_keys", "cell_type", "--output_dir", folder]
    arguments += ["--max_train_steps", 2, "--codec_max_steps", 5, "--decoder_steps", 2, "--num_programs", 4]
    arguments += ["--num_layers", 1, "--num_attention_heads", 2, "--attention_head_dim", 8, "--mixed_precision", "no"]
    main(["train", *map(str, arguments)])
    main(["generate", str(folder), "--num_cells", "7", "--output", str(tmp_path / "generated.h5ad")])
    assert ad.read_h5ad(tmp_path / "generated.h5ad").shape == (7, 150)
    evaluate = ["evaluate", folder, "--dataset", tmp_path / "cells.h5ad", "--output_dir", tmp_path / "report"]
    main([*map(str, evaluate), "--num_samples", "1", "--no-baselines"])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert list(report["metrics"]) == ["generated", "real reference"]
    assert "7 cells × 150 genes" in capsys.readouterr().out


def test_evaluate_a_model(folder, pbmc_path, tmp_path, capsys):
    arguments = ["evaluate", str(folder), "--dataset", str(pbmc_path), "--output_dir", str(tmp_path / "report")]
    main([*arguments, "--num_samples", "1", "--num_inference_steps", "2", "--parity"])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["label_key"] == "cell_type" and "paper_kl" in report["metrics"]["generated"]
    baselines = ["Gaussian per label", "Gaussian mixture per label", "training latents resampled"]
    assert list(report["excess"]) == ["generated", *baselines]
    assert report["excess"]["generated"]["mean"] > 0.2  # random weights
    assert (tmp_path / "report" / "report.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "report" / "report.png").stat().st_size > 50_000
    main(
        [
            "push",
            str(folder),
            "--repo_id",
            "me/x",
            "--report",
            str(tmp_path / "report"),
            "--dry_run",
            str(tmp_path / "x"),
        ]
    )
    assert (tmp_path / "x" / "report.png").stat().st_size > 50_000
    card = (tmp_path / "x" / "README.md").read_text()
    assert f"**{report['excess']['generated']['mean']:.3f}**" in card and "![Generated cells" in card
    assert "are told from held-out ones with an AUC of" in card


def test_evaluate_cells_of_any_generator(pbmc, tmp_path):
    """Held-out cells judged on held-out cells, without labels."""
    pbmc = pbmc[:, :100]
    for name, cells in (("train", pbmc[:400]), ("test", pbmc[400:500]), ("generated", pbmc[500:600])):
        cells.write_h5ad(tmp_path / f"{name}.h5ad")
    files = [f"--{name}={tmp_path / name}.h5ad" for name in ("train", "test", "generated")]
    main(["evaluate", *files, "--output_dir", str(tmp_path / "report")])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["metrics"]["generated"]["auc_forest"][0] < 0.7 and report["per_type"] == {}


def test_compare_a_model_with_files(folder, pbmc, pbmc_path, tmp_path, capsys):
    """Both ways to say which cells were held out, and the result for machines."""
    train, test = CellSplit.load(folder).apply(pbmc)
    train.write_h5ad(tmp_path / "train.h5ad")
    test.write_h5ad(tmp_path / "test.h5ad")
    files = []
    for seed in (0, 1):
        path = tmp_path / f"generated-{seed}.h5ad"
        main(["generate", str(folder), "--num_cells", str(test.n_obs), "--seed", str(seed), "--output", str(path)])
        cells = ad.read_h5ad(path)
        cells.obs[["cell_type", "phase"]] = test.obs[["cell_type", "phase"]].to_numpy()
        cells.write_h5ad(path)
        files.append(f"file={path}")
    capsys.readouterr()
    given = ["compare", f"ours={folder}", *files, "--num_inference_steps", "2", "--json"]
    main([*given, "--dataset", str(pbmc_path), "--output_dir", str(tmp_path / "a")])
    report = json.loads(capsys.readouterr().out)
    assert list(report["excess"]) == ["ours", "file"] and report["num_samples"] == 2
    assert report == json.loads((tmp_path / "a" / "comparison.json").read_text())
    assert (tmp_path / "a" / "comparison.png").stat().st_size > 30_000
    halves = ["--train", str(tmp_path / "train.h5ad"), "--test", str(tmp_path / "test.h5ad")]
    main([*given, *halves, "--output_dir", str(tmp_path / "b")])
    again = json.loads(capsys.readouterr().out)
    assert (
        again["num_test"] == report["num_test"] and again["metrics"]["ours"]["w2"] == report["metrics"]["ours"]["w2"]
    )


@pytest.mark.parametrize("command", ["generate", "evaluate", "compare", "programs", "explain", "push", "prepare"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and f"\n  wbdit {command} " in text.split("examples:")[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["compare", "a=", "b=absent.h5ad", "--train", "PBMC", "--test", "PBMC"], "'a=' is not of the form NAME=PATH"),
        (
            ["compare", "PBMC", "b=c.h5ad", "--train", "PBMC", "--test", "PBMC", "--guidance_scale", "2"],
            "--guidance_scale, --num_inference_steps and --device have no effect on files",
        ),
        (["compare", "a=MODEL", "b=pbmc68k_reduced", "--dataset", "PBMC", "--num_samples", "0"], "b' was trained on"),
        (
            ["evaluate", "--generated", "PBMC", "--train", "PBMC", "--test", "PBMC", "--num_samples", "3"],
            "--num_samples has no effect on --generated files",
        ),
        (
            ["evaluate", "--generated", "PBMC", "--train", "PBMC", "--test", "PBMC", "--no-baselines"],
            "--baselines has no effect on --generated files",
        ),
        (["compare", "a=absent.h5ad", "b=absent.h5ad"], "Give --train and --test; or --dataset, with a model"),
        (["compare", "absent.h5ad", "b=absent.h5ad", "--dataset", "absent.h5ad"], "--dataset is split as a model"),
        (["compare", "a=MODEL", "a=MODEL", "--dataset", "absent.h5ad"], "'a' is a model and is named twice"),
        (["compare", "a=MODEL", "b=c.h5ad", "--dataset", "absent.h5ad"], "no file absent.h5ad"),
        (["compare", "a=MODEL", "b=c.h5ad", "--dataset", "PBMC", "--values", "log"], "--values have no effect"),
        (["compare", "a=MODEL", "b=c.h5ad", "--dataset", "PBMC", "--num_samples", "2"], "--num_samples has no effect"),
        (
            ["compare", "a=MODEL", "b=c.h5ad", "--train", "PBMC", "--test", "PBMC"],
            "--train and --test both have the cell",
        ),
        (["generate", "MODEL", "--output", "OUT", "--cell_types", "Dendritik"], "Did you mean 'Dendritic'"),
        (["generate", "MODEL", "--output", "OUT", "--conditions", "phase"], "not of the form KEY=NAME"),
        (["generate", "OUT", "--output", "OUT"], "is no pipeline"),
        (["evaluate", "MODEL"], "give --dataset"),
        (["evaluate", "MODEL", "--dataset", "absent.h5ad"], "no file absent.h5ad"),
        (["evaluate", "OUT", "--dataset", "absent.h5ad"], "split.json is missing"),
        (
            ["evaluate", "MODEL", "--dataset", "absent.h5ad", "--label_key", "x"],
            "--label_key has no effect on a model",
        ),
        (["generate", "MODEL", "--output", "OUT", "--scheduler", "euler"], "--scheduler is one of ddpm, ddim"),
        (["fetch", "nothing"], "There is no recipe for 'nothing'"),
        (["train", "--dataset", "absent.h5ad", "--output_dir", "OUT"], "There is no file absent.h5ad"),
        (["train", "--output_dir", "OUT", "--max_train_steps", "0"], "--max_train_steps 0"),
        (["evaluate", "--generated", "absent.h5ad"], "all of --generated, --train and --test"),
    ],
)
def test_bad_arguments_end_with_one_line(arguments, message, folder, pbmc_path, tmp_path, capsys):
    names = {"MODEL": str(folder), "OUT": str(tmp_path), "a=MODEL": f"a={folder}", "PBMC": str(pbmc_path)}
    with pytest.raises(SystemExit) as error:
        main([names.get(argument, argument) for argument in arguments])
    assert error.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and not any("Traceback" in line for line in lines)
