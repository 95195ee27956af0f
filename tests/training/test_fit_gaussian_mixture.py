"""The Gaussian mixture that teaches the denoiser."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny import tiny_config

from wbdit_diffusers import ProgramCodec
from wbdit_diffusers.data.latents import Latents
from wbdit_diffusers.training import gaussian_mixture as module
from wbdit_diffusers.training import train
from wbdit_diffusers.training.gaussian_mixture import fit_gaussian_mixture, prepare_gaussian_mixture


@pytest.fixture
def latents() -> Latents:
    """990 cells of one label, around 1, and 10 of another, around -5."""
    labels = (torch.arange(1000) % 100 == 0).long()[:, None]
    noise = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    return Latents(torch.where(labels == 1, -5.0, 1.0) + 0.1 * noise, labels, (2,))


def test_a_rare_label_has_a_component_and_its_own_weight(latents, monkeypatch):
    monkeypatch.setattr(module, "MAX_CELLS", 40)
    known, combinations = np.array([[0], [1]]), latents.class_labels[:, 0].numpy()
    for seed in range(3):
        mixture = fit_gaussian_mixture(latents, known, combinations, max_components=1, seed=seed)
        assert mixture.component_labels.tolist() == [[0], [1]]
        torch.testing.assert_close(mixture.means[1], torch.full((3,), -5.0), atol=0.2, rtol=0)
        torch.testing.assert_close(mixture.log_weights.exp(), torch.tensor([0.99, 0.01]), atol=1e-5, rtol=0)


def test_too_many_combinations_of_labels_have_no_mixture(latents, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "MAX_SIZE", 17)  # 2 labels of 3 x 3 features would be 18
    inputs = tiny_config(tmp_path), Accelerator(), latents, ProgramCodec(10, 3), tmp_path
    assert prepare_gaussian_mixture(*inputs) is None
    assert "No Gaussian mixture: 2 combinations of labels" in caplog.text


@pytest.mark.parametrize("share, said", [(0.0, "none"), (0.5, "1 to 0.5")])
def test_the_card_says_what_the_network_learned_from(share, said, pbmc, tmp_path):
    train(pbmc, tiny_config(tmp_path, mixture_share=share, max_train_steps=2))
    assert (tmp_path / "stage_one" / "gaussian_mixture").is_dir() == (share > 0)
    facts = json.loads((tmp_path / "training.json").read_text())
    assert said in json.dumps(facts) and said in (tmp_path / "README.md").read_text()
