"""What a user can get wrong when training: one line that says what and how to mend it, and nothing written."""

import os
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from wbdit_diffusers.training.__main__ import main


TINY = (
    "--codec expression --num_genes 50 --patch_size 10 --num_layers 1 --num_attention_heads 2 --attention_head_dim 8"
)
TINY += " --max_train_steps 2 --lr_warmup_steps 1 --mixed_precision no --train_batch_size 64"


def refusal(capsys, flags: list[str], workdir: Path) -> str:
    """The line with which the program ends; it leaves what was there."""
    before = sorted(path.name for path in workdir.rglob("*"))
    with pytest.raises(SystemExit) as exit_:
        main(flags)
    captured = capsys.readouterr()
    assert exit_.value.code == 2 and captured.out == ""
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("wbdit train: ")]
    assert len(lines) == 1 and captured.err.splitlines()[-1] == lines[0], captured.err
    assert sorted(path.name for path in workdir.rglob("*")) == before
    return lines[0]


# ==================== Flags ====================

FLAGS = [
    ("--num_layers 100000", "--num_layers 100000: Input should be less than or equal to 256"),
    ("--num_layers 0", "greater than 0"),
    ("--num_layers two", "--num_layers two: Input should be a valid integer"),
    ("--num_layers", "argument --num_layers: expected one argument"),
    ("--attention_head_dim 1000000", "--attention_head_dim 1000000: Input should be less than or equal to 4096"),
    ("--num_attention_heads 100000", "less than or equal to 256"),
    ("--num_attention_heads 256 --attention_head_dim 4096", "a network of more than 2 billion parameters"),
    ("--num_layers 256 --num_attention_heads 64 --attention_head_dim 64", "more than 2 billion parameters"),
    ("--num_attention_heads 3 --attention_head_dim 5", "their product 15 must be a multiple of 4"),
    ("--patch_size 0", "--patch_size 0: Input should be greater than 0"),
    ("--max_train_steps 0", "--max_train_steps 0: Input should be greater than 0"),
    ("--max_train_steps -5", "greater than 0"),
    ("--max_train_steps 99999999999999999999", "less than or equal to 1000000000"),
    ("--max_train_epochs 0", "greater than 0"),
    ("--max_train_minutes 0", "greater than 0"),
    ("--max_train_minutes nan", "finite number"),
    ("--max_train_minutes inf", "finite number"),
    ("--max_train_minutes -1", "greater than 0"),
    ("--train_batch_size 0", "greater than 0"),
    ("--train_batch_size 99999999999", "less than or equal to 1000000"),
    ("--gradient_accumulation_steps 0", "greater than 0"),
    ("--learning_rate 10", "--learning_rate 10: Input should be less than or equal to 1"),
    ("--learning_rate nan", "finite number"),
    ("--learning_rate 0", "greater than 0"),
    ("--learning_rate -0.1", "greater than 0"),
    ("--weight_decay 1e9", "less than or equal to 10"),
    ("--max_grad_norm 0", "greater than 0"),
    ("--lr_decay_fraction 2", "less than or equal to 1"),
    ("--lr_warmup_steps -1", "greater than or equal to 0"),
    ("--ema_decay 1", "less than 1"),
    ("--condition_dropout 1", "less than 1"),
    ("--seed -1", "greater than or equal to 0"),
    ("--seed 4294967296", "less than 4294967296"),
    ("--seed 1.5", "valid integer"),
    ("--num_genes -3", "greater than or equal to 0"),
    ("--num_genes 10000000000", "less than or equal to 1000000"),
    ("--test_fraction 0", "greater than 0"),
    ("--test_fraction 1", "less than 1"),
    ("--num_inference_steps 1001", "less than or equal to 1000"),
    ("--num_inference_steps 0", "greater than 0"),
    ("--scheduler euler", "Input should be 'ddpm', 'ddim', 'dpmsolver++' or 'unipc'"),
    ("--validation_steps 0", "greater than 0"),
    ("--checkpointing_steps 0", "greater than 0"),
    ("--checkpoints_total_limit 0", "greater than 0"),
    ("--codec program --num_programs 0", "greater than 0"),
    ("--codec program --num_programs 100000", "less than or equal to 1024"),
    ("--codec program --codec_hidden_size 1000000000", "less than or equal to 16384"),
    ("--codec program --codec_learning_rate 50", "less than or equal to 1"),
    ("--codec program --codec_time_fraction 0", "greater than 0"),
    ("--codec program --min_programs 32 --max_programs 8", "--min_programs 32 is above --max_programs 8"),
    ("--codec program --num_programs 4 --max_programs 8", "--max_programs has no effect with --num_programs"),
    ("--codec program --codec_time_fraction 0.5", "--codec_time_fraction has no effect with no --max_train_minutes"),
    ("--num_programs 8", "--num_programs has no effect with --codec expression"),
    ("--codec program --no-standardize", "--standardize has no effect with --codec program"),
    ("--no-use_ema --ema_decay 0.5", "--ema_decay has no effect with --no-use_ema"),
    ("--split other.json --test_fraction 0.5", "--test_fraction has no effect with --split"),
    ("--hub_model_id me/cells", "--hub_model_id has no effect with no --push_to_hub"),
    ("--push_to_hub --hub_model_id a/b/c", "--hub_model_id a/b/c: Repo id must be in the form"),
    ("--label_keys library_size", "generated cells could not have a column of that name"),
    ("--label_keys _index", "generated cells could not have a column of that name"),
    ("--label_keys cell_type cell_type", "--label_keys names 'cell_type' twice"),
    ("--resume_from_checkpoint latest --overwrite_output_dir", "--overwrite_output_dir removes what"),
    ("--report_to nowhere", "nowhere"),
    ("--report_to aim", "--report_to aim: install that tracker, or leave it out"),
    ("--config absent", "--config absent: no such file. Configs in this package"),
    ("--no-seed", "--no-seed is unknown"),
    ("--learning 1", "--learning is unknown"),
    ("stray", "stray is unknown"),
]


