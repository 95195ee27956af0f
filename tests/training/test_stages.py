"""`train`: from cells to a complete pipeline."""

import json
import re
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import scanpy as sc
import torch
from accelerate.utils import DistributedType
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from huggingface_hub import hf_api
from scipy import sparse
from tiny import assert_same_weights, column, read_log, tiny_config

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.data import CellSplit, write_cells
from wbdit_diffusers.data.latents import Latents
from wbdit_diffusers.processing import log_normalize
from wbdit_diffusers.training import TrainingConfig, fit_codec, train
from wbdit_diffusers.training.config import read_config


KEYS = ["cell_type", "phase"]
TWO_STEPS = {"codec": "expression", "max_train_steps": 2, "validation_steps": 1}


@pytest.fixture(scope="module")
def trained(pbmc, tmp_path_factory) -> tuple[Path, ScRNAGenerationPipeline]:
    """A folder, and the pipeline that `train` returned."""
    folder = tmp_path_factory.mktemp("trained")
    pipe = train(pbmc, tiny_config(folder, label_keys=KEYS, max_train_steps=8, validation_steps=4))
    pipe.set_progress_bar_config(disable=True)
    return folder, pipe


def load(folder: Path) -> ScRNAGenerationPipeline:
    pipe = ScRNAGenerationPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: ScRNAGenerationPipeline, num_cells: int = 5) -> ad.AnnData:
    return pipe(num_cells=num_cells, generator=torch.Generator().manual_seed(3)).cells


# ==================== The pipeline ====================


def test_output_is_a_complete_pipeline(trained, pbmc):
    folder, _ = trained
    pipe = load(folder)
    cells = pipe(num_cells=20).cells
    assert cells.shape == (20, 100)
    assert list(cells.obs) == [*KEYS, "library_size", "generated"]
    assert pipe.config.num_inference_steps == 3
    assert pipe.scheduler.config.prediction_type == "v_prediction" and not pipe.scheduler.config.clip_sample
    split = json.loads((folder / "split.json").read_text())
    assert sorted(split["train"] + split["test"]) == sorted(pbmc.obs_names)
    assert len(split["test"]) == pytest.approx(140, abs=5)


def test_the_returned_pipeline_is_the_one_that_was_saved(trained):
    folder, returned = trained
    loaded = load(folder)
    assert not returned.denoiser.training and not returned.codec.training
    assert returned.denoiser.device == returned.codec.device == torch.device("cpu")
    first, second = generate(returned), generate(loaded)
    np.testing.assert_array_equal(first.X.toarray(), second.X.toarray())
    assert first.obs.equals(second.obs)


def test_the_model_card_says_what_was_trained(trained, pbmc):
    folder, pipe = trained
    card, rows = (folder / "README.md").read_text(), read_log(folder)
    assert "library_name: wbdit-diffusers" in card and f'from_pretrained("{folder.name}")' in card
    split = CellSplit.load(folder)
    facts = {
        "training cells": len(split.train),
        "held-out cells": len(split.test),
        "steps": 8,
        "cells per step": 64,
        "learning rate": 0.003,
        "seed": 0,
        "mixed precision": "no",
        "validation loss": rows[-1]["validation_loss"],
        "parameters": f"{pipe.denoiser.num_parameters():,}",
        "default steps": 3,
    }
    for name, value in facts.items():
        assert f"| {name} | {value} |" in card
    assert all(name in card for key in KEYS for name in pbmc.obs[key].unique())
    assert "wbdit train --dataset cells.h5ad" in card and "--max_train_steps 8" in card
    for path in [*folder.glob("**/*.json"), folder / "README.md"]:
        assert str(folder.parent) not in path.read_text(), path


def test_the_paper_s_config_and_flags_over_it(pbmc, tmp_path):
    log_values = ad.AnnData(
        np.log2(pbmc.X.toarray() / np.linspace(0.5, 5, pbmc.n_vars) + 1), obs=pbmc.obs, var=pbmc.var
    )
    changes = {"max_train_steps": 2, "mixed_precision": "no", "num_layers": 1, "num_attention_heads": 2}
    train(log_values, TrainingConfig(output_dir=tmp_path, **(read_config("paper") | changes)))
    pipe = load(tmp_path)
    assert pipe.denoiser.config.num_layers == 1 and pipe.denoiser.config.attention_head_dim == 96
    assert pipe.scheduler.config.prediction_type == "epsilon" and pipe.config.num_inference_steps == 1000
    assert pipe.processor.config.values == "log" and not pipe.codec.config.standardize
    cells = pipe(num_cells=3, num_inference_steps=2).cells
    assert cells.X.min() >= 0 and cells.uns["wbdit"]["X"] == "log expression"


