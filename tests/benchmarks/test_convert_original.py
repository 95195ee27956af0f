"""Converted checkpoints of the authors' layout, made by the written-out definition (benchmarks/reference.py)."""

import pytest
import torch
from convert_original import convert
from reference import ReferenceDiT

from wbdit_diffusers import WhiteBoxDiTModel


def make_reference(block_type: str, depth: int, dim: int, num_patches: int) -> ReferenceDiT:
    """With random weights. Its state_dict is a checkpoint in the authors' layout."""
    reference = ReferenceDiT(10 * num_patches, 10, depth, dim, heads=8, block_type=block_type)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name != "pos_embed":
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    return reference


@pytest.mark.parametrize("block_type", ["white_box", "dit"])
@pytest.mark.parametrize("depth", [1, 3, 5])
@torch.no_grad()
def test_converted_checkpoint_equals_the_definition(block_type, depth, tmp_path):
    reference = make_reference(block_type, depth, dim=96, num_patches=20)
    torch.save(reference.state_dict(), tmp_path / "model.pth")
    model = convert(tmp_path / "model.pth")
    assert model.config.block_type == block_type
    assert model.config.num_layers == depth

    x = torch.randn(4, 200, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([1, 10, 500, 999])
    expected = reference.double()(x.double(), t.double())
    output = model(x, t).sample.double()
    assert (output - expected).norm() / expected.norm() < 1e-5


@torch.no_grad()
def test_converted_checkpoint_at_the_published_shape(tmp_path):
    reference = make_reference("white_box", depth=3, dim=768, num_patches=200)
    torch.save(reference.state_dict(), tmp_path / "model.pth")
    model = convert(tmp_path / "model.pth")
    # The file's position table is the one that the model makes itself.
    own_table = WhiteBoxDiTModel(2000, patch_size=10, num_layers=1, attention_head_dim=192).pos_embed
    torch.testing.assert_close(model.pos_embed, own_table, atol=1e-4, rtol=0)
    x, t = torch.randn(1, 2000, generator=torch.Generator().manual_seed(1)), torch.tensor([300])
    expected = reference(x, t)
    assert (model(x, t).sample - expected).norm() / expected.norm() < 1e-5


def test_original_checkpoint_refuses_pickles_and_foreign_files(tmp_path):
    path = tmp_path / "model.pth"
    state_dict = make_reference("white_box", depth=1, dim=32, num_patches=2).state_dict()
    files = [
        ({"model": state_dict, "args": tmp_path}, "Weights only load failed"),
        ({"layer.weight": torch.ones(2)}, "x_embedder.proj.weight"),
        ({**state_dict, "y_embedder.weight": torch.ones(2)}, "y_embedder.weight"),
    ]
    for content, message in files:
        torch.save(content, path)
        with pytest.raises(Exception, match=message):
            convert(path)
