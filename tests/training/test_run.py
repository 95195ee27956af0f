"""A folder holds one run, one process writes to it, and a resumed run is the one that was begun."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from scipy import sparse
from tiny import assert_same_weights, read_log, tiny_config

from wbdit_diffusers.data import CellSplit
from wbdit_diffusers.training import TrainingConfig, train
from wbdit_diffusers.training.run import describe_cells, written_files


STEPS = {"codec": "expression", "label_keys": ["cell_type"], "num_genes": 60}
STEPS |= {"max_train_steps": 4, "checkpointing_steps": 2, "validation_steps": 2}


@pytest.fixture(scope="module")
def begun(pbmc, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("begun")
    train(pbmc, tiny_config(folder, **STEPS))
    return folder


@pytest.fixture
def run(begun, tmp_path) -> Path:
    return shutil.copytree(begun, tmp_path / "run")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def resume(adata: ad.AnnData, folder: Path, **changes):
    train(adata, tiny_config(folder, **{**STEPS, "resume_from_checkpoint": "latest", **changes}))


# ==================== What may be otherwise ====================

CHANGES = [
    ({"seed": 1}, "--seed 1: the run to go on with has 0"),
    ({"prediction_type": "epsilon"}, "--prediction_type epsilon: the run to go on with has v_prediction"),
    ({"num_genes": 50}, "--num_genes 50: the run to go on with has 60"),
    ({"num_layers": 2}, "--num_layers 2: the run to go on with has 1"),
    ({"attention_head_dim": 4}, "--attention_head_dim 4"),
    ({"patch_size": 10}, "--patch_size 10"),
    ({"block_type": "dit"}, "--block_type dit: the run to go on with has white_box"),
    ({"learning_rate": 1e-3}, "--learning_rate 0.001: the run to go on with has 0.002"),
    ({"train_batch_size": 32}, "--train_batch_size 32: the run to go on with has 64"),
    ({"gradient_accumulation_steps": 2}, "--gradient_accumulation_steps 2"),
    ({"label_keys": []}, "--label_keys none: the run to go on with has cell_type"),
    ({"label_keys": ["phase"]}, "--label_keys phase: the run to go on with has cell_type"),
    ({"test_fraction": 0.3}, "--test_fraction 0.3: the run to go on with has 0.2"),
    ({"values": "log"}, "--values log: the run to go on with has counts"),
    ({"codec": "program"}, "--num_programs 8: the run to go on with has none"),
    ({"standardize": False}, "--standardize False: the run to go on with has True"),
    ({"use_ema": False}, "--use_ema False"),
    ({"ema_decay": 0.9}, "--ema_decay 0.9: the run to go on with has 0.999"),
    ({"max_train_epochs": 3}, "--max_train_epochs 3"),
    ({"max_train_steps": 3}, "--max_train_steps 3: the run to go on with has 4; a resumed run can take more steps"),
]


@pytest.mark.parametrize("changes, message", CHANGES, ids=[next(iter(changes)) for changes, _ in CHANGES])
def test_another_flag_is_refused_with_its_name(changes, message, begun, pbmc):
    before = content(begun)
    with pytest.raises(ValueError, match=message):
        resume(pbmc, begun, **changes)
    assert content(begun) == before


def test_what_is_listed_may_be_otherwise(run, pbmc):
    changes = {"max_train_steps": 6, "checkpointing_steps": 3, "validation_steps": 3, "checkpoints_total_limit": 2}
    changes |= {"max_train_minutes": 5.0, "num_inference_steps": 7, "scheduler": "ddim"}
    resume(pbmc, run, **changes)
    assert [int(row["step"]) for row in read_log(run)] == [2, 4, 6]
    assert json.loads((run / "run.json").read_text())["config"]["max_train_steps"] == 6


def changed(cells: ad.AnnData, what: str) -> ad.AnnData:
    cells = cells.copy()
    if what == "a value":
        cells.X[0, 0] += 1
    elif what == "values exchanged":
        cells.X = cells.X[::-1]
    elif what == "one cell less":
        cells = cells[1:].copy()
    elif what == "a gene's name":
        cells.var_names = ["other", *cells.var_names[1:]]
    elif what == "a cell's name":
        cells.obs_names = ["other", *cells.obs_names[1:]]
    elif what == "a label":
        cells.obs["cell_type"] = cells.obs["cell_type"].astype(str)
        cells.obs.iloc[0, cells.obs.columns.get_loc("cell_type")] = "CD34+"
    elif what == "order of the cells":
        cells = cells[::-1].copy()
    return cells


DATA = [
    ("a value", "they differ in the values"),
    ("values exchanged", "they differ in the values"),
    ("one cell less", "they differ in the number of cells: 700 then, 699 now|The data have no cell"),
    ("a gene's name", "they differ in the names of the genes"),
    ("a cell's name", "they differ in the names of the cells|The data have no cell"),
    ("a label", "they differ in the labels in 'cell_type'"),
    ("order of the cells", "they differ in the names of the cells"),
]


@pytest.mark.parametrize("what, message", DATA, ids=[what for what, _ in DATA])
def test_other_cells_are_refused(what, message, begun, pbmc):
    before = content(begun)
    with pytest.raises(ValueError, match=message):
        resume(changed(pbmc, what), begun)
    assert content(begun) == before


def test_cells_are_the_same_however_they_are_stored(pbmc, pbmc_path, tmp_path):
    config = TrainingConfig(output_dir=tmp_path, label_keys=["cell_type"])
    expected = describe_cells(pbmc, config)
    for matrix in (pbmc.X.toarray(), sparse.csc_matrix(pbmc.X), pbmc.X.astype(np.int64)):
        assert describe_cells(ad.AnnData(matrix, obs=pbmc.obs, var=pbmc.var), config) == expected
    assert describe_cells(ad.read_h5ad(pbmc_path, backed="r"), config) == expected


def test_the_split_of_the_resumed_run_is_used(pbmc, tmp_path):
    names = np.random.default_rng(7).permutation(pbmc.obs_names).tolist()
    CellSplit(names[:600], names[600:]).save(tmp_path)
    given = {**STEPS, "split": tmp_path / "split.json"}
    train(pbmc, tiny_config(tmp_path / "out", **given))
    before = (tmp_path / "out" / "split.json").read_bytes()
    resume(pbmc, tmp_path / "out", max_train_steps=5)  # without --split
    assert (tmp_path / "out" / "split.json").read_bytes() == before
    CellSplit(names[:500], names[500:]).save(tmp_path)
    with pytest.raises(ValueError, match="--split: it holds out other cells than the run to go on with"):
        resume(pbmc, tmp_path / "out", split=tmp_path / "split.json", max_train_steps=5)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "has no run.json"),
        ("{", "run.json is damaged: train again"),
        ("[]", "run.json is damaged"),
        ('{"format_version": 3}', "run.json is damaged"),
        ('{"format_version": 99, "package_version": "9.0"}', "was written by wbdit_diffusers 9.0"),
    ],
)
def test_a_record_that_says_nothing_is_refused(text, message, run, pbmc):
    (run / "run.json").unlink()
    if text is not None:
        (run / "run.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        resume(pbmc, run)


def test_no_path_is_in_the_record(begun, pbmc_path, tmp_path):
    train(None, tiny_config(tmp_path / "out", dataset=pbmc_path, **STEPS))
    text = (tmp_path / "out" / "run.json").read_text()
    assert str(tmp_path) not in text and str(pbmc_path) not in text


# ==================== Whose folder it is ====================


def test_another_run_is_not_written_over(begun, pbmc):
    before = content(begun)
    with pytest.raises(ValueError, match="holds a run .*--resume_from_checkpoint latest.*--overwrite_output_dir"):
        train(pbmc, tiny_config(begun, **STEPS))
    assert content(begun) == before


def test_overwriting_removes_what_that_run_wrote_and_nothing_else(run, pbmc, tmp_path):
    (run / "notes.txt").write_text("mine")
    (run / "checkpoint-best").mkdir()
    changes = {**STEPS, "seed": 1, "checkpointing_steps": 3}
    train(pbmc, tiny_config(run, overwrite_output_dir=True, **changes))
    train(pbmc, tiny_config(tmp_path / "fresh", **changes))
    assert_same_weights(run, tmp_path / "fresh")
    assert content(run).keys() - content(tmp_path / "fresh").keys() == {"notes.txt"}
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-best"}


def test_nothing_is_removed_before_the_cells_are_known_to_be_good(begun, pbmc):
    before = content(begun)
    spoiled = pbmc.copy()
    spoiled.X.data[0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        train(spoiled, tiny_config(begun, overwrite_output_dir=True, **STEPS))
    assert content(begun) == before


HOLDING = """
    import sys, time
    from pathlib import Path
    from accelerate import Accelerator
    from wbdit_diffusers.training import TrainingConfig
    from wbdit_diffusers.training.run import open_run

    with open_run(TrainingConfig(output_dir=sys.argv[1]), Accelerator()):
        print("open", flush=True)
        time.sleep(600)
