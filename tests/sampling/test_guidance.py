import pytest
import torch
from conftest import randomize

from wbdit_diffusers import WhiteBoxDiTModel
from wbdit_diffusers.sampling import Conditions, from_clean, predict, to_clean, training_scheduler


CPU = torch.device("cpu")


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def denoiser() -> WhiteBoxDiTModel:
    model = WhiteBoxDiTModel(
        sample_size=4, patch_size=2, num_layers=1, num_attention_heads=2, attention_head_dim=8, condition_sizes=(3, 2)
    )
    return randomize(model, std=0.3).eval()


CLASS_LABELS = torch.tensor([[2, 0], [0, 1], [2, 0], [1, 1], [0, 1]])


def test_conditions_hold_each_combination_once():
    conditions = Conditions.from_class_labels(CLASS_LABELS, (3, 2), CPU)
    assert torch.equal(conditions.class_labels, CLASS_LABELS)
    assert conditions.kwargs["class_labels"].tolist() == [[0, 1], [1, 1], [2, 0]]
    assert conditions.null["class_labels"].tolist() == [[3, 2]]
    unconditional = Conditions.from_class_labels(torch.zeros(5, 0, dtype=torch.long), (), CPU)
    assert unconditional.kwargs == {} and unconditional.class_labels is None


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 1.5, 4.0])
def test_guidance_is_the_formula_in_one_forward(denoiser, monkeypatch, guidance_scale):
    latents, timestep = torch.randn(5, 4, generator=seeded()), torch.tensor(300)
    conditional = denoiser(latents, timestep, CLASS_LABELS).sample
    unconditional = denoiser(latents, timestep).sample
    assert (conditional - unconditional).abs().max() > 0.1
    sizes, forward = [], denoiser.forward
    monkeypatch.setattr(
        denoiser, "forward", lambda *args, **kwargs: sizes.append(len(args[0])) or forward(*args, **kwargs)
    )
    conditions = Conditions.from_class_labels(CLASS_LABELS, (3, 2), CPU)
    guided = predict(denoiser, training_scheduler("epsilon"), latents, timestep, conditions, guidance_scale)
    expected = unconditional + guidance_scale * (conditional - unconditional)
    torch.testing.assert_close(guided, expected, atol=1e-5, rtol=1e-4)
    assert sizes == [5 if guidance_scale == 1.0 else 10]


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_guides_move_the_clean_estimate(denoiser, prediction_type):
    scheduler, timestep = training_scheduler(prediction_type), torch.tensor(300)
    latents, seen = torch.randn(5, 4, generator=seeded()), []
    conditions = Conditions.from_class_labels(CLASS_LABELS, (3, 2), CPU)
    plain = predict(denoiser, scheduler, latents, timestep, conditions)
    clean = to_clean(plain, latents, timestep, scheduler)
    torch.testing.assert_close(from_clean(clean, latents, timestep, scheduler), plain)

    def shift(clean, noisy, timestep, conditions):  # a guide of five lines
        seen.append((noisy, conditions.class_labels))
        clean = clean.clone()
        clean[:, 0] = 3.0
        return clean

    guided = predict(denoiser, scheduler, latents, timestep, conditions, guides=[shift])
    moved = to_clean(guided, latents, timestep, scheduler)
    torch.testing.assert_close(moved[:, 0], torch.full((5,), 3.0))
    torch.testing.assert_close(moved[:, 1:], clean[:, 1:])
    assert torch.equal(seen[0][0], latents) and torch.equal(seen[0][1], CLASS_LABELS)


def test_conversions_are_those_of_the_scheduler():
    clean, noise = torch.randn(5, 4, generator=seeded()), torch.randn(5, 4, generator=seeded(1))
    timesteps = torch.tensor([1, 100, 500, 900, 999])
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        scheduler = training_scheduler(prediction_type)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        output = {"epsilon": noise, "v_prediction": scheduler.get_velocity(clean, noise, timesteps), "sample": clean}[
            prediction_type
        ]
        torch.testing.assert_close(from_clean(clean, noisy, timesteps, scheduler), output, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(to_clean(output, noisy, timesteps, scheduler), clean, atol=2e-3, rtol=1e-3)


@torch.no_grad()
def test_without_labels_the_prediction_is_that_of_the_network():
    model = WhiteBoxDiTModel(sample_size=4, patch_size=2, num_layers=1, num_attention_heads=2, attention_head_dim=8)
    latents, timestep = torch.randn(5, 4, generator=seeded()), torch.tensor(300)
    conditions = Conditions.from_class_labels(torch.zeros(5, 0, dtype=torch.long), (), CPU)
    predicted = predict(randomize(model).eval(), training_scheduler("epsilon"), latents, timestep, conditions)
    torch.testing.assert_close(predicted, model(latents, timestep).sample)
