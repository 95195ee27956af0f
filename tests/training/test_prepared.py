"""A training on a prepared folder: as on the same cells in memory, of any number."""

import json
import shutil

import anndata as ad
import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import sparse
from tiny import assert_same_weights, read_log, tiny_config

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.data import CellSplit, PrepareConfig, prepare, read_cells
from wbdit_diffusers.data.backed import BackedFile
from wbdit_diffusers.training import train
from wbdit_diffusers.training.prepared import open_prepared


STEPS = {"max_train_steps": 12, "validation_steps": 6, "codec_max_steps": 20, "label_keys": ["cell_type"]}


@pytest.fixture(scope="module")
def folder(pbmc, tmp_path_factory):
    """In the order of cell types, with one that only a held-out cell has."""
    path = tmp_path_factory.mktemp("prepared")
    by_type = pbmc[np.argsort(pbmc.obs["cell_type"].cat.codes, kind="stable")].copy()
    by_type.write_h5ad(path / "pbmc.h5ad")
    prepare([path / "pbmc.h5ad"], path / "prepared", PrepareConfig(label_keys=["cell_type"]))
    return path / "prepared"


def test_cells_on_disk_train_as_those_in_memory(folder, tmp_path, monkeypatch):
    train(str(folder), tiny_config(tmp_path / "memory", **STEPS))
    monkeypatch.setattr("wbdit_diffusers.data.latents.MAX_CELLS_IN_MEMORY", 100)
    pipe = train(folder, tiny_config(tmp_path / "streamed", **STEPS))
    assert_same_weights(tmp_path / "streamed", tmp_path / "memory")
    assert not (tmp_path / "streamed" / "latents.npy").exists()
    assert "558" in (tmp_path / "streamed" / "README.md").read_text()
    assert ScRNAGenerationPipeline.from_pretrained(tmp_path / "streamed").processor.label_keys == ["cell_type"]
    assert pipe.processor.condition_sizes == (10,)
    assert [int(row["epoch"]) for row in read_log(tmp_path / "streamed")] == [0, 1]
    train_cells, test_cells = CellSplit.load(tmp_path / "streamed").read(folder)
    assert (train_cells.n_obs, test_cells.n_obs) == (558, 142)
    assert train_cells.obs_names.equals(read_cells(folder, "train").obs_names)


