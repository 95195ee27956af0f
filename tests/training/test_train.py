"""training/train.py, run as a user runs it."""

import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.cli import SCHEDULERS


TINY = [
    *("--num_genes", "100", "--patch_size", "20", "--num_layers", "1"),
    *("--num_attention_heads", "2", "--attention_head_dim", "8"),
    *("--train_batch_size", "64", "--lr_warmup_steps", "2", "--num_inference_steps", "3"),
    *("--autoencoder_max_steps", "100", "--num_programs", "8", "--autoencoder_hidden_size", "16"),
    *("--decoder_steps", "20"),
]


TRAIN_SCRIPT = ROOT / "training" / "train.py"


def launch(*args, script: Path = TRAIN_SCRIPT, env: dict[str, str] | None = None, num_processes: int = 1):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(num_processes), "--cpu"]
    command += ["--mixed_precision", "no", str(script), *map(str, args)]
    result = subprocess.run(command, env={**os.environ, **(env or {})}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]


EXPRESSION = ["--space", "expression"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "denoiser" / "diffusion_pytorch_model.safetensors")


def read_log(folder: Path) -> list[dict[str, str]]:
    with (folder / "training_log.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(pbmc_path, tmp_path_factory) -> Path:
    """24 steps without interruption: 8 per epoch, a checkpoint in the middle of the second."""
    folder = tmp_path_factory.mktemp("trained")
    launch(
        *("--dataset", pbmc_path, "--label_keys", "cell_type", "phase", "--output_dir", folder, *TINY),
        *("--max_train_steps", 24, "--checkpointing_steps", 12, "--validation_steps", 4),
    )
    return folder


def test_output_is_a_complete_pipeline(trained, pbmc):
    pipe = ScRNAGenerationPipeline.from_pretrained(trained)
    pipe.set_progress_bar_config(disable=True)
    cells = pipe(num_cells=20).cells
    assert cells.shape == (20, 100)
    assert list(cells.obs) == ["cell_type", "phase", "library_size"]
    assert pipe.config.num_inference_steps == 3
    assert pipe.scheduler.config.prediction_type == "v_prediction" and not pipe.scheduler.config.clip_sample

    split = json.loads((trained / "split.json").read_text())
    assert sorted(split["train"] + split["test"]) == sorted(pbmc.obs_names)
    assert len(split["test"]) == pytest.approx(140, abs=5)
    card = (trained / "README.md").read_text()
    assert "library_name: diffusers" in card and "training cells" in card


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_solver_starts_from_pure_noise(trained, name):
    scheduler = SCHEDULERS[name].from_config(ScRNAGenerationPipeline.from_pretrained(trained).scheduler.config)
    for num_inference_steps in (3, 100, 250, 1000):
        scheduler.set_timesteps(num_inference_steps)
        assert scheduler.timesteps[0] == 999
        assert len(scheduler.timesteps.unique()) == num_inference_steps


def test_only_training_cells_are_fitted(trained, pbmc):
    """What processor and autoencoder know follows from the training cells of split.json alone."""
    pipe = ScRNAGenerationPipeline.from_pretrained(trained)
    train = pbmc[json.loads((trained / "split.json").read_text())["train"]]
    features = pipe.processor.preprocess(train)
    torch.testing.assert_close(features.mean(0), torch.zeros(101), atol=1e-4, rtol=0)
    latents = pipe.autoencoder.encode(pipe.processor.counts(*pipe.processor.select(train)))
    torch.testing.assert_close(latents.mean(0), torch.zeros(9), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std(0), torch.ones(9), atol=1e-3, rtol=0)


def test_learning_rate_warms_up_and_ends_at_zero(trained):
    rates = [float(row["learning_rate"]) for row in read_log(trained)]
    assert rates[0] == rates[3] == 2e-3  # step 16 of 24: before the last 30%
    assert 0 < rates[-1] < rates[-2] < 2e-3


def test_losses_are_logged_and_fall(trained):
    rows = read_log(trained)
    assert [int(row["step"]) for row in rows] == [4, 8, 12, 16, 20, 24]
    assert [int(row["epoch"]) for row in rows] == [0, 1, 1, 2, 2, 3]
    assert all(np.isfinite(float(row["loss"])) and np.isfinite(float(row["validation_loss"])) for row in rows)
    assert float(rows[-1]["validation_loss"]) < float(rows[0]["validation_loss"])


@pytest.mark.parametrize("resume_from", ["latest", "path"])
def test_a_resumed_training_gives_the_same_weights(trained, pbmc_path, tmp_path, resume_from):
    arguments = ["--dataset", pbmc_path, "--label_keys", "cell_type", "phase", "--output_dir", tmp_path, *TINY]
    arguments += ["--max_train_steps", 24, "--checkpointing_steps", 12, "--validation_steps", 4]
    launch(*arguments)
    # What an interruption after step 12 leaves; a run of 12 steps would have let the learning rate fall
    for folder in ("checkpoint-24", "denoiser"):
        shutil.rmtree(tmp_path / folder)
    resume_from = "latest" if resume_from == "latest" else tmp_path / "checkpoint-12"
    launch(*arguments, "--resume_from_checkpoint", resume_from)
    resumed, expected = weights(tmp_path), weights(trained)
    assert resumed.keys() == expected.keys()
    for name in expected:
        assert torch.equal(resumed[name], expected[name]), name
    autoencoders = [
        load_file(folder / "autoencoder" / "diffusion_pytorch_model.safetensors") for folder in (tmp_path, trained)
    ]
    assert all(torch.equal(autoencoders[0][name], autoencoders[1][name]) for name in autoencoders[1])
    columns = ("step", "epoch", "loss", "validation_loss")
    # The row of step 16 averages the losses since the checkpoint, as it does in the uninterrupted run.
    assert [[row[c] for c in columns] for row in read_log(tmp_path)] == [
        [row[c] for c in columns] for row in read_log(trained)
    ]


def test_accumulated_gradients_count_as_one_step_and_resume(pbmc_path, tmp_path):
    """8 batches per epoch, 3 per step: 3 steps per epoch, the last of 2 batches."""
    arguments = ["--dataset", pbmc_path, "--output_dir", tmp_path, *TINY, *EXPRESSION]
    arguments += ["--gradient_accumulation_steps", 3, "--max_train_steps", 6, "--checkpointing_steps", 4]
    launch(*arguments, "--validation_steps", 1)
    expected, rows = weights(tmp_path), read_log(tmp_path)
    assert [int(row["epoch"]) for row in rows] == [0, 0, 1, 1, 1, 2]
    launch(*arguments, "--validation_steps", 1, "--resume_from_checkpoint", tmp_path / "checkpoint-4")
    assert all(torch.equal(weights(tmp_path)[name], expected[name]) for name in expected)
    assert [row["loss"] for row in read_log(tmp_path)] == [row["loss"] for row in rows]


def test_accumulated_gradients_are_those_of_one_larger_batch(pbmc_path, tmp_path):
    # train.py as it is, but for the noise: it depends on the number of the batch, so here the loss has none
    script = tmp_path / "train.py"
    loss = "def diffusion_loss(model, noise_scheduler, batch, generator):\n"
    loss += "    latents = batch['latents']\n"
    loss += "    return F.mse_loss(model(latents, 500, return_dict=False)[0], latents.roll(1, 1))\n\n\n"
    source = TRAIN_SCRIPT.read_text()
    assert source.count("def learning_rate(") == 1
    script.write_text(source.replace("def learning_rate(", loss + "def learning_rate("))
    steps = ("--max_train_steps", 6, "--checkpointing_steps", 6, "--validation_steps", 1)
    for name, batch_size, accumulation in (("large", 64, 1), ("small", 16, 4)):
        flags = ["--train_batch_size", batch_size, "--gradient_accumulation_steps", accumulation]
        arguments = ["--dataset", pbmc_path, "--output_dir", tmp_path / name, *TINY, *EXPRESSION, *steps, *flags]
        launch(*arguments, script=script)
    large, small = weights(tmp_path / "large"), weights(tmp_path / "small")
    for name in large:
        torch.testing.assert_close(small[name], large[name], atol=1e-5, rtol=1e-4, msg=name)
    losses = [[float(row["loss"]) for row in read_log(tmp_path / name)] for name in ("large", "small")]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert large["proj_out.weight"].abs().max() > 1e-3  # it starts at zero


def test_two_processes_train_together_on_different_cells(pbmc_path, tmp_path):
    # train.py as it is, but each process notes the cells that it is given
    noted = "from wbdit_diffusers.data import CellDataset\n\n\nclass NotedDataset(CellDataset):\n"
    noted += "    def __getitems__(self, indices):\n"
    noted += f"        with open({str(tmp_path)!r} + '/cells-of-' + os.environ['RANK'], 'a') as file:\n"
    noted += "            file.write(' '.join(map(str, indices)) + '\\n')\n"
    noted += "        return super().__getitems__(indices)\n\n\nCellDataset = NotedDataset\n\n\nlogger ="
    script = tmp_path / "train.py"
    script.write_text(TRAIN_SCRIPT.read_text().replace("logger =", noted, 1))
    launch(
        *("--dataset", pbmc_path, "--output_dir", tmp_path / "out", *TINY),
        *("--max_train_steps", 4, "--checkpointing_steps", 4, "--validation_steps", 4),
        script=script,
        num_processes=2,
    )
    # The first line is the validation batch, which both build; then the steps of one epoch (4 × 2 × 64 of 560 cells).
    batches = [
        [set(line.split()) for line in (tmp_path / f"cells-of-{rank}").read_text().splitlines()] for rank in "01"
    ]
    cells = [set.union(*one[1:5]) for one in batches]
    assert all(len(one) == 4 * 64 for one in cells)
    assert not cells[0] & cells[1]
    assert read_log(tmp_path / "out")[-1]["step"] == "4"
    ScRNAGenerationPipeline.from_pretrained(tmp_path / "out")


def test_push_to_hub(pbmc_path, hub, hub_environment, tmp_path):
    launch(
        *("--dataset", pbmc_path, "--output_dir", tmp_path / "out", *TINY, "--max_train_steps", 2),
        *("--checkpointing_steps", 1, "--push_to_hub", "--hub_model_id", "me/trained"),
        env=hub_environment,
    )
    files = set(hub.repos["me/trained"])
    assert {"model_index.json", "README.md", "split.json", "training_log.csv", "processor/config.json"} <= files
    assert not [name for name in files if name.startswith("checkpoint")]
    assert 'from_pretrained("me/trained")' in hub.repos["me/trained"]["README.md"].decode()


def test_the_paper_s_config_and_flags_over_it(pbmc, tmp_path):
    log_values = ad.AnnData(np.log2(pbmc.X.toarray() / 3 + 1), obs=pbmc.obs, var=pbmc.var)
    log_values.write_h5ad(tmp_path / "log.h5ad")
    launch(
        *("--config", ROOT / "training" / "configs" / "paper.yaml", "--dataset", tmp_path / "log.h5ad"),
        *("--output_dir", tmp_path / "out", "--max_train_steps", 2, "--num_layers", 1, "--num_attention_heads", 2),
    )
    pipe = ScRNAGenerationPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.denoiser.config.num_layers == 1 and pipe.denoiser.config.attention_head_dim == 96
    assert pipe.scheduler.config.prediction_type == "epsilon" and pipe.config.num_inference_steps == 1000
    assert pipe.processor.config.values == "log" and not pipe.processor.config.standardize
    cells = pipe(num_cells=3, num_inference_steps=2).cells
    assert cells.X.min() >= 0 and cells.uns["wbdit"]["X"] == "log expression"


def test_a_dataset_s_config_and_the_paper_s_behind_it():
    specification = importlib.util.spec_from_file_location("train", TRAIN_SCRIPT)
    train = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(train)
    configs = ROOT / "training" / "configs"
    for path in configs.glob("*.yaml"):  # every line is a flag of train.py
        train.parse_args(["--config", str(path), "--dataset", "cells.h5ad", "--output_dir", "out"])
    args = train.parse_args(
        [
            "--config",
            str(configs / "pbmc3k.yaml"),
            str(configs / "paper.yaml"),
            "--values",
            "counts",
            "--output_dir",
            "out",
        ]
    )
    assert args.dataset == "pbmc3k.h5ad"  # the first file's
    assert args.label_keys == [] and args.space == "expression"  # the second's
    assert args.values == "counts"  # the command line's


def test_the_same_cells_held_out_with_another_seed(pbmc_path, tmp_path):
    runs = {"first": ["--seed", 3], "second": ["--seed", 4, "--split", tmp_path / "first" / "split.json"]}
    for name, flags in runs.items():
        launch(
            *("--dataset", pbmc_path, "--output_dir", tmp_path / name, *TINY, *EXPRESSION),
            *("--max_train_steps", 1, *flags),
        )
    first, second = (json.loads((tmp_path / name / "split.json").read_text()) for name in runs)
    assert first["train"] == second["train"] and first["test"] == second["test"]
    losses = [read_log(tmp_path / name)[0]["loss"] for name in runs]
    assert losses[0] != losses[1]


def test_expression_space(pbmc_path, tmp_path):
    launch(
        *("--dataset", pbmc_path, "--label_keys", "cell_type", "--output_dir", tmp_path, *TINY, *EXPRESSION),
        *("--max_train_steps", 2),
    )
    pipe = ScRNAGenerationPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.autoencoder is None and pipe.denoiser.config.num_genes == 101
    assert pipe(num_cells=3).cells.shape == (3, 100)


def test_checkpoints_are_limited_and_time_is_bounded(pbmc_path, tmp_path):
    launch(
        *("--dataset", pbmc_path, "--output_dir", tmp_path, *TINY, "--max_train_steps", 1_000_000),
        *("--max_train_minutes", 0.05, "--checkpointing_steps", 5, "--checkpoints_total_limit", 2),
    )
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    last = read_log(tmp_path)[-1]
    assert 3 <= float(last["seconds"]) < 30 and int(last["step"]) < 1_000_000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dataset", "absent.h5ad"], "no file absent.h5ad"),
        (["--gradient_accumulation_steps", "9"], "an epoch has only 8 batches of 64 cells"),
        (["--label_keys", "celltype"], "has no column 'celltype'"),
        (["--layer", "raw"], "has no layer 'raw'"),
        (["--values", "log", "--space", "program"], "log values need --space expression"),
        (["--test_fraction", "0"], "between 0 and 1"),
        (["--resume_from_checkpoint", "absent"], "absent is no checkpoint of train.py"),
        (["--config", "CONFIG"], "sets learning_rates, which is no flag of train.py"),
        (["--split", "SPLIT"], "names the cell 'no_cell', which the dataset does not have"),
        (["--split", "LEAK"], "names a cell twice"),
        (["--split", "EMPTY"], "does not name train and test cells"),
    ],
)
def test_bad_arguments_end_at_once_with_their_name(arguments, message, pbmc_path, tmp_path):
    (tmp_path / "config.yaml").write_text("learning_rates: 1")
    (tmp_path / "split.json").write_text('{"train": ["no_cell"], "test": ["no_other"]}')
    (tmp_path / "leak.json").write_text('{"train": ["cell"], "test": ["cell"]}')
    (tmp_path / "empty.json").write_text('{"train": ["cell"], "test": []}')
    names = {"CONFIG": "config.yaml", "SPLIT": "split.json", "LEAK": "leak.json", "EMPTY": "empty.json"}
    paths = {key: tmp_path / name for key, name in names.items()}
    arguments = [str(paths.get(one, one)) for one in arguments]
    command = [
        sys.executable,
        ROOT / "training" / "train.py",
        "--dataset",
        pbmc_path,
        "--output_dir",
        tmp_path / "out",
    ]
    result = subprocess.run([*command, *TINY, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode != 0
    assert message in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_number_of_programs_is_chosen(pbmc_path, tmp_path):
    """Doubled until the loss of the cells set aside falls by less than 1%, as the log says."""
    at = TINY.index("--num_programs")
    arguments = [*TINY[:at], *TINY[at + 2 :]]
    command = [sys.executable, TRAIN_SCRIPT, "--dataset", pbmc_path, "--output_dir", tmp_path, *arguments]
    command += ["--autoencoder_max_steps", 1000, "--autoencoder_hidden_size", 64, "--max_train_steps", 2]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    losses = {
        int(programs): float(loss)
        for programs, loss in re.findall(r"(\d+) programs: held-out loss ([\d.]+)", result.stderr)
    }
    assert list(losses) == [16 * 2**i for i in range(len(losses))] and len(losses) > 1
    chosen = ScRNAGenerationPipeline.from_pretrained(tmp_path).autoencoder.config.num_programs
    assert all(losses[2 * programs] <= 0.99 * losses[programs] for programs in losses if programs < chosen)
    assert 2 * chosen not in losses or losses[2 * chosen] > 0.99 * losses[chosen]
