"""Every model: saved as safetensors, loaded whole, in any dtype, or not at all."""

import pytest
import torch
from accelerate import init_empty_weights
from conftest import randomize
from safetensors.torch import load_file, save_file

from wbdit_diffusers import ExpressionCodec, GaussianMixtureDenoiser, ProgramCodec, WhiteBoxDiTModel


SMALL = {"sample_size": 45, "patch_size": 10, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
MODELS = {
    "default": lambda: WhiteBoxDiTModel(condition_sizes=(3, 2)),
    "published": lambda: WhiteBoxDiTModel(**SMALL, block_type="white_box"),
    "dit": lambda: WhiteBoxDiTModel(**SMALL, block_type="dit"),
    "counts": lambda: ProgramCodec(num_genes=20, num_programs=3, hidden_size=8, condition_sizes=(4,)),
    "log_values": lambda: ProgramCodec(num_genes=20, num_programs=3, likelihood="quantile_hurdle", num_levels=5),
    "expression": lambda: ExpressionCodec(num_genes=20),
    "closed_form": lambda: GaussianMixtureDenoiser(sample_size=5, num_components=4, condition_sizes=(3,)),
}


@pytest.fixture(params=MODELS)
def model(request) -> torch.nn.Module:
    return randomize(MODELS[request.param]()).eval()


@pytest.mark.parametrize(
    "options", [{}, {"variant": "fp16"}, {"max_shard_size": "4KB"}, {"safe_serialization": False}]
)
def test_save_and_load(model, options, tmp_path):
    model.save_pretrained(tmp_path, **options)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
    loaded = type(model).from_pretrained(tmp_path, variant=options.get("variant"))
    assert not loaded.training and loaded.device.type == "cpu" and loaded.dtype == torch.float32
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], values) for name, values in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model, dtype, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype and torch.get_default_dtype() == torch.float32
    for name, values in model.state_dict().items():
        expected = values.to(dtype) if values.is_floating_point() else values
        assert torch.equal(loaded.state_dict()[name], expected)


def test_models_are_built_without_memory(model):
    with init_empty_weights():
        empty = type(model).from_config(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda weights: weights.pop("pos_embed"), "don't match its config.json: missing keys \\['pos_embed'\\]"),
        (lambda weights: weights.update(other=torch.ones(1)), "unexpected keys \\['other'\\]"),
        (lambda weights: weights.update(pos_embed=torch.ones(2, 3)), "pos_embed"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_damaged_weights_are_refused(damage, message, tmp_path):
    MODELS["published"]().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    damage(weights)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises((OSError, ValueError), match=message):
        WhiteBoxDiTModel.from_pretrained(tmp_path)


def test_pickles_and_files_that_are_cut_off_are_not_loaded(tmp_path):
    model = MODELS["published"]()
    model.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(OSError, match="diffusion_pytorch_model.safetensors"):
        WhiteBoxDiTModel.from_pretrained(tmp_path)
    path.unlink()
    torch.save(model.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model.safetensors"):
        WhiteBoxDiTModel.from_pretrained(tmp_path, use_safetensors=False)
