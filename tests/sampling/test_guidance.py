import pytest
import torch
from conftest import randomize

from wbdit_diffusers import WhiteBoxDiTModel
from wbdit_diffusers.sampling import LabelBatch, predict_guided


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


def test_label_batch_holds_each_combination_once():
    labels = LabelBatch.from_class_labels(CLASS_LABELS, (3, 2), CPU)
    assert torch.equal(labels.combinations[labels.index], CLASS_LABELS)
    assert labels.combinations.tolist() == [[0, 1], [1, 1], [2, 0], [3, 2]]  # the null label last
    assert LabelBatch.from_class_labels(torch.zeros(5, 0, dtype=torch.long), (), CPU) is None


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
    labels = LabelBatch.from_class_labels(CLASS_LABELS, (3, 2), CPU)
    guided = predict_guided(denoiser, latents, timestep, labels, guidance_scale)
    torch.testing.assert_close(
        guided, unconditional + guidance_scale * (conditional - unconditional), atol=1e-5, rtol=1e-4
    )
    assert sizes == [5 if guidance_scale == 1.0 else 10]


@torch.no_grad()
def test_without_labels_the_prediction_is_the_network_s():
    model = WhiteBoxDiTModel(sample_size=4, patch_size=2, num_layers=1, num_attention_heads=2, attention_head_dim=8)
    latents, timestep = torch.randn(5, 4, generator=seeded()), torch.tensor(300)
    predicted = predict_guided(randomize(model).eval(), latents, timestep, None, 1.0)
    torch.testing.assert_close(predicted, model(latents, timestep).sample)