def tpm_like(adata: ad.AnnData) -> ad.AnnData:
    """Log values that no counts stand behind: divided by lengths of genes, scaled to a million, rounded to 0.01."""
    lengths = np.random.default_rng(0).lognormal(0, 0.8, adata.n_vars)
    tpm = adata.X.toarray() / lengths
    tpm = np.round(1e6 * tpm / tpm.sum(axis=1, keepdims=True), 2)
    return ad.AnnData(np.log2(tpm / 10 + 1).astype(np.float32), obs=adata.obs, var=adata.var)


def test_values_that_are_no_counts_have_a_likelihood_of_their_own(pbmc, tmp_path):
    """As often zero as real ones, above zero in their range, and no library size; also through a file."""
    tpm = tpm_like(pbmc)
    train(tpm, tiny_config(tmp_path, values="log", label_keys=["cell_type"], max_train_steps=2))
    pipe = load(tmp_path)
    assert pipe.codec.config.likelihood == "quantile_hurdle" and not pipe.codec.models_library_size
    assert pipe.denoiser.config.sample_size == 8
    cells = generate(pipe, 200)
    assert "library_size" not in cells.obs and cells.uns["wbdit"]["X"] == "log expression"
    real = tpm[:, cells.var_names].X
    assert cells.X.nnz / np.prod(cells.shape) == pytest.approx((real > 0).mean(), abs=0.05)
    assert cells.X.max() < 1.5 * real.max()
    assert cells.obsm["X_programs"].shape[1] == cells.varm["programs"].shape[1] == 8
    with pytest.raises(ValueError, match="trained on log values"):
        pipe(num_cells=3, library_size=1000)


def test_log_normalised_counts_are_modelled_as_counts(pbmc, tmp_path):
    """Values come back on the scale of the file, and the counts are in a layer, also through a file."""
    log_values = pbmc.copy()
    sc.pp.normalize_total(log_values, target_sum=1e4)
    sc.pp.log1p(log_values)
    train(log_values, tiny_config(tmp_path, values="log", label_keys=["cell_type"], max_train_steps=2))
    pipe = load(tmp_path)
    assert type(pipe.codec).__name__ == "ProgramCodec"
    cells = generate(pipe, 80)
    counts, library_size = cells.layers["counts"], cells.obs["library_size"].to_numpy()
    assert (counts.data > 0).all() and (counts.data == np.rint(counts.data)).all()
    np.testing.assert_allclose(cells.X.toarray(), log_normalize(counts, library_size).toarray(), rtol=1e-5)
    write_cells(tmp_path / "cells.h5ad", pipe.stream(80, batch_size=30, generator=torch.Generator().manual_seed(3)))
    written = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert (written.layers["counts"] != counts).nnz == 0 and (written.X != cells.X).nnz == 0


# ==================== Parts of one's own ====================


class OwnDenoiser(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, sample_size: int, condition_sizes: tuple = ()):
        super().__init__()
        self.linear = torch.nn.Linear(sample_size + len(condition_sizes), sample_size)

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        return (self.linear(torch.cat([sample, class_labels.to(sample)], dim=1)),)


def test_a_denoiser_and_callbacks_of_a_user(pbmc, tmp_path):
    """The network is in the pipeline, callbacks get the rows of the log, and a resumed run continues both."""
    rows, steps = [], {"validation_steps": 2, "checkpointing_steps": 4, "label_keys": ["cell_type"]}
    train(pbmc, tiny_config(tmp_path / "a", max_train_steps=4, **steps), OwnDenoiser, [rows.append])
    assert [row["step"] for row in rows] == [2, 4]
    config = tiny_config(tmp_path / "a", max_train_steps=6, resume_from_checkpoint="latest", **steps)
    pipe = train(pbmc, config, OwnDenoiser, [rows.append])
    assert [{name: str(value) for name, value in row.items()} for row in rows] == read_log(tmp_path / "a")
    assert type(pipe.denoiser) is OwnDenoiser and generate(load(tmp_path / "a")).n_obs == 5
    card = (tmp_path / "a" / "README.md").read_text()
    assert "| denoiser | OwnDenoiser |" in card and "wbdit train" not in card.split("## Training")[1]


