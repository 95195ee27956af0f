"""The blocks of Modular Diffusers."""

import json

import numpy as np
import pytest
import torch
from conftest import make_pipeline
from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks

from wbdit_diffusers import ScRNAGenerationPipeline
from wbdit_diffusers.hub.remote_code import REQUIREMENTS
from wbdit_diffusers.modular import ScRNABlocks


@pytest.fixture(scope="module")
def folder(pbmc, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline(pbmc, codec="program", label_keys=["cell_type", "phase"]).save_pretrained(folder)
    return folder


def modular(folder, blocks: ModularPipelineBlocks | None = None):
    pipe = (blocks or ScRNABlocks()).init_pipeline(str(folder))
    pipe.load_components()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "call",
    [
        {"num_cells": 150},
        {"num_cells": 70, "cell_types": "Dendritic", "library_size": 500.0, "guidance_scale": 2.0, "batch_size": 33},
        {"cell_types": ["CD34+", "Dendritic"], "conditions": {"phase": "S"}, "num_inference_steps": 3},
        {"num_cells": 5, "latents": torch.randn(5, 7, generator=seeded(1))},
    ],
)
def test_the_same_seed_gives_the_pipeline_s_cells(call, folder):
    pipe = ScRNAGenerationPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(**call, generator=seeded()).cells
    cells = modular(folder)(**call, generator=seeded(), output="cells")
    assert (cells.X != expected.X).nnz == 0
    assert cells.obs.equals(expected.obs) and cells.uns["wbdit"] == expected.uns["wbdit"]
    np.testing.assert_array_equal(cells.obsm["X_programs"], expected.obsm["X_programs"])


def test_an_expression_codec(pbmc, tmp_path):
    pipe = make_pipeline(pbmc, label_keys=["cell_type"])
    pipe.save_pretrained(tmp_path)
    cells = modular(tmp_path)(num_cells=9, generator=seeded(), output="cells")
    assert (cells.X != pipe(num_cells=9, generator=seeded()).cells.X).nnz == 0


class Shift(ModularPipelineBlocks):
    """Sets the first program of all cells, between the two blocks around it."""

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("latents", required=True), InputParam("program_value", default=0.0)]

    def __call__(self, components, state):
        block = self.get_block_state(state)
        block.latents = block.latents.clone()
        block.latents[:, 0] = block.program_value
        self.set_block_state(state, block)
        return components, state


def test_a_block_put_between_changes_the_latents_that_are_decoded(folder):
    blocks = ScRNABlocks()
    blocks.sub_blocks.insert("shift", Shift(), 2)
    pipe = modular(folder, blocks)
    state = pipe(num_cells=20, program_value=2.0, generator=seeded())
    assert (state.get("latents")[:, 0] == 2.0).all()
    plain = modular(folder)(num_cells=20, generator=seeded())
    assert torch.equal(state.get("latents")[:, 1:], plain.get("latents")[:, 1:])
    assert (state.get("cells").X != plain.get("cells").X).nnz > 0


def test_what_is_missing_or_wrong_is_said(folder):
    pipe = ScRNABlocks().init_pipeline(str(folder))
    with pytest.raises(ValueError, match="call `load_components\\(\\)` first"):
        pipe(num_cells=3)
    pipe = modular(folder)
    with pytest.raises(ValueError, match="Did you mean 'Dendritic'"):
        pipe(num_cells=3, cell_types="Dendritik")
    with pytest.raises(ValueError, match="num_inference_steps"):
        pipe(num_cells=3, num_inference_steps=0)


def test_blocks_describe_themselves(tmp_path):
    blocks = ScRNABlocks()
    assert {spec.name for spec in blocks.expected_components} == {"denoiser", "scheduler", "processor", "codec"}
    assert "guidance_scale" in blocks.doc
    assert "cells" in {output.name for output in blocks.outputs}
    blocks.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "modular_config.json").read_text())
    assert config["requirements"] == REQUIREMENTS
