"""Requests that a call refuses in one line, and NaN that never passes."""

import re

import anndata as ad
import diffusers
import numpy as np
import pytest
import torch
from conftest import make_pipeline
from diffusers import DPMSolverMultistepScheduler

from wbdit_diffusers.data import write_cells
from wbdit_diffusers.pipelines.generate import GenerateConfig, generate


@pytest.fixture(scope="module")
def small_pipe(pbmc):
    return make_pipeline(pbmc, codec="program", label_keys=["cell_type", "phase"], num_genes=30)


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


NOISE = torch.zeros(2, 7)
SIZE = "`library_size` must be a positive number of counts"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_cells": 0}, "`num_cells` is 0: ask for at least one cell"),
        ({"num_cells": 2.5}, "`num_cells` is 2.5"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"num_inference_steps": 0}, "must be between 1 and the 1000 timesteps"),
        ({"num_inference_steps": 1001}, "must be between 1 and the 1000 timesteps of training, not 1001"),
        ({"guidance_scale": np.nan}, "NaN or infinite latents"),
        ({"cell_types": "Dendritik"}, "which knows Dendritic, .* Did you mean 'Dendritic'"),
        ({"cell_types": "T cell"}, r"'T cell' is not a cell_type of this model, which knows CD4\+/CD25 T Reg"),
        ({"cell_types": []}, "ask for at least one cell"),
        ({"cell_types": ["CD34+", None]}, "'None' is not a cell_type"),
        ({"cell_types": ["CD34+"] * 2, "num_cells": 3}, "`cell_type` has 2 entries for 3 cells"),
        ({"cell_types": ["CD34+"] * 2, "num_cells": 1}, "`cell_type` has 2 entries for 1 cells"),
        ({"cell_types": ["CD34+"] * 2, "conditions": {"phase": ["S"]}}, "`phase` has 1 entries for 2 cells"),
        ({"conditions": {"donor": "1"}}, r"'donor' is not a condition of this model, which has the label keys"),
        ({"conditions": {"phase": "s"}}, "'s' is not a phase of this model"),
        ({"conditions": {"cell_type": "CD34+"}, "cell_types": "CD34+"}, "both name the cell type"),
        ({"library_size": 0}, SIZE),
        ({"library_size": np.nan}, SIZE),
        ({"library_size": [1e3, -1]}, SIZE),
        ({"library_size": [1e3, 2e3], "num_cells": 3}, "`library_size` has 2 entries for 3 cells"),
        ({"generator": [seeded(), seeded()], "num_cells": 3}, "`generator` has 2 entries for 3 cells"),
        ({"latents": NOISE[:, :5]}, r"`latents` has shape \(2, 5\), expected \(num_cells, 7\)"),
        ({"latents": NOISE, "num_cells": 3}, "`latents` has 2 entries for 3 cells"),
        ({"latents": torch.full((2, 7), np.nan)}, "NaN or infinite latents"),
        ({"output_type": "pil"}, "`output_type` is one of anndata, np, pt, latent"),
        ({"callback_on_step_end_tensor_inputs": ["prompt"]}, r"\['prompt'\]: choose from \['latents'\]"),
    ],
)
def test_a_call_refuses(small_pipe, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        small_pipe(**arguments)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_an_unconditional_model_has_no_cell_types(pbmc):
    with pytest.raises(ValueError, match="`cell_types` was given, .* unconditional"):
        make_pipeline(pbmc, codec="program", num_genes=30)(cell_types="CD34+")


@pytest.mark.parametrize("arguments", [{"cell_types": "Dendritik"}, {"conditions": {"phase": ["S"]}}])
def test_a_stream_refuses_at_once(small_pipe, arguments):
    """Not only when the first batch is asked for, when a file may have been opened."""
    with pytest.raises(ValueError):
        small_pipe.stream(num_cells=2, **arguments)


def test_nan_of_a_callback_is_refused(small_pipe):
    def spoil(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * np.nan} if step == 2 else tensors

    with pytest.raises(ValueError, match="NaN or infinite latents"):
        small_pipe(callback_on_step_end=spoil)


@pytest.mark.parametrize("output_type", ["anndata", "np", "latent"])
def test_nan_weights_make_no_cells(pbmc, output_type):
    pipe = make_pipeline(pbmc, codec="program", num_genes=30)
    pipe.denoiser.proj_in.weight.data[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite latents"):
        pipe(output_type=output_type)


@pytest.mark.parametrize("codec", ["program", "expression"])
def test_a_codec_with_nan_makes_no_cells(pbmc, codec):
    pipe = make_pipeline(pbmc, codec=codec, num_genes=30)
    damaged = pipe.codec.heads["log_rates"].bias if codec == "program" else pipe.codec.latents_mean
    damaged.data[3] = np.nan
    with pytest.raises(ValueError, match="codec's rates|Decoded cells"):
        pipe()


def test_more_steps_than_the_model_has_timesteps_are_refused(small_pipe):
    small_pipe.scheduler = DPMSolverMultistepScheduler.from_config(small_pipe.scheduler.config)
    with pytest.raises(ValueError, match="1000 timesteps of training, not 1001"):
        small_pipe(num_inference_steps=1001)


@pytest.mark.parametrize("first_cell", [0, 37, 64, 129])
def test_the_number_of_a_cell_makes_it_again(small_pipe, first_cell):
    cells = small_pipe(num_cells=140, generator=seeded()).cells
    again = small_pipe(num_cells=5, first_cell=first_cell, generator=seeded()).cells
    expected = cells[first_cell : first_cell + 5]
    assert again.obs_names.equals(expected.obs_names)
    assert list(again.obs["cell_type"]) == list(expected.obs["cell_type"])
    assert (again.X != expected.X).nnz <= 1  # a rate that differs in its last digit may, rarely, change a count


def test_the_memory_of_a_stream_does_not_grow_with_the_request(small_pipe):
    stream = small_pipe.stream(num_cells=10**12, cell_types="CD34+", library_size=1000, generator=seeded())
    assert next(stream).n_obs == small_pipe.default_batch_size


def test_messages_name_the_closest_of_many_labels(pbmc):
    adata = pbmc.copy()
    adata.obs["cell_type"] = [f"type {i // 10}" for i in range(adata.n_obs)]
    pipe = make_pipeline(adata, codec="program", label_keys=["cell_type"], num_genes=30)
    with pytest.raises(ValueError, match=re.escape("knows type 69, ") + r".* and 50 others\. Did you mean 'type 69'"):
        pipe(cell_types="typ 69")


def test_combinations_that_training_did_not_see_are_named_once(pbmc, tmp_path, monkeypatch):
    """In a call, a stream and a command. Labels that were left open are drawn from seen combinations."""
    messages: list[str] = []
    monkeypatch.setattr("wbdit_diffusers.pipelines.conditions.logger.warning", messages.append)
    seen = pbmc[(pbmc.obs["cell_type"] != "CD34+") | (pbmc.obs["phase"] != "S")]
    pipe = make_pipeline(seen, codec="program", label_keys=["cell_type", "phase"], num_genes=30)
    for conditions in ({}, {"cell_type": "CD34+"}, {"phase": "S"}, {"cell_type": "CD34+", "phase": "G1"}):
        assert "unseen_combinations" not in pipe(num_cells=3, conditions=conditions).cells.uns["wbdit"]
    assert messages == []
    new, text = {"cell_types": "CD34+", "conditions": {"phase": "S"}}, "cell_type=CD34+, phase=S"
    cells = pipe(num_cells=6, batch_size=2, **new).cells
    assert len(messages) == 1 and f"No training cell has {text}. Nothing that was measured shows it" in messages[0]
    cells.write_h5ad(tmp_path / "call.h5ad")
    write_cells(tmp_path / "stream.h5ad", pipe.stream(num_cells=6, batch_size=2, **new))
    assert len(messages) == 2
    pipe.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("wbdit_diffusers.pipelines.generate.CELLS_PER_PART", 2)
    flags = {"model": str(tmp_path / "model"), "output": tmp_path / "command.h5ad", **new, "cell_types": ["CD34+"]}
    generate(GenerateConfig(**flags, num_cells=6, batch_size=2, device="cpu"))
    assert len(messages) == 3
    for name in ("call", "stream", "command"):
        assert list(ad.read_h5ad(tmp_path / f"{name}.h5ad").uns["wbdit"]["unseen_combinations"]["combination"]) == [
            text
        ]
    pipe(cell_types=["CD34+", "CD34+", "Dendritic"], conditions={"phase": ["S", "G1", "S"]})
    assert messages[1:] == [messages[0]] * 3
    mixed = {"cell_types": ["CD34+", "CD34+", "Dendritic"], "conditions": {"phase": ["S", "G1", "S"]}}
    for cells in (pipe(**mixed).cells, ad.concat(pipe.stream(**mixed, batch_size=1))):
        assert cells.obs["unseen_combination"].tolist() == [True, False, False]


@pytest.mark.parametrize(
    "name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "CMStochasticIterativeScheduler"]
)
def test_schedulers_without_the_noise_schedule_are_refused(name, small_pipe):
    small_pipe.scheduler = getattr(diffusers, name).from_config(small_pipe.scheduler.config)
    with pytest.raises(ValueError, match=f"{name} does not have the noise schedule of DDPM"):
        small_pipe()


def test_latents_far_from_all_training_cells_are_refused(program_pipe):
    """Their cells would have all counts in one gene, or none."""
    with pytest.raises(ValueError, match="1e.06 standard deviations from the training cells: lower `guidance_scale`"):
        program_pipe.decode_latents(torch.full((3, 7), 1e6))


def test_double_precision(program_pipe):
    assert program_pipe.to(torch.float64)(num_cells=3).cells.n_obs == 3