def test_a_prepared_folder_gives_the_pipeline_of_its_file(folder, tmp_path):
    """The processor knows the same of cells in memory, given the same split."""
    train_cells, test_cells = (read_cells(folder, split) for split in ("train", "test"))
    CellSplit(train_cells.obs_names.tolist(), test_cells.obs_names.tolist()).save(tmp_path)
    cells = ad.concat([train_cells, test_cells])
    for source, name, changes in (
        (cells, "memory", {"split": tmp_path / "split.json"}),
        (folder, "prepared", {}),
    ):
        config = tiny_config(tmp_path / name, codec="expression", max_train_steps=1, label_keys=["cell_type"])
        for key, value in changes.items():
            setattr(config, key, value)
        train(source, config)
    memory, prepared = (tmp_path / name / "processor" for name in ("memory", "prepared"))
    configs = [json.loads((path / "config.json").read_text()) for path in (memory, prepared)]
    for config in configs:
        config.pop("_model_id")  # of this pipeline alone
    assert configs[0] == configs[1]
    name = "diffusion_pytorch_model.safetensors"
    for key, value in load_file(memory / name).items():
        torch.testing.assert_close(load_file(prepared / name)[key], value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layer": "counts"}, "--layer has no effect on .*prepared, which `wbdit prepare` has split"),
        ({"test_fraction": 0.3}, "--test_fraction has no effect"),
        ({"split": "split.json"}, "--split has no effect"),
        ({"values": "log"}, "was prepared with --values counts: train with --values counts"),
        ({"label_keys": ["louvain"]}, "has no label 'louvain', only cell_type, phase: prepare it with --label_keys"),
    ],
)
def test_flags_that_a_prepared_folder_does_not_have(changes, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_prepared(folder, tiny_config(tmp_path / "out", **changes))


def test_no_held_out_cells(pbmc_path, tmp_path):
    prepare([pbmc_path], tmp_path / "all", PrepareConfig(label_keys=[], test_fraction=0))
    with pytest.raises(ValueError, match="no held-out cells: prepare it with a --test_fraction above 0"):
        open_prepared(tmp_path / "all", tiny_config(tmp_path / "out"))


def test_the_split_of_another_folder(folder, pbmc_path, tmp_path):
    CellSplit([], [], 0, "0" * 64).save(tmp_path)
    for path in (folder, pbmc_path):
        with pytest.raises(ValueError, match="is not the prepared folder that the model was trained on"):
            CellSplit.load(tmp_path).read(path)
    with pytest.raises(ValueError, match="names no cells"):
        CellSplit.load(tmp_path).apply(read_cells(pbmc_path))


def test_cells_are_given_once(folder, tmp_path):
    with pytest.raises(ValueError, match="Give the cells once"):
        train(folder, tiny_config(tmp_path, dataset=folder))


def test_an_address_stays_one(folder, tmp_path):
    config = tiny_config(tmp_path / "out", dataset=f"file://{folder}", **STEPS)
    assert train(None, config).processor.condition_sizes == (10,)


def test_expression_of_more_cells_than_fit_in_memory_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("wbdit_diffusers.data.latents.MAX_CELLS_IN_MEMORY", 100)
    with pytest.raises(ValueError, match="--codec expression: 558 training cells do not fit in memory"):
        train(folder, tiny_config(tmp_path / "out", codec="expression", max_train_steps=1))
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_with_the_same_folder_only(folder, pbmc_path, tmp_path):
    changes = {"codec": "expression", "label_keys": ["cell_type"], "max_train_steps": 2, "checkpointing_steps": 1}
    train(folder, tiny_config(tmp_path / "out", **changes))
    prepare([pbmc_path], tmp_path / "other", PrepareConfig(label_keys=["cell_type"], seed=1))
    config = tiny_config(tmp_path / "out", resume_from_checkpoint="latest", **changes)
    with pytest.raises(ValueError, match="--dataset: the run to continue has other training cells"):
        train(tmp_path / "other", config)


@pytest.mark.parametrize("suffix, layer", [(".h5ad", None), (".zarr", "raw")])
def test_a_file_too_large_for_memory_stays_on_disk(suffix, layer, pbmc, tmp_path, monkeypatch):
    """The same cells are held out as in memory, empty ones are left out, and a resumed run goes on."""
    cells = pbmc[:, :200].copy()
    keeps = np.ones((700, 1))
    keeps[5] = 0
    matrix = sparse.csr_matrix(cells.X.multiply(keeps), dtype=np.float32)
    matrix.eliminate_zeros()
    cells.X = matrix
    if layer is not None:
        cells.layers[layer], cells.X = cells.X.copy(), cells.X * 0.5
    path = tmp_path / f"cells{suffix}"
    cells.write_h5ad(path) if suffix == ".h5ad" else cells.write_zarr(path)
    steps = STEPS | {"checkpointing_steps": 6, "layer": layer}
    train(path, tiny_config(tmp_path / "memory", **steps))
    monkeypatch.setattr("wbdit_diffusers.data.latents.MAX_CELLS_IN_MEMORY", 100)
    monkeypatch.setattr("wbdit_diffusers.training.cells.read_cells", lambda *_: pytest.fail("it was read whole"))
    pipe = train(path, tiny_config(tmp_path / "backed", **steps))
    splits = [CellSplit.load(tmp_path / name) for name in ("memory", "backed")]
    assert splits[0] == splits[1] and len(splits[0].train) + len(splits[0].test) == 699
    in_memory = ScRNAGenerationPipeline.from_pretrained(tmp_path / "memory")
    assert pipe.processor.config.var_names == in_memory.processor.config.var_names
    shutil.rmtree(tmp_path / "backed" / "checkpoint-12")
    train(path, tiny_config(tmp_path / "backed", resume_from_checkpoint="latest", **steps))
    again = load_file(tmp_path / "backed" / "denoiser" / "diffusion_pytorch_model.safetensors")
    for name, tensor in pipe.denoiser.state_dict().items():
        assert torch.equal(again[name], tensor)


def test_a_large_file_that_cannot_stay_on_disk(pbmc, tmp_path, monkeypatch, caplog):
    """Stored by gene it is read whole, and said; a layer that is not there is named before anything is read."""
    monkeypatch.setattr("wbdit_diffusers.data.latents.MAX_CELLS_IN_MEMORY", 100)
    cells = pbmc[:, :100].copy()
    cells.X = sparse.csc_matrix(cells.X)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    train(tmp_path / "cells.h5ad", tiny_config(tmp_path / "run", **STEPS | {"max_train_steps": 2}))
    assert "The whole file is read into memory" in caplog.text and "stored by gene" in caplog.text
    with pytest.raises(ValueError, match="has no layer 'absent'"):
        train(tmp_path / "cells.h5ad", tiny_config(tmp_path / "other", layer="absent", **STEPS))


def test_a_file_of_an_old_layout_is_read_as_before(pbmc, tmp_path):
    pbmc[:, :100].write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "a") as file:  # as AnnData 0.6 wrote it
        attributes = file["X"].attrs
        for name in ("encoding-type", "encoding-version"):
            del attributes[name]
        attributes["h5sparse_format"], attributes["h5sparse_shape"] = "csr", attributes["shape"]
    pipe = train(tmp_path / "cells.h5ad", tiny_config(tmp_path / "run", **STEPS | {"max_train_steps": 2}))
    assert len(pipe.processor.var_names) == 100
    with pytest.raises(ValueError, match="stored in an old layout. Write it again"):
        BackedFile(tmp_path / "cells.h5ad")
