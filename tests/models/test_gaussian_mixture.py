"""The closed-form denoiser against brute force, and in a pipeline."""

import copy

import numpy as np
import pytest
import torch

from wbdit_diffusers import GaussianMixtureDenoiser, ScRNAGenerationPipeline
from wbdit_diffusers.sampling import make_scheduler, training_scheduler


SCHEDULER = training_scheduler("v_prediction")


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    """2,000 cells of three kinds, one of which has two parts, in five dimensions."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (2000, 1), generator=generator)
    part = torch.where(labels[:, 0] == 2, torch.randint(2, (2000,), generator=generator), 0)
    shift = torch.randn(4, 5, generator=generator) * 2
    mix = torch.randn(4, 5, 5, generator=generator) * 0.5
    kind = labels[:, 0] + part
    latents = shift[kind] + torch.einsum("bd,bde->be", torch.randn(2000, 5, generator=generator), mix[kind])
    return (latents - latents.mean(0)) / latents.std(0), labels


@pytest.fixture(scope="module")
def denoiser(data) -> GaussianMixtureDenoiser:
    return GaussianMixtureDenoiser.fit(*data, condition_sizes=(3,), noise_scheduler=SCHEDULER)


def draw(denoiser, class_labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Latents `(cells, sample_size)` given labels `(cells, num_label_keys)`, without denoising."""
    log_weights = denoiser.log_weights + denoiser._mask(class_labels, len(class_labels))
    component = torch.multinomial(log_weights.softmax(-1), 1, generator=generator)[:, 0]
    noise = torch.randn(len(component), denoiser.config.sample_size, generator=generator)
    scaled = denoiser.variances[component].sqrt() * noise
    return denoiser.means[component] + torch.einsum("bd,bed->be", scaled, denoiser.directions[component])


def velocity_by_sampling(denoiser, x, timestep, labels, number: int = 400_000) -> torch.Tensor:
    """The mean velocity of clean cells drawn from the mixture, weighted by the likelihood of `x`."""
    clean = draw(denoiser, labels.expand(number, -1), torch.Generator().manual_seed(1)).double()
    a = SCHEDULER.alphas_cumprod[timestep].double().sqrt()
    s = (1 - a**2).sqrt()
    weight = (-0.5 * ((x.double() - a * clean) / s).square().sum(1)).softmax(0)[:, None]
    expected = (weight * clean).sum(0)
    return (a * x.double() - expected) / s  # v = a ε - s x₀ with ε = (x - a x₀) / s


@pytest.mark.parametrize("timestep", [150, 400, 700, 999])
@pytest.mark.parametrize("label", [0, 2, 3])  # 3 is the null label
def test_the_closed_form_is_what_brute_force_gives(timestep, label, denoiser, data):
    generator = torch.Generator().manual_seed(timestep)
    clean = data[0][data[1][:, 0] == min(label, 2)][:1]
    noise = torch.randn(clean.shape, generator=generator)
    x = SCHEDULER.add_noise(clean, noise, torch.tensor([timestep]))
    labels = torch.tensor([[label]])
    v = denoiser(x, timestep, labels, return_dict=False)[0][0]
    torch.testing.assert_close(v.double(), velocity_by_sampling(denoiser, x[0], timestep, labels), atol=0.03, rtol=0)


def test_labels_are_given_by_cell_or_by_combination(denoiser, data):
    x, labels = data[0][:50], data[1][:50]
    timesteps = torch.arange(50) * 20
    v = denoiser(x, timesteps, labels).sample
    for cell in (0, 17):
        one = denoiser(x[cell : cell + 1], timesteps[cell], labels[cell]).sample
        torch.testing.assert_close(one[0], v[cell])
    combinations, index = labels.unique(dim=0, return_inverse=True)
    torch.testing.assert_close(
        denoiser(x, 300, combinations, label_index=index).sample, denoiser(x, 300, labels).sample
    )
    null = torch.full_like(labels, 3)
    torch.testing.assert_close(denoiser(x, 300, null).sample, denoiser(x, 300).sample)


def test_the_part_that_no_label_names_is_found(denoiser):
    assert denoiser.component_labels[:, 0].tolist() == [0, 1, 2, 2]


