"""What a call refuses, each with the message that names the thing and the mend."""

import re

import numpy as np
import pytest
import torch
from conftest import make_pipeline
from diffusers import DPMSolverMultistepScheduler


@pytest.fixture(scope="module")
def small_pipe(pbmc):
    return make_pipeline(pbmc, codec="program", label_keys=["cell_type", "phase"], num_genes=30)


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


NOISE = torch.zeros(2, 7)
WHOLE = "is a whole number from"
GUIDANCE = "`guidance_scale` is a number from 0 to 100"
SIZE = "`library_size` is a positive number of counts"
GENERATOR = "`generator` is a torch.Generator, or a list with one for each cell"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_cells": 0}, f"`num_cells` {WHOLE} 1"),
        ({"num_cells": -3}, "not -3"),
        ({"num_cells": 2.0}, "not 2.0"),
        ({"num_cells": True}, "not True"),
        ({"num_cells": "10"}, "not '10'"),
        ({"num_cells": None}, "not None"),
        ({"num_cells": np.nan}, "not nan"),
        ({"num_cells": 10**30}, f"`num_cells` {WHOLE}"),
        ({"batch_size": 0}, f"`batch_size` {WHOLE}"),
        ({"batch_size": 1.5}, f"`batch_size` {WHOLE}"),
        ({"batch_size": False}, "not False"),
        ({"num_inference_steps": 0}, f"`num_inference_steps` {WHOLE}"),
        ({"num_inference_steps": "4"}, f"`num_inference_steps` {WHOLE}"),
        ({"num_inference_steps": 1001}, "trained on 1000 timesteps: take at most as many steps"),
        ({"guidance_scale": np.nan}, GUIDANCE),
        ({"guidance_scale": np.inf}, GUIDANCE),
        ({"guidance_scale": -1.0}, GUIDANCE),
        ({"guidance_scale": 1e9}, GUIDANCE),
        ({"guidance_scale": "2"}, GUIDANCE),
        ({"guidance_scale": None}, GUIDANCE),
        ({"guidance_scale": True}, GUIDANCE),
        ({"cell_types": "Dendritik"}, "which knows Dendritic, .* Did you mean 'Dendritic'"),
        ({"cell_types": ""}, "'' is not a cell_type of this model"),
        ({"cell_types": "x" * 10_000}, "is not a cell_type of this model"),
        ({"cell_types": []}, "An empty list was given"),
        ({"cell_types": 5}, "cell_type is one label, or a list with one for each cell, not 5"),
        ({"cell_types": {"CD34+"}}, "cell_type is one label, or a list"),
        ({"cell_types": {"CD34+": 1}}, "cell_type is one label, or a list"),
        ({"cell_types": b"CD34+"}, "cell_type is one label, or a list"),
        ({"cell_types": [["CD34+"]]}, "cell_type is one label, or a list"),
        ({"cell_types": ["CD34+", None], "num_cells": 2}, "cell_type holds None, which is no label"),
        ({"cell_types": ["CD34+", float("nan")], "num_cells": 2}, "cell_type holds nan, which is no label"),
        ({"cell_types": ["CD34+"] * 2, "num_cells": 3}, "cell_type has 2 entries for 3 cells"),
        ({"conditions": "phase=S"}, "`conditions` is a dict from label keys to labels"),
        ({"conditions": ["S"]}, "`conditions` is a dict"),
        ({"conditions": {"donor": "1"}}, r"'donor' is not a condition of this model, which has the label keys"),
        ({"conditions": {1: "S"}}, "1 is not a condition of this model"),
        ({"conditions": {"phase": None}}, "phase is one label, or a list"),
        ({"conditions": {"phase": "s"}}, "'s' is not a phase of this model"),
        ({"conditions": {"cell_type": "CD34+"}, "cell_types": "CD34+"}, "say the same thing"),
        ({"library_size": 0}, SIZE),
        ({"library_size": -5}, SIZE),
        ({"library_size": np.nan}, SIZE),
        ({"library_size": np.inf}, SIZE),
        ({"library_size": 1e12}, SIZE),
        ({"library_size": "1000"}, SIZE),
        ({"library_size": True}, SIZE),
        ({"library_size": [1e3, np.nan]}, SIZE),
        ({"library_size": [[1e3]]}, SIZE),
        ({"library_size": [1e3, 2e3], "num_cells": 3}, "library_size has 2 entries for 3 cells"),
        ({"library_size": 1e3, "output_type": "np"}, "no effect on output_type='np'"),
        ({"generator": 0}, GENERATOR),
        ({"generator": np.random.default_rng(0)}, GENERATOR),
        ({"generator": [seeded(), 1], "num_cells": 2}, GENERATOR),
        ({"generator": (seeded(), seeded()), "num_cells": 2}, GENERATOR),
        ({"generator": []}, "An empty list was given"),
        ({"generator": [seeded(), seeded()], "num_cells": 3}, "generator has 2 entries for 3 cells"),
        ({"latents": NOISE.numpy(), "num_cells": 2}, "`latents` is a torch.Tensor of floating-point numbers, not nda"),
        ({"latents": NOISE.long(), "num_cells": 2}, "floating-point numbers, not torch.int64"),
        ({"latents": NOISE.to(torch.complex64), "num_cells": 2}, "not torch.complex64"),
        ({"latents": NOISE[:, :5], "num_cells": 2}, r"`latents` has shape \(2, 5\), expected \(2, 7\)"),
        ({"latents": NOISE[0]}, r"`latents` has shape \(7,\)"),
        ({"latents": NOISE[:0]}, "An empty list was given"),
        ({"latents": NOISE, "num_cells": 3}, "latents has 2 entries for 3 cells"),
        ({"latents": torch.full((2, 7), np.nan), "num_cells": 2}, "`latents` hold NaN or infinite values"),
        ({"output_type": "pil"}, "`output_type` is one of anndata, np, pt, latent"),
        ({"output_type": None}, "`output_type` is one of"),
        ({"output_type": ["np"]}, "`output_type` is one of"),
        ({"callback_on_step_end": "print"}, "`callback_on_step_end` is a function, not 'print'"),
        ({"callback_on_step_end_tensor_inputs": ["prompt"]}, "prompt"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, r"knows \['latents'\], not 'latents'"),
        ({"callback_on_step_end": lambda *_: None}, "returns a dict of tensors, not None"),
        ({"callback_on_step_end": lambda *_: {"latents": 1}}, r"returned latents int, expected \(1, 7\)"),
        ({"callback_on_step_end": lambda *_: {"latents": NOISE}}, r"returned latents \(2, 7\), expected \(1, 7\)"),
    ],
)
def test_a_call_refuses(small_pipe, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        small_pipe(**arguments)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"first_cell": -1}, f"`first_cell` {WHOLE} 0"),
        ({"first_cell": 1.5}, f"`first_cell` {WHOLE} 0"),
        ({"first_cell": 1, "generator": [seeded()]}, "`first_cell` has no effect on a list of generators"),
    ],
)
def test_a_stream_refuses_at_once(small_pipe, arguments, message):
    """Not only when the first batch is asked for, when a file may have been opened."""
    with pytest.raises(ValueError, match=message):
        small_pipe.stream(**arguments)