def test_stage_one_alone_gives_the_codec_of_a_training(pbmc, tmp_path):
    config = tiny_config(tmp_path, label_keys=["cell_type"], max_train_steps=2)
    pipe = train(pbmc, config)
    processor, codec = fit_codec(pbmc[CellSplit.load(tmp_path).train], config)
    assert processor.var_names.equals(pipe.processor.var_names) and codec.device.type == "cpu"
    for name, values in pipe.codec.state_dict().items():
        assert torch.equal(values, codec.state_dict()[name]), name


def test_the_log_names_the_three_steps(pbmc, tmp_path, caplog):
    with caplog.at_level("INFO"):
        train(pbmc, tiny_config(tmp_path, max_train_steps=60, checkpointing_steps=60, validation_steps=60))
    for line in (
        r"560 training cells, 140 held out, 100 of 765 genes: the most variable ones\.",
        r"Step 1 of 3, gene programs: validation loss [\d.]+ nats per cell \(8 programs, \d+ steps, \d+ s\)\.",
        r"Step 2 of 3, decoder: fitted to the final programs \(\d+ s\)\.",
        r"Step 3 of 3, denoiser: up to 60 steps of 64 cells\.",
        r"Step 3 of 3, denoiser: about \d+ s left\.",
        r"Step 3 of 3, denoiser: 60 steps, \d+ s\.",
    ):
        assert re.search(line, caplog.text), line


# ==================== Sources ====================


def test_sources_of_the_same_cells_give_the_same_weights(pbmc, pbmc_path, tmp_path, monkeypatch):
    """A file is opened once."""
    opened, File = [], h5py.File
    monkeypatch.setattr(h5py, "File", lambda name, *args: opened.append(str(name)) or File(name, *args))
    train(pbmc, tiny_config(tmp_path / "anndata", **TWO_STEPS))
    train(None, tiny_config(tmp_path / "dataset", dataset=pbmc_path, **TWO_STEPS))
    assert opened == [str(pbmc_path)]
    assert_same_weights(tmp_path / "dataset", tmp_path / "anndata")


# ==================== The split ====================


def test_nothing_of_the_held_out_cells_is_in_the_model(pbmc, tmp_path):
    """The weights are the same, bit for bit, if each held-out cell has other counts."""
    steps = {"label_keys": ["cell_type"], "max_train_steps": 3, "validation_steps": 1}
    train(pbmc, tiny_config(tmp_path / "plain", **steps))
    split = CellSplit.load(tmp_path / "plain")
    cells = pbmc.copy()
    held_out = cells.obs_names.isin(split.test)
    matrix = cells.X.toarray()
    matrix[held_out] = 3 * matrix[held_out][:, ::-1] + 1
    cells.X = matrix
    train(cells, tiny_config(tmp_path / "changed", split=tmp_path / "plain" / "split.json", **steps))
    assert_same_weights(tmp_path / "changed", tmp_path / "plain")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        files = [(tmp_path / folder / "processor" / name).read_bytes() for folder in ("plain", "changed")]
        assert files[0] == files[1], name
    assert column(tmp_path / "changed", "loss") == column(tmp_path / "plain", "loss")
    losses = [column(tmp_path / folder, "validation_loss") for folder in ("plain", "changed")]
    assert losses[0] != losses[1]  # the only thing that they are for


def test_held_out_cells_of_unknown_labels_are_left_out(pbmc, tmp_path):
    """Another run's split may hold out a whole population: the model can't be asked for it."""
    rare = (pbmc.obs["cell_type"] == "CD34+").to_numpy()
    assert rare.any()
    chosen = np.random.default_rng(0).random(pbmc.n_obs) < 0.2
    names = pbmc.obs_names
    CellSplit(list(names[~rare & ~chosen]), list(names[rare | chosen])).save(tmp_path)
    config = tiny_config(tmp_path / "out", label_keys=["cell_type"], split=tmp_path / "split.json", **TWO_STEPS)
    pipe = train(pbmc, config)
    assert "CD34+" not in pipe.processor.config.categories[0]
    assert set(names[rare]) <= set(CellSplit.load(tmp_path / "out").test)
    assert np.isfinite(column(tmp_path / "out", "validation_loss")).all()


