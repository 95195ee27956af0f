"""The closed form that the denoiser learns from at first."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny import tiny_config

from wbdit_diffusers.data import CellDataset
from wbdit_diffusers.training import mixture as module
from wbdit_diffusers.training import train
from wbdit_diffusers.training.mixture import fit_mixture, prepare_mixture, share_of_mixture


class Latents(CellDataset):
    """Cells that have latents already."""

    def __init__(self, latents: torch.Tensor, class_labels: torch.Tensor, condition_sizes: tuple[int, ...]):
        self.latents, self.class_labels, self.condition_sizes = latents, class_labels, condition_sizes
        self.codec = SimpleNamespace(num_features=latents.shape[1])

    def __len__(self) -> int:
        return len(self.latents)


@pytest.fixture
def cells() -> Latents:
    """990 cells of one label, around 1, and 10 of another, around -5."""
    labels = (torch.arange(1000) % 100 == 0).long()[:, None]
    noise = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    return Latents(torch.where(labels == 1, -5.0, 1.0) + 0.1 * noise, labels, (2,))


def test_a_rare_label_has_a_component_and_its_own_weight(cells, monkeypatch):
    monkeypatch.setattr(module, "MAX_CELLS", 40)
    for seed in range(3):
        mixture = fit_mixture(cells, [[0], [1]], cells.class_labels[:, 0].numpy(), max_components=1, seed=seed)
        assert mixture.component_labels.tolist() == [[0], [1]]
        torch.testing.assert_close(mixture.means[1], torch.full((3,), -5.0), atol=0.2, rtol=0)
        torch.testing.assert_close(mixture.log_weights.exp(), torch.tensor([0.99, 0.01]), atol=1e-5, rtol=0)


def test_a_run_keeps_its_mixture(cells, tmp_path):
    config = tiny_config(tmp_path)
    first = prepare_mixture(config, Accelerator(), cells, tmp_path / "stage_one")
    cells.latents = cells.latents + 1  # what a fit would see now
    again = prepare_mixture(config, Accelerator(), cells, tmp_path / "stage_one")
    torch.testing.assert_close(first.means, again.means, atol=0, rtol=0)
    (tmp_path / "stage_one" / "mixture" / "config.json").write_text("{")
    with pytest.raises(OSError, match="mixture is damaged: train again, with --overwrite_output_dir"):
        prepare_mixture(config, Accelerator(), cells, tmp_path / "stage_one")


def test_too_many_labels_are_said_and_have_none(cells, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "MAX_SIZE", 17)  # 2 labels of 3 x 3 values would be 18
    assert prepare_mixture(tiny_config(tmp_path), Accelerator(), cells, tmp_path) is None
    assert "--mixture_share 0.3: the labels have 2 combinations" in caplog.text


def test_the_share_falls_with_the_training(tmp_path):
    config = tiny_config(tmp_path, mixture_share=0.2)
    np.testing.assert_allclose([share_of_mixture(config, progress) for progress in (0, 0.5, 1)], [1, 0.6, 0.2])


@pytest.mark.parametrize("share, said", [(0.0, "none"), (0.5, "1 to 0.5")])
def test_the_card_says_what_was_learned_from(share, said, pbmc, tmp_path):
    train(pbmc, tiny_config(tmp_path, mixture_share=share, max_train_steps=2))
    assert (tmp_path / "stage_one" / "mixture").is_dir() == (share > 0)
    facts = json.loads((tmp_path / "training.json").read_text())
    assert said in json.dumps(facts) and said in (tmp_path / "README.md").read_text()