# ==================== NaN never passes ====================


def test_nan_of_a_callback_is_named_with_its_step(small_pipe):
    def spoil(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * np.nan} if step == 2 else tensors

    with pytest.raises(ValueError, match="Step 3 of 4 .*NaN or infinite latents, and it was the callback_on_step_end"):
        small_pipe(callback_on_step_end=spoil)


def test_nan_of_guidance_that_a_callback_sets_is_named(small_pipe):
    def spoil(pipe, step, timestep, tensors):
        pipe._guidance_scale = np.nan
        return tensors

    with pytest.raises(ValueError, match="Step 2 of 4 .*it was the denoiser: lower `guidance_scale`"):
        small_pipe(callback_on_step_end=spoil)


@pytest.mark.parametrize("output_type", ["anndata", "np", "latent"])
def test_nan_weights_make_no_cells(pbmc, output_type):
    pipe = make_pipeline(pbmc, codec="program", num_genes=30)
    pipe.denoiser.proj_in.weight.data[0, 0] = np.nan
    with pytest.raises(ValueError, match="Step 1 of 4 .*it was the denoiser"):
        pipe(output_type=output_type)


@pytest.mark.parametrize(
    "codec, message", [("program", "codec's rates|Decoded cells"), ("expression", "Decoded cells")]
)
@pytest.mark.parametrize("output_type", ["anndata", "np"])
def test_a_codec_with_nan_makes_no_cells(pbmc, codec, message, output_type):
    pipe = make_pipeline(pbmc, codec=codec, num_genes=30)
    damaged = pipe.codec.heads["log_theta"].bias if codec == "program" else pipe.codec.latents_mean
    damaged.data[3] = np.nan
    if codec == "program" and output_type == "np":
        damaged = pipe.codec.heads["log_rates"].bias
        damaged.data[3] = np.nan
    with pytest.raises(ValueError, match=message):
        pipe(output_type=output_type)


def test_more_steps_than_the_model_has_timesteps_are_refused(small_pipe):
    small_pipe.scheduler = DPMSolverMultistepScheduler.from_config(small_pipe.scheduler.config)
    with pytest.raises(ValueError, match="is 1001, but .* 1000 timesteps: .*DPMSolverMultistepScheduler"):
        small_pipe(num_inference_steps=1001)


# ==================== Cells by their number ====================


@pytest.mark.parametrize("first_cell", [0, 37, 64, 129])
def test_a_cell_s_number_makes_it_again(small_pipe, first_cell):
    cells = small_pipe(num_cells=140, generator=seeded()).cells
    (again,) = small_pipe.stream(num_cells=5, first_cell=first_cell, generator=seeded())
    expected = cells[first_cell : first_cell + 5]
    assert again.obs_names.equals(expected.obs_names)
    assert list(again.obs["cell_type"]) == list(expected.obs["cell_type"])
    assert (again.X != expected.X).nnz <= 1  # a rate that differs in its last digit may, rarely, change a count


def test_a_request_of_any_number_of_cells_costs_what_its_first_batch_costs(small_pipe):
    stream = small_pipe.stream(num_cells=10**12, cell_types="CD34+", library_size=1000, generator=seeded())
    assert next(stream).n_obs == small_pipe.default_batch_size
    stream.close()


def test_known_labels_are_named_closest_first_and_not_all_of_many(pbmc):
    adata = pbmc.copy()
    adata.obs["cell_type"] = [f"type {i // 10}" for i in range(adata.n_obs)]
    pipe = make_pipeline(adata, codec="program", label_keys=["cell_type"], num_genes=30)
    with pytest.raises(ValueError, match=re.escape("knows type 69, ") + r".* and 50 others\. Did you mean 'type 69'"):
        pipe(cell_types="typ 69")