@pytest.mark.parametrize("flags, message", FLAGS, ids=[flags for flags, _ in FLAGS])
def test_a_flag_is_refused(flags, message, pbmc_path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--dataset", str(pbmc_path), "--output_dir", "out", *TINY.split(), *flags.split()]
    assert message in refusal(capsys, given, tmp_path)


# ==================== YAML ====================

YAML = [
    ("num_layers: [1, 2]", "--num_layers [1, 2]: Input should be a valid integer"),
    ("num_layers: {a: 1}", "Input should be a valid integer"),
    ("seed: true", "--seed True: Input should not be true or false"),
    ("learning_rate: yes", "--learning_rate True: Input should not be true or false"),
    ("use_ema: 3", "Input should be a valid boolean"),
    ("learning_rate: 1e-3x", "valid number"),
    ("learning_rate: .nan", "finite number"),
    ("label_keys: 3", "Input should be a valid list"),
    ("label_keys: [cell_type, 3]", "Input should be a valid string"),
    ("label_keys: [cell_type, '']", "at least 1 character"),
    ("label_keys: [a/b]", "could not have a column of that name"),
    ("layer: 3", "Input should be a valid string"),
    ("layer: ''", "at least 1 character"),
    ("dataset: [a, b]", "--dataset"),
    ("resume_from_checkpoint: ''", "at least 1 character"),
    ("1: 2\na: 3", "1 is unknown"),
    ("[1, 2]", "does not hold fields and values"),
    ("just text", "does not hold fields and values"),
    ("a: [", "is not YAML"),
    ("a: !!python/object:os.system {}", "is not YAML"),
    ("\x00", "is not YAML"),
]


@pytest.mark.parametrize("text, message", YAML)
def test_a_yaml_file_is_refused(text, message, pbmc_path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(text)
    line = refusal(capsys, ["--config", "config.yaml", "--output_dir", "out", *TINY.split()[:2]], tmp_path)
    assert message in line


def test_bytes_that_are_no_text_are_no_yaml(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_bytes(b"\xff\xfe\x80seed: 1")
    assert "config.yaml is not YAML" in refusal(capsys, ["--config", "config.yaml", "--output_dir", "out"], tmp_path)


# ==================== Cells ====================


def spoiled(cells: ad.AnnData, what: str) -> ad.AnnData:
    cells = cells[:200].copy()
    dense = cells.X.toarray()
    if what in ("NaN", "inf", "-1", "0.5", "3e38"):
        dense[7, 3] = float(what)
    elif what == "log values":
        dense = np.log1p(dense)
    elif what == "empty":
        dense[:] = 0
    elif what in ("float16", "complex64", "bool"):
        dense = dense.astype(what)
    elif what == "no cells":
        return cells[:0].copy()
    elif what == "no genes":
        return cells[:, :0].copy()
    elif what == "nine cells":
        return cells[:9].copy()
    elif what == "cells twice":
        cells.obs_names = ["cell", "cell", *cells.obs_names[2:]]
    elif what == "genes twice":
        cells.var_names = ["gene", "gene", *cells.var_names[2:]]
    elif what == "a label each":
        cells.obs["cell_type"] = [f"type {number}" for number in range(cells.n_obs)]
    elif what == "labels missing":
        cells.obs["cell_type"] = [None, *cells.obs["cell_type"].astype(str)[1:]]
    elif what == "label numbers missing":
        cells.obs["cell_type"] = [np.nan, *range(cells.n_obs - 1)]
    elif what == "all labels missing":
        cells.obs["cell_type"] = np.nan
    elif what == "only layers":
        return ad.AnnData(obs=cells.obs, var=cells.var, layers={"raw": cells.X})
    elif what == "genes in three cells":
        dense[:] = 0
        dense[np.arange(200), np.arange(200)] = 1
    cells.X = dense if what in ("float16", "complex64", "bool") else sparse.csr_matrix(dense)
    return cells


CELLS = [
    ("NaN", "X holds nan"),
    ("inf", "X holds inf"),
    ("-1", "expression is never negative"),
    ("0.5", "which is no integer count"),
    ("3e38", "X holds 3e+38, which is no count and no logarithm"),
    ("log values", "which is no integer count"),
    ("empty", "no counts at all"),
    ("float16", "X holds values of type float16"),
    ("complex64", "X holds values of type complex64"),
    ("bool", "X holds values of type bool"),
    ("no cells", "The data are empty: 0 cells"),
    ("no genes", "× 0 genes"),
    ("nine cells", "training cells are too few to learn from: 10 are the least"),
    ("cells twice", "The cell name 'cell' occurs more than once"),
    ("genes twice", "The gene name 'gene' occurs more than once"),
    ("a label each", "No label in obs['cell_type'] has cells enough to hold out a share of 0.2: the largest has 1"),
    ("labels missing", "is missing for 1 cells: name or remove them"),
    ("label numbers missing", "is missing for 1 cells: name or remove them"),
    ("all labels missing", "is missing for 200 cells"),
    ("only layers", "The data have no matrix in X, only layers ['raw']: name one (`--layer`)"),
    ("genes in three cells", "No gene is expressed in 3 cells"),
]


@pytest.mark.parametrize("what, message", CELLS, ids=[what for what, _ in CELLS])
def test_cells_are_refused(what, message, pbmc, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoiled(pbmc, what).write_h5ad("cells.h5ad")
    flags = ["--dataset", "cells.h5ad", "--label_keys", "cell_type", "--output_dir", "out", *TINY.split()]
    assert message in refusal(capsys, flags, tmp_path)


WITH_CELLS = [
    ("--label_keys celltype", "`adata.obs` has no column 'celltype'"),
    ("--layer raw", "The data have no layer 'raw'"),
    ("--values log", "which is no logarithm of expression: pass values='counts'"),
    ("--gradient_accumulation_steps 10000", "an epoch has only"),
    ("--test_fraction 0.0001", "too few to hold out a share of 0.0001"),
    ("--test_fraction 0.9999", "too few"),
    ("--codec program --num_programs 300 --num_genes 200", "there are only 200 genes"),
]


@pytest.mark.parametrize("flags, message", WITH_CELLS)
def test_flags_that_do_not_fit_the_cells(flags, message, pbmc_path, tmp_path, capsys):
    given = ["--dataset", str(pbmc_path), "--output_dir", str(tmp_path / "out"), *TINY.split(), *flags.split()]
    assert message in refusal(capsys, given, tmp_path)


# ==================== Files ====================


def no_numbers(path: Path):
    ad.AnnData(np.ones((30, 5), dtype=np.float32)).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        del file["X"]
        file["X"] = np.full((30, 5), "text", dtype=h5py.string_dtype())
        file["X"].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})


def half(path: Path, whole: Path):
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])


