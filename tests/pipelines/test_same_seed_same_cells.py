"""One seed gives one set of cells, however they are batched, streamed or offloaded."""

import anndata as ad
import numpy as np
import pytest
import torch
from conftest import make_pipeline
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from wbdit_diffusers.pipelines import pipeline_utils


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("scheduler", [None, "sde-dpmsolver++"])
def test_batch_size_never_changes_the_cells(pipe, scheduler):
    if scheduler is not None:
        config = pipe.scheduler.config
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(config, algorithm_type=scheduler)
    arguments = {"num_cells": 150, "guidance_scale": 2.0, "output_type": "latent"}
    expected = pipe(**arguments, generator=seeded()).cells
    assert torch.isfinite(expected).all() and expected.std() > 0.1
    for batch_size in (1, 37, 64, 100):
        cells = pipe(**arguments, generator=seeded(), batch_size=batch_size).cells
        torch.testing.assert_close(cells, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(pipe(**arguments, generator=seeded(1)).cells, expected)


def test_batch_sizes_64_and_2500_give_the_same_5000_cells(pipe):
    cells = [
        pipe(num_cells=5000, batch_size=size, generator=seeded(), num_inference_steps=2).cells for size in (64, 2500)
    ]
    assert (cells[0].obs["cell_type"] == cells[1].obs["cell_type"]).all()
    np.testing.assert_allclose(cells[0].obs["library_size"], cells[1].obs["library_size"], rtol=1e-4)
    # A count may round the other way after a difference in the last digit.
    assert (cells[0].X != cells[1].X).nnz < 1e-5 * cells[0].X.nnz


@pytest.mark.parametrize("codec", ["expression", "program"])
def test_a_stream_gives_the_cells_of_a_call(pbmc, codec):
    pipe = make_pipeline(pbmc, codec=codec, label_keys=["cell_type"])
    arguments = {"num_cells": 150, "guides": [lambda clean, noisy, timestep, conditions: 0.9 * clean]}
    batches = list(pipe.stream(**arguments, batch_size=60, generator=seeded()))
    assert [batch.n_obs for batch in batches] == [60, 60, 30]
    assert all(
        batch.obs["cell_type"].cat.categories.tolist() == batches[0].obs["cell_type"].cat.categories.tolist()
        for batch in batches
    )
    together = ad.concat(batches)
    cells = pipe(**arguments, generator=seeded()).cells
    assert together.obs_names.equals(cells.obs_names)
    assert (together.obs["cell_type"].astype(str) == cells.obs["cell_type"].astype(str)).all()
    assert (together.X != cells.X).nnz == 0
    with pytest.raises(ValueError, match="Dendritik"):
        next(pipe.stream(cell_types="Dendritik"))


def test_streams_do_not_disturb_each_other(pipe):
    arguments = {"num_cells": 128, "batch_size": 64, "cell_types": "Dendritic"}
    pairs = zip(
        pipe.stream(**arguments, generator=seeded(), guidance_scale=1.0),
        pipe.stream(**arguments, generator=seeded(), guidance_scale=3.0),
    )
    ones, threes = (ad.concat(batches) for batches in zip(*pairs))
    for cells, guidance_scale in ((ones, 1.0), (threes, 3.0)):
        alone = pipe(**arguments, generator=seeded(), guidance_scale=guidance_scale).cells
        assert (cells.X != alone.X).nnz == 0
    assert (ones.X != threes.X).nnz > 0


def test_counts_are_drawn_block_by_block(program_pipe, monkeypatch):
    """The pieces in which counts are made dense never change them, nor does a generator per cell."""
    expected = program_pipe(num_cells=150, generator=seeded()).cells
    monkeypatch.setattr(pipeline_utils, "VALUES_AT_ONCE", 1)
    for batch_size in (150, 100):
        cells = program_pipe(num_cells=150, generator=seeded(), batch_size=batch_size).cells
        assert (cells.X != expected.X).nnz <= 1e-3 * expected.X.nnz
        np.testing.assert_allclose(cells.obs["library_size"], expected.obs["library_size"], rtol=1e-4)
    together = program_pipe(generator=[seeded(i) for i in range(3)]).cells
    alone = program_pipe(generator=seeded(2)).cells
    assert (together[2:].X != alone.X).nnz <= 1


def test_global_seed_without_a_generator(pipe):
    cells = []
    for batch_size in (None, 2):
        torch.manual_seed(0)
        cells.append(pipe(num_cells=5, batch_size=batch_size, output_type="pt").cells)
    torch.testing.assert_close(*cells, atol=1e-4, rtol=1e-4)


def test_recorded_seed_reproduces_the_cells(program_pipe):
    cells = program_pipe(num_cells=5).cells
    assert program_pipe(num_cells=5).cells.uns["wbdit"]["seed"] != cells.uns["wbdit"]["seed"]
    again = program_pipe(num_cells=5, generator=seeded(cells.uns["wbdit"]["seed"])).cells
    assert (again.X != cells.X).nnz == 0 and again.uns["wbdit"] == cells.uns["wbdit"]

    cells = program_pipe(generator=[seeded(i) for i in (3, 2**63)], batch_size=1).cells
    assert cells.uns["wbdit"]["seed"].tolist() == [3, 2**63]

    generator = seeded()
    assert program_pipe(num_cells=5, generator=generator).cells.uns["wbdit"]["seed"] == 0
    assert "seed" not in program_pipe(num_cells=5, generator=generator).cells.uns["wbdit"]
    assert "seed" not in program_pipe(generator=[seeded(), generator]).cells.uns["wbdit"]


def test_a_list_of_generators_gives_the_cells_of_single_calls(pipe):
    names = ["CD34+", "Dendritic", "CD34+"]
    together = pipe(cell_types=names, generator=[seeded(i) for i in range(3)], output_type="pt").cells
    for i in range(3):
        alone = pipe(cell_types=names[i], generator=seeded(i), output_type="pt").cells
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_latents_replace_the_initial_noise(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    latents = torch.randn(5, 766, generator=seeded(3))
    arguments = {"num_cells": 5, "cell_types": "CD34+", "conditions": {"phase": "S"}, "output_type": "latent"}
    first = pipe(**arguments, latents=latents, generator=seeded(0)).cells
    second = pipe(**arguments, latents=latents, generator=seeded(1), batch_size=2).cells
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(pipe(**arguments, latents=latents.flip(0)).cells, first)


def test_program_space_batch_size_never_changes_the_cells(program_pipe):
    expected = program_pipe(num_cells=100, generator=seeded(), guidance_scale=2.0).cells
    for batch_size in (1, 37, 64, 90):
        cells = program_pipe(num_cells=100, generator=seeded(), guidance_scale=2.0, batch_size=batch_size).cells
        assert (cells.obs["cell_type"] == expected.obs["cell_type"]).all()
        # A rate that differs in its last digit may, rarely, change a count.
        assert (cells.X != expected.X).nnz <= 1e-3 * expected.X.nnz


@pytest.mark.parametrize("codec", ["program", "expression"])
@pytest.mark.parametrize("offload", ["model", "group"])
def test_offloading_does_not_change_the_cells(pbmc, codec, offload):
    """The hooks of a GPU's offloading, on the CPU: each model is fetched before it is used, whatever its method."""
    pipe = make_pipeline(pbmc, codec=codec, label_keys=["cell_type", "phase"])
    arguments = {"num_cells": 30, "guidance_scale": 1.5}
    expected = pipe(**arguments, generator=seeded()).cells
    if offload == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        cpu = torch.device("cpu")
        pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    cells = pipe(**arguments, generator=seeded()).cells
    assert (cells.X != expected.X).nnz == 0
    assert list(cells.obs["cell_type"]) == list(expected.obs["cell_type"])