def likelihood(direction: torch.Tensor, value: float, precision: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of cells whose product with a direction was measured."""
    return precision * torch.outer(direction, direction)[None], precision * value * direction[None]


def test_a_held_value_leaves_the_rest_as_it_is_in_such_cells(denoiser):
    generator, direction = torch.Generator().manual_seed(2), torch.tensor([1.0, 0.5, 0.0, 0.0, -0.5])
    cells = draw(denoiser, torch.full((400_000, 1), 3), generator)
    near = cells[(cells @ direction - 0.7).abs() < 0.02]
    means, labels, log_weights = denoiser.given(*likelihood(direction, 0.7, 1e6))
    np.testing.assert_allclose(means[0] @ direction.double(), 0.7, atol=1e-3)
    torch.testing.assert_close(log_weights.exp()[0] @ means[0], near.double().mean(0), atol=0.06, rtol=0)
    assert labels.tolist() == denoiser.component_labels.tolist()


@pytest.mark.parametrize("timestep", [200, 600])
def test_a_likelihood_and_a_noisy_cell_are_combined(timestep, denoiser, data):
    """Against a weighted sample: clean cells by their likelihood and by the noise that is needed."""
    generator, direction = torch.Generator().manual_seed(3), torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0])
    cells = draw(denoiser, torch.full((400_000, 1), 2), generator).double()
    a = SCHEDULER.alphas_cumprod[timestep].sqrt().double()
    noisy = data[0][data[1][:, 0] == 2][:1]
    log_weights = (
        -0.5 * ((noisy - a * cells) ** 2).sum(1) / (1 - a**2) - 0.5 * 4.0 * (cells @ direction.double() - 0.3) ** 2
    )
    expected = log_weights.softmax(0) @ cells
    means, _, of_components = denoiser.given(*likelihood(direction, 0.3, 4.0), torch.tensor([2]), noisy, timestep)
    torch.testing.assert_close(of_components.exp()[0] @ means[0], expected, atol=0.05, rtol=0)


def test_a_better_estimate_moves_the_components(denoiser, data):
    nothing = torch.zeros(1, 5, 5), torch.zeros(1, 5)
    clean = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    means, _, log_weights = denoiser.given(*nothing, None, data[0][:6], 500, clean)
    torch.testing.assert_close((log_weights.exp()[..., None] * means).sum(1), clean.double(), atol=1e-5, rtol=0)


def test_it_denoises_in_a_pipeline_and_is_saved(program_pipe, pbmc, tmp_path):
    latents, labels = program_pipe.encode_cells(pbmc), program_pipe.processor.encode_labels(pbmc)
    sizes = program_pipe.processor.condition_sizes
    denoiser = GaussianMixtureDenoiser.fit(latents, labels, sizes, SCHEDULER, max_components=2)
    scheduler = make_scheduler("dpmsolver++", SCHEDULER.config)
    pipe = ScRNAGenerationPipeline(**{**program_pipe.components, "denoiser": denoiser, "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    loaded = ScRNAGenerationPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    call = {"num_cells": 600, "cell_types": "Dendritic", "output_type": "latent", "num_inference_steps": 20}
    drawn = loaded(**call, generator=torch.Generator().manual_seed(0)).cells
    torch.testing.assert_close(drawn, pipe(**call, generator=torch.Generator().manual_seed(0)).cells)
    own = latents[(pbmc.obs["cell_type"] == "Dendritic").to_numpy()]
    torch.testing.assert_close(drawn.mean(0), own.mean(0), atol=0.2, rtol=0)
    assert 0.85 < (drawn.var(0) / own.var(0)).mean() < 1.15


def test_a_scheduler_that_takes_noise_is_refused(data):
    with pytest.raises(ValueError, match="use prediction_type='v_prediction'"):
        GaussianMixtureDenoiser.fit(*data, condition_sizes=(3,), noise_scheduler=training_scheduler("epsilon"))


# ==================== How many components ====================


def test_many_cells_of_many_kinds_have_a_component_each():
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(6, (3000,), generator=generator)
    latents = 3 * torch.randn(6, 4, generator=generator)[kind] + 0.5 * torch.randn(3000, 4, generator=generator)
    nothing = torch.zeros(3000, 0, dtype=torch.long)
    assert GaussianMixtureDenoiser.fit(latents, nothing, (), SCHEDULER).config.num_components == 6
    assert GaussianMixtureDenoiser.fit(latents, nothing, (), SCHEDULER, max_components=4).config.num_components == 4
    one = torch.randn(3000, 4, generator=generator)
    assert GaussianMixtureDenoiser.fit(one, nothing, (), SCHEDULER).config.num_components == 1


def test_cells_that_are_alike_can_be_fitted():
    latents = torch.cat([torch.zeros(40, 9), torch.randn(60, 9, generator=torch.Generator().manual_seed(0))])
    labels = (torch.arange(100) >= 40).long()[:, None]
    mixture = GaussianMixtureDenoiser.fit(latents, labels, (2,), SCHEDULER)
    assert all(torch.isfinite(values).all() for values in mixture.state_dict().values())


def test_half_precision_changes_little(data, denoiser):
    half = copy.deepcopy(denoiser).to(torch.bfloat16)
    x, labels = data[0][:50], data[1][:50]
    for timestep in (50, 500):
        whole = denoiser(x, timestep, labels).sample
        torch.testing.assert_close(half(x, timestep, labels).sample, whole, atol=0.1, rtol=0)