FILES = [
    ("absent.h5ad", lambda path, _: None, "There is no file absent.h5ad"),
    ("folder.h5ad", lambda path, _: path.mkdir(), "folder.h5ad"),
    ("text.h5ad", lambda path, _: path.write_text("gene,cell\n"), "text.h5ad cannot be read as an .h5ad file"),
    ("empty.h5ad", lambda path, _: path.write_bytes(b""), "empty.h5ad cannot be read as an .h5ad file"),
    ("half.h5ad", half, "half.h5ad cannot be read as an .h5ad file"),
    ("other.h5ad", lambda path, _: h5py.File(path, "w").close(), "other.h5ad"),
    ("text_matrix.h5ad", lambda path, _: no_numbers(path), "X holds values of type"),
]


@pytest.mark.parametrize("name, make, message", FILES, ids=[name for name, *_ in FILES])
def test_a_file_is_refused(name, make, message, pbmc_path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(Path(name), pbmc_path)
    assert message in refusal(capsys, ["--dataset", name, "--output_dir", "out", *TINY.split()], tmp_path)


SPLITS = [
    ("{", "is no split.json of a training"),
    ("[]", "is no split.json of a training"),
    ('{"train": 1, "test": 2}', "is no split.json of a training"),
    ('{"train": "ab", "test": "cd"}', "is no split.json of a training"),
    ('{"train": [1], "test": [2]}', "is no split.json of a training"),
    ('{"train": ["a"], "test": {"b": 1}}', "is no split.json of a training"),
    ('{"train": ["a"], "test": ["b"]}', "The data have no cell 'a'"),
    ('{"train": ["a", "a"], "test": ["b"]}', "names a cell twice"),
    (str({"train": [f"cell {i}" for i in range(20)], "test": ["b"]}).replace("'", '"'), "The data have no cell"),
]


@pytest.mark.parametrize("text, message", SPLITS)
def test_a_split_is_refused(text, message, pbmc_path, tmp_path, capsys):
    (tmp_path / "split.json").write_text(text)
    flags = ["--dataset", str(pbmc_path), "--output_dir", str(tmp_path / "out"), *TINY.split()]
    assert message in refusal(capsys, [*flags, "--split", str(tmp_path / "split.json")], tmp_path)


def test_a_split_that_holds_out_whole_labels_only(pbmc, pbmc_path, tmp_path, capsys):
    rare = (pbmc.obs["cell_type"] == "Dendritic").to_numpy()
    parts = {"train": pbmc.obs_names[~rare].tolist(), "test": pbmc.obs_names[rare].tolist()}
    (tmp_path / "split.json").write_text(pd.Series(parts).to_json())
    flags = ["--dataset", str(pbmc_path), "--label_keys", "cell_type", "--split", str(tmp_path / "split.json")]
    line = refusal(capsys, [*flags, "--output_dir", str(tmp_path / "out"), *TINY.split()], tmp_path)
    assert "No held-out cell has labels that a training cell has" in line


def a_file(path: Path):
    path.write_text("mine")


def a_pipeline(path: Path):
    path.mkdir()
    (path / "model_index.json").write_text("{}")


def a_readme(path: Path):
    path.mkdir()
    (path / "README.md").write_text("my project")


OUTPUTS = [
    (a_file, "", "out is a file: give a folder"),
    (a_file, "--overwrite_output_dir", "out is a file: give a folder"),
    (a_pipeline, "", "holds a run (model_index.json)"),
    (a_readme, "", "holds a run (README.md)"),
    (a_readme, "--overwrite_output_dir", "but no run.json: no training wrote them there"),
    (a_readme, "--resume_from_checkpoint latest", "has no run.json, which says what was trained there"),
    (a_pipeline, "--resume_from_checkpoint latest", "has no run.json"),
    (a_pipeline, "--resume_from_checkpoint absent", "absent: this is no checkpoint"),
    (lambda path: None, "--resume_from_checkpoint absent/checkpoint-1", "this is no checkpoint"),
    (lambda path: None, "--resume_from_checkpoint .", "this is no checkpoint"),
]


@pytest.mark.parametrize("make, flags, message", OUTPUTS)
def test_an_output_folder_is_refused(make, flags, message, pbmc_path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(Path("out"))
    given = ["--dataset", str(pbmc_path), "--output_dir", "out", *TINY.split(), *flags.split()]
    assert message in refusal(capsys, given, tmp_path)


def test_a_folder_inside_a_file(pbmc_path, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = ["--dataset", str(pbmc_path), "--output_dir", str(tmp_path / "file" / "out"), *TINY.split()]
    assert "can't be written" in refusal(capsys, flags, tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_without_permission(pbmc_path, tmp_path, capsys):
    (tmp_path / "closed").mkdir(mode=0o500)
    flags = ["--dataset", str(pbmc_path), "--output_dir", str(tmp_path / "closed" / "out"), *TINY.split()]
    assert "can't be written: Permission denied" in refusal(capsys, flags, tmp_path)


def test_required_flags(pbmc_path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--output_dir is required" in refusal(capsys, ["--dataset", str(pbmc_path)], tmp_path)
    assert "--dataset is required" in refusal(capsys, ["--output_dir", "out", *TINY.split()], tmp_path)


def test_of_several_processes_one_speaks(pbmc_path, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for flags in (["--num_layers", "0"], ["--seed"]):
        with pytest.raises(SystemExit) as exit_:
            main(["--output_dir", str(tmp_path / "out"), *flags])
        assert exit_.value.code == 2 and capsys.readouterr().err == ""