@pytest.mark.parametrize("codec", ["program", "expression"])
def test_more_cells_than_fit_in_memory(codec, pbmc, tmp_path, monkeypatch):
    """Stage one sees a sample, and latents are read from a file, which is removed at the end."""
    monkeypatch.setattr("wbdit_diffusers.data.latents.MAX_CELLS_IN_MEMORY", 300)
    monkeypatch.setattr("wbdit_diffusers.data.cells.CHUNK_SIZE", 64)
    seen, batch = [], Latents.batch
    monkeypatch.setattr(Latents, "batch", lambda self, *args: seen.append(len(self)) or batch(self, *args))
    train(pbmc, tiny_config(tmp_path, codec=codec, max_train_steps=2))
    assert max(seen) == 560 and np.isfinite(column(tmp_path, "loss")).all()
    assert not (tmp_path / "latents.npy").exists()


# ==================== Unusual data ====================


def unusual(cells: ad.AnnData, what: str) -> ad.AnnData:
    cells, rng = cells.copy(), np.random.default_rng(0)
    if what == "reads":  # each gene by a factor of its own, up to counts of a million
        factors = np.round(10 ** rng.uniform(2, 4, cells.n_vars))
        cells.X = (cells.X @ sparse.diags_array(factors)).tocsr()
    elif what == "100 types":
        cells.obs["cell_type"] = [f"type {number}" for number in rng.permutation(np.arange(cells.n_obs) % 100)]
    elif what == "60 of one type":
        cells = cells[cells.obs["cell_type"] == "Dendritic"][:60].copy()
    return cells


@pytest.mark.parametrize("what", ["reads", "100 types", "60 of one type"])
def test_unusual_cells_are_learned(what, pbmc, tmp_path):
    cells = unusual(pbmc, what)
    config = tiny_config(tmp_path, label_keys=["cell_type"], codec_max_steps=500, decoder_steps=300, max_train_steps=5)
    pipe = train(cells, config)
    pipe.set_progress_bar_config(disable=True)
    known = cells[CellSplit.load(tmp_path).train]
    decoded = pipe.decode_latents(
        pipe.encode_cells(known), pipe.processor.encode_labels(known), generator=torch.Generator().manual_seed(0)
    )
    assert np.isfinite(decoded.X.data).all() and (decoded.X.data == np.round(decoded.X.data)).all()
    totals = np.asarray(known.X.sum(axis=1)).ravel()
    np.testing.assert_allclose(np.median(decoded.obs["library_size"] / totals), 1, atol=0.15)
    genes = known[:, pipe.processor.var_names].X.getnnz(axis=0) >= 30  # of others the reads of a few cells decide
    means, real_means = (np.asarray(x.X.mean(axis=0)).ravel()[genes] for x in (decoded, known[:, decoded.var_names]))
    assert np.corrcoef(np.log1p(means), np.log1p(real_means))[0, 1] > (0.9 if what == "reads" else 0.98)
    assert generate(pipe).n_obs == 5


def test_push_to_hub(pbmc, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
    monkeypatch.setattr(hf_api.api, "token", "hf_test")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    changes = {"checkpointing_steps": 1, "push_to_hub": True, "repo_id": "me/trained"}
    train(pbmc, tiny_config(tmp_path / "out", **TWO_STEPS, **changes))
    files = set(hub.repos["me/trained"])
    assert {"model_index.json", "README.md", "training.json", "processor/config.json"} <= files
    assert not {"split.json", "training_log.csv"} & files  # names of cells, and logs
    assert {f"{name}/diffusion_pytorch_model.safetensors" for name in ("codec", "denoiser", "processor")} <= files
    assert (tmp_path / "out" / "checkpoint-1").is_dir()
    assert not [name for name in files if name.startswith(("checkpoint", "logs"))]
    assert 'from_pretrained("me/trained")' in hub.repos["me/trained"]["README.md"].decode()


def test_a_launcher_that_divides_the_network_is_refused(pbmc, tmp_path, monkeypatch):
    sharded = property(lambda accelerator: DistributedType.FSDP)
    monkeypatch.setattr("accelerate.Accelerator.distributed_type", sharded)
    with pytest.raises(ValueError, match="FSDP: use training/accelerate/multi_gpu.yaml"):
        train(pbmc, tiny_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
