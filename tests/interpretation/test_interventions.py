"""A held program: its value is met, other programs follow as they do in cells, and impossible requests are refused."""

import numpy as np
import pytest
import torch
from conftest import make_pipeline

from wbdit_diffusers import GaussianMixtureDenoiser, ScRNAGenerationPipeline
from wbdit_diffusers.interpretation import fit_gaussian_mixture, hold_direction, hold_program, program_direction
from wbdit_diffusers.interpretation.interventions import with_denoiser
from wbdit_diffusers.sampling import Conditions, make_scheduler, to_clean, training_scheduler


NO_LABELS = Conditions({}, torch.zeros(40, dtype=torch.long))


@pytest.fixture(scope="module")
def trained(pbmc) -> tuple[ScRNAGenerationPipeline, GaussianMixtureDenoiser]:
    """A pipeline whose network is the closed form of one Gaussian: the result of a perfect training."""
    pipe = make_pipeline(pbmc, codec="program")
    pipe.scheduler = make_scheduler("dpmsolver++", training_scheduler("v_prediction").config)
    gaussian_mixture = fit_gaussian_mixture(pipe, pbmc, max_components=1)
    return with_denoiser(pipe, gaussian_mixture), gaussian_mixture


def test_a_held_program_has_its_value_and_the_others_follow(trained, pbmc):
    pipe, gaussian_mixture = trained
    activities = pipe.codec.activities(pipe.encode_cells(pbmc)).numpy()
    centred = activities - activities.mean(axis=0)
    regression = centred.T @ centred[:, 1] / (centred[:, 1] @ centred[:, 1])
    means = []
    for activity in (-1.5, 1.5):
        drawn = pipe(
            num_cells=1500,
            num_inference_steps=20,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            guides=[hold_program(pipe, gaussian_mixture, "program_1", activity)],
        ).cells
        drawn = pipe.codec.activities(drawn).numpy()
        np.testing.assert_allclose(drawn[:, 1], activity, atol=0.15)
        means.append(drawn.mean(axis=0))
    np.testing.assert_allclose((means[1] - means[0]) / 3, regression, atol=0.06)
    assert np.abs(regression).max() > 0.1  # else nothing would have to follow


@pytest.mark.parametrize("max_components", [1, 2])
def test_the_guide_is_exact_for_the_closed_form(max_components, trained, pbmc):
    """Its estimate has the value, and is that of a mixture whose cells all have it."""
    pipe, _ = trained
    gaussian_mixture = fit_gaussian_mixture(pipe, pbmc, max_components=max_components)
    assert gaussian_mixture.config.num_components == max_components
    direction = program_direction(pipe.codec, 0)
    guide = hold_direction(gaussian_mixture, direction, 0.8)
    x = torch.randn(40, gaussian_mixture.config.sample_size, generator=torch.Generator().manual_seed(0))
    for timestep in (50, 400, 950):
        clean = to_clean(gaussian_mixture(x, timestep, return_dict=False)[0], x, timestep, pipe.scheduler)
        guided = guide(clean, x, timestep, NO_LABELS)
        torch.testing.assert_close(guided @ direction, torch.full((40,), 0.8), atol=1e-3, rtol=0)
        means, _, log_weights = gaussian_mixture.given(guide.precision, guide.shift, None, x, timestep)
        exact = (log_weights.exp()[..., None] * means).sum(1).float()
        torch.testing.assert_close(guided, exact, atol=0.02, rtol=0)


def test_labels_and_programs_can_be_asked_for_together(program_pipe, pbmc):
    guide = hold_program(program_pipe, fit_gaussian_mixture(program_pipe, pbmc), 2, 1.0)
    generator = torch.Generator().manual_seed(0)
    cells = program_pipe(num_cells=6, cell_types="Dendritic", generator=generator, guides=[guide]).cells
    np.testing.assert_allclose(cells.obsm["X_programs"][:, 2], 1.0, atol=1e-3)
    assert list(cells.obs["cell_type"]) == ["Dendritic"] * 6


def test_impossible_requests_are_refused(program_pipe, pipe, pbmc):
    gaussian_mixture = fit_gaussian_mixture(program_pipe, pbmc)
    with pytest.raises(ValueError, match="There is no 'program_6': the model has program_0 to program_5"):
        hold_program(program_pipe, gaussian_mixture, "program_6", 1.0)
    with pytest.raises(ValueError, match="no gene programs: it was trained with ExpressionCodec"):
        hold_program(pipe, gaussian_mixture, 0, 1.0)
