"""A held program: its value is met, the others follow as they do in cells, and what can't be held is refused."""

import numpy as np
import pytest
import torch
from conftest import make_pipeline

from wbdit_diffusers import GaussianMixtureDenoiser, ScRNAGenerationPipeline
from wbdit_diffusers.interpretation import fit_mixture, hold_program, program_direction
from wbdit_diffusers.interpretation.interventions import HeldDenoiser
from wbdit_diffusers.sampling import make_scheduler, training_scheduler


@pytest.fixture(scope="module")
def trained(pbmc) -> tuple[ScRNAGenerationPipeline, GaussianMixtureDenoiser]:
    """A pipeline whose network is a Gaussian's closed form: what a perfect training would end with."""
    pipe = make_pipeline(pbmc, codec="program")
    pipe.scheduler = make_scheduler("dpmsolver++", training_scheduler("v_prediction").config)
    return pipe, fit_mixture(pipe, pbmc, max_components=1)


def held_as_networks_are(pipe, mixture, activity: float) -> ScRNAGenerationPipeline:
    """The way that is taken for a network, with the closed form in the network's place."""
    denoiser = HeldDenoiser(mixture, mixture, program_direction(pipe.codec, 1), activity)
    held = ScRNAGenerationPipeline(**{**pipe.components, "denoiser": denoiser}, num_inference_steps=20)
    held.set_progress_bar_config(disable=True)
    return held


@pytest.mark.parametrize("way", ["exact", "moved"])
def test_a_held_program_has_its_value_and_the_others_follow(way, trained, pbmc):
    pipe, mixture = trained
    activities = pipe.codec.activities(pipe.encode_cells(pbmc)).numpy()
    centred = activities - activities.mean(axis=0)
    regression = centred.T @ centred[:, 1] / (centred[:, 1] @ centred[:, 1])
    means = []
    for activity in (-1.5, 1.5):
        if way == "exact":
            closed = ScRNAGenerationPipeline(**{**pipe.components, "denoiser": mixture}, num_inference_steps=20)
            closed.set_progress_bar_config(disable=True)
            held = hold_program(closed, mixture, "program_1", activity)
        else:
            held = held_as_networks_are(pipe, mixture, activity)
        drawn = held(num_cells=1500, generator=torch.Generator().manual_seed(0), output_type="latent").cells
        drawn = pipe.codec.activities(drawn).numpy()
        np.testing.assert_allclose(drawn[:, 1], activity, atol=0.15)
        means.append(drawn.mean(axis=0))
    slopes = (means[1] - means[0]) / 3
    np.testing.assert_allclose(slopes, regression, atol=0.06)
    assert np.abs(regression).max() > 0.1  # else nothing would have to follow


@pytest.mark.parametrize("max_components", [1, 2])
def test_both_ways_are_one_for_the_closed_form(max_components, trained, pbmc):
    pipe, _ = trained
    mixture = fit_mixture(pipe, pbmc, max_components=max_components)
    assert mixture.config.num_components == max_components
    direction = program_direction(pipe.codec, 0)
    x = torch.randn(40, mixture.config.sample_size, generator=torch.Generator().manual_seed(0))
    for timestep in (50, 400, 950):
        moved = HeldDenoiser(mixture, mixture, direction, 0.8)(x, timestep)[0]
        exact = mixture.conditioned(direction, 0.8)(x, timestep, return_dict=False)[0]
        a, s = mixture.signal_and_noise(timestep, 40)
        torch.testing.assert_close(a * x - s * moved, a * x - s * exact, atol=0.02, rtol=0)


def test_the_pipeline_stays_as_it_is_and_makes_cells_when_held(program_pipe, pbmc):
    denoiser, mixture = program_pipe.denoiser, fit_mixture(program_pipe, pbmc)
    held = hold_program(program_pipe, mixture, 2, 1.0)
    assert program_pipe.denoiser is denoiser
    cells = held(num_cells=6, cell_types="Dendritic", generator=torch.Generator().manual_seed(0)).cells
    np.testing.assert_allclose(cells.obsm["X_programs"][:, 2], 1.0, atol=1e-3)
    assert list(cells.obs["cell_type"]) == ["Dendritic"] * 6


def test_what_cannot_be_held_is_refused(program_pipe, pipe, pbmc):
    mixture = fit_mixture(program_pipe, pbmc)
    with pytest.raises(ValueError, match="There is no 'program_6': the model has program_0 to program_5"):
        hold_program(program_pipe, mixture, "program_6", 1.0)
    with pytest.raises(ValueError, match="no gene programs: it was trained with ExpressionCodec"):
        hold_program(pipe, mixture, 0, 1.0)
    program_pipe.scheduler = training_scheduler("epsilon")
    with pytest.raises(ValueError, match="predicts the velocity"):
        hold_program(program_pipe, mixture, 0, 1.0)