"""


def test_one_training_writes_at_a_time(pbmc, tmp_path):
    """The lock dies with its process, however that ends."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", textwrap.dedent(HOLDING), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        with pytest.raises(ValueError, match="another training is writing there"):
            train(pbmc, tiny_config(out, **STEPS))
        process.kill()
    train(pbmc, tiny_config(out, **STEPS))
    assert not (out / ".lock").exists()


# ==================== Checkpoints ====================


def test_an_incomplete_checkpoint_is_never_the_latest(run, begun, pbmc):
    shutil.copytree(run / "checkpoint-2", run / ".checkpoint-3.partial")
    (run / "checkpoint-4" / "optimizer.bin").write_bytes(b"half")  # by another hand: ours are renamed when complete
    resume(pbmc, run)
    assert_same_weights(run, begun)
    assert not list(run.glob(".*.partial"))


DAMAGES = [
    ("model.safetensors", b"", "model.safetensors is missing or truncated"),
    ("optimizer.bin", None, "optimizer.bin is missing or truncated"),
    ("ema/config.json", None, "missing or truncated"),
    ("state.json", None, "incomplete one"),
    ("state.json", b"{", "incomplete one"),
    ("state.json", b"[]", "incomplete one"),
    ("model.safetensors", "garbage", "is damaged, or of another network"),
    ("optimizer.bin", "garbage", "is damaged, or of another network"),
]


@pytest.mark.parametrize("name, damage, message", DAMAGES)
def test_a_damaged_checkpoint_is_refused(name, damage, message, run, pbmc):
    path = run / "checkpoint-4" / name
    if name.startswith("ema"):
        path = next((run / "checkpoint-4" / "ema").glob("*.json"))
    size = path.stat().st_size
    path.unlink()
    if damage is not None:
        path.write_bytes(b"\xff" * size if damage == "garbage" else damage)
    with pytest.raises(ValueError, match=message):
        resume(pbmc, run, resume_from_checkpoint=str(run / "checkpoint-4"))


def test_what_came_after_the_checkpoint_is_forgotten(run, begun, pbmc):
    resume(pbmc, run, resume_from_checkpoint=str(run / "checkpoint-2"), checkpointing_steps=100)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert_same_weights(run, begun)


def test_a_full_disk_leaves_the_checkpoints_before(pbmc, tmp_path, monkeypatch):
    from diffusers.training_utils import EMAModel

    save, calls = EMAModel.save_pretrained, []

    def full(self, path):
        calls.append(None)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(EMAModel, "save_pretrained", full)
        with pytest.raises(OSError, match="No space left"):
            train(pbmc, tiny_config(tmp_path / "out", **STEPS))
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint-*")] == ["checkpoint-2"]
    resume(pbmc, tmp_path / "out")
    train(pbmc, tiny_config(tmp_path / "whole", **STEPS))
    assert_same_weights(tmp_path / "out", tmp_path / "whole")


def test_weights_that_are_not_finite_are_not_saved(pbmc, tmp_path, monkeypatch):
    """The loss of the step is finite, what it has made of the weights is not."""
    step, calls = torch.optim.AdamW.step, []

    def spoil(self, *args, **kwargs):
        step(self, *args, **kwargs)
        calls.append(None)
        if len(calls) == 4:
            self.param_groups[0]["params"][0].data[0] = torch.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(ValueError, match="step 4.*not finite|loss of held-out cells is nan at step 4"):
        train(pbmc, tiny_config(tmp_path, **STEPS))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "model_index.json").exists()


def test_a_codec_that_is_not_finite_is_not_saved(pbmc, tmp_path, monkeypatch):
    from wbdit_diffusers import ExpressionCodec

    fit = ExpressionCodec.fit_statistics

    def spoil(self, *args):
        fit(self, *args)
        self.latents_std[0] = torch.inf

    monkeypatch.setattr(ExpressionCodec, "fit_statistics", spoil)
    with pytest.raises(ValueError, match="The codec has weights that are not finite"):
        train(pbmc, tiny_config(tmp_path, **STEPS))
    assert not (tmp_path / "stage_one" / "codec").exists()


def test_what_is_written_is_known(begun):
    """So that --overwrite_output_dir leaves nothing of the old run."""
    assert {path.name for path in written_files(begun)} == {path.name for path in begun.iterdir()}
