import copy
from pathlib import Path

import pytest
import torch
from conftest import randomize
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel

from wbdit_diffusers import WhiteBoxDiTModel
from wbdit_diffusers.interpretation.layers import coding_rate, subspaces_of
from wbdit_diffusers.models.transformer_white_box_dit import BoundedISTA, Contraction, DescentBlock
from wbdit_diffusers.training.config import TrainingConfig


BLOCK_TYPES = ["white_box", "descent", "dit"]


def make_model(block_type="white_box", **kwargs) -> WhiteBoxDiTModel:
    config = {
        "sample_size": 45,
        "patch_size": 10,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "block_type": block_type,
        "condition_sizes": (3, 2),
        **kwargs,
    }
    return randomize(WhiteBoxDiTModel(**config), std=0.2)


def make_inputs(batch_size=5, sample_size=45) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch_size, sample_size, generator=generator),
        "timestep": torch.randint(1, 1000, (batch_size,), generator=generator),
        "class_labels": torch.stack([torch.arange(batch_size) % 3, torch.arange(batch_size) % 2], dim=1),
    }


PUBLISHED = {"patch_size": 10, "num_layers": 3, "num_attention_heads": 8, "attention_head_dim": 96}


@pytest.mark.parametrize("block_type, num_parameters", [("white_box", 17_926_666), ("dit", 33_870_346)])
def test_number_of_parameters_at_the_published_shape(block_type, num_parameters):
    with torch.device("meta"):
        model = WhiteBoxDiTModel(sample_size=2000, **PUBLISHED, block_type=block_type)
    assert model.num_parameters() == num_parameters


def test_defaults_are_those_of_a_training():
    config, trained = WhiteBoxDiTModel().config, TrainingConfig(output_dir=Path("model"))
    shape = ("patch_size", "num_layers", "num_attention_heads", "attention_head_dim")
    for name in ("block_type", "condition_dropout", *shape):
        assert config[name] == getattr(trained, name)
    assert config.sample_size == 17  # 16 programs and the library size


# ==================== As a Diffusers model ====================


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
@torch.no_grad()
def test_the_output_is_the_same_again_as_a_tuple_and_after_loading(block_type, tmp_path):
    model = make_model(block_type).eval()
    expected = model(**make_inputs()).sample
    (again,) = model(**make_inputs(), return_dict=False)
    assert torch.equal(again, expected)
    model.save_pretrained(tmp_path)
    loaded = WhiteBoxDiTModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**make_inputs()).sample, expected)  # memory layout may change the last bit


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
@torch.no_grad()
def test_bfloat16_gives_what_float32_gives(block_type):
    model, inputs = make_model(block_type).eval(), make_inputs()
    expected = model(**inputs).sample
    inputs["hidden_states"] = inputs["hidden_states"].bfloat16()
    output = model.to(torch.bfloat16)(**inputs).sample.float()
    assert 0 < (output - expected).norm() / expected.norm() < 0.02


@torch.no_grad()
def test_labels_by_index_are_labels_by_cell():
    model, inputs = make_model().eval(), make_inputs()
    combinations, label_index = inputs["class_labels"].unique(dim=0, return_inverse=True)
    by_cell = model(inputs["hidden_states"], 300, inputs["class_labels"]).sample
    by_index = model(inputs["hidden_states"], 300, combinations, label_index=label_index).sample
    torch.testing.assert_close(by_index, by_cell)


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_gradient_checkpointing_gives_the_same_gradients(block_type):
    gradients = []
    for enable in (False, True):
        model = make_model(block_type, condition_dropout=0.0).train()
        if enable:
            model.enable_gradient_checkpointing()
        assert model.is_gradient_checkpointing == enable
        model(**make_inputs()).sample.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(gradient is not None for gradient in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trains_with_ema_and_mixed_precision(block_type, dtype):
    model = make_model(block_type).train()
    ema = EMAModel(model.parameters())
    with torch.autocast("cpu", dtype=dtype):
        loss = model(**make_inputs()).sample.float().square().mean()
    loss.backward()
    ema.step(model.parameters())
    assert torch.isfinite(loss)


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
@torch.no_grad()
def test_attention_processors(block_type):
    model = make_model(block_type).eval()
    assert set(model.attn_processors) == {"blocks.0.attn.processor", "blocks.1.attn.processor"}
    expected = model(**make_inputs()).sample

    class Doubled(type(next(iter(model.attn_processors.values())))):
        def __call__(self, attn, hidden_states):
            return 2 * super().__call__(attn, hidden_states)

    original = dict(model.attn_processors)
    model.set_attn_processor(Doubled())
    assert not torch.allclose(model(**make_inputs()).sample, expected)
    model.set_attn_processor(original)
    torch.testing.assert_close(model(**make_inputs()).sample, expected)
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor({"blocks.0.attn.processor": AttnProcessor()})

    model.fuse_qkv_projections()  # nothing to fuse, nothing may change
    torch.testing.assert_close(model(**make_inputs()).sample, expected)
    model.set_attention_backend("native")
    torch.testing.assert_close(model(**make_inputs()).sample, expected)


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_regional_compilation_finds_the_blocks(block_type):
    model = make_model(block_type)
    model.compile_repeated_blocks(backend="eager")
    assert all(block._compiled_call_impl is not None for block in model.blocks)
    torch.testing.assert_close(
        model.eval()(**make_inputs()).sample, make_model(block_type).eval()(**make_inputs()).sample
    )


# ==================== Inputs ====================


@torch.no_grad()
def test_one_timestep_for_all_cells_equals_one_per_cell():
    model, inputs = make_model().eval(), make_inputs()
    inputs["timestep"] = 7
    expected = model(**inputs).sample
    for timestep in (torch.tensor(7), torch.full((5,), 7)):
        inputs["timestep"] = timestep
        torch.testing.assert_close(model(**inputs).sample, expected)


@torch.no_grad()
def test_conditions_change_the_output_and_null_labels_are_no_labels():
    model, inputs = make_model().eval(), make_inputs()
    labelled = model(**inputs).sample
    for attribute in range(2):
        changed = copy.deepcopy(inputs)
        changed["class_labels"][:, attribute] = (changed["class_labels"][:, attribute] + 1) % 2
        assert not torch.allclose(model(**changed).sample, labelled)
    unlabelled = model(**{**inputs, "class_labels": None}).sample
    assert not torch.allclose(unlabelled, labelled)
    null_labels = torch.tensor([3, 2]).expand(5, 2)
    torch.testing.assert_close(model(**{**inputs, "class_labels": null_labels}).sample, unlabelled)


@torch.no_grad()
def test_labels_are_dropped_in_training_only():
    model, inputs = make_model(condition_dropout=1.0), make_inputs()
    unlabelled = model.eval()(**{**inputs, "class_labels": None}).sample
    assert not torch.allclose(model.eval()(**inputs).sample, unlabelled)
    torch.testing.assert_close(model.train()(**inputs).sample, unlabelled)


def test_wrong_inputs_are_named():
    model, inputs = make_model(), make_inputs()
    with pytest.raises(ValueError, match="44 values per cell, but the model has 45"):
        model(torch.randn(2, 44), 1)
    with pytest.raises(ValueError, match="1 labels per cell.*2 label keys"):
        model(**{**inputs, "class_labels": torch.zeros(5, dtype=torch.long)})
    with pytest.raises(ValueError, match="unconditional"):
        make_model(condition_sizes=())(**inputs)
    with pytest.raises(ValueError, match="must be one of white_box, descent, dit, not 'unet'"):
        make_model(block_type="unet")


# ==================== The block whose steps descend ====================


@torch.no_grad()
def test_the_descent_block_is_its_equations():
    def bound(matrix: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvalsh(matrix.T @ matrix).pow(16).sum() ** (1 / 16)

    block = randomize(DescentBlock(12, heads=3), std=0.5).double()
    x, temb = torch.randn(2, 5, 12, dtype=torch.double), torch.randn(2, 12, dtype=torch.double)
    expected = []
    for tokens, shift, gates in zip(x, *(block.modulation(temb).split([12, 2], dim=1))):
        gate_attn, gate_ff = 1 / (1 + torch.exp(1 - gates))
        y = tokens + shift
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
        step, norm = torch.zeros_like(y), bound(block.attn.subspaces)
        for basis in block.attn.subspaces.unflatten(0, (3, 4)):
            w = y @ basis.T
            weights = torch.exp(w @ w.T / 2)
            step += (weights / weights.sum(1, keepdim=True) @ w - w) @ basis / norm
        y = y + gate_attn * step
        dictionary, code = block.ff.dictionary, y.clamp(min=0)
        eta = 1 / bound(dictionary)
        code = code + eta * (y - code @ dictionary.T) @ dictionary - eta * block.ff.log_lambda.exp()
        expected.append((1 - gate_ff) * y + gate_ff * code.clamp(min=0))
    torch.testing.assert_close(block(x, temb), torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("std", [0.01, 0.3, 10.0])
@torch.no_grad()
def test_sparse_coding_descends_whatever_the_dictionary(std):
    ista = randomize(BoundedISTA(24), std=std)
    curvature = ista.step_size * torch.linalg.matrix_norm(ista.dictionary, 2) ** 2
    assert 0.5 < curvature <= 1 + 1e-5
    x = torch.randn(100, 24)

    def objective(code: torch.Tensor) -> torch.Tensor:
        return 0.5 * (x - code @ ista.dictionary.T).square().sum(1) + ista.lambd * code.sum(1)

    assert (objective(ista(x)) <= objective(x.relu()) * (1 + 1e-6)).all()
    assert (ista(x) >= 0).all() and (ista(x) == 0).float().mean() > 0.2


@torch.no_grad()
def test_contraction_lowers_the_coding_rate_at_any_gate():
    torch.manual_seed(0)
    attn, x = Contraction(24, heads=4), torch.randn(50, 9, 24)
    subspaces = subspaces_of(attn)
    rates = torch.stack([coding_rate(x + gate * attn(x), subspaces) for gate in (0.0, 0.1, 0.3, 1.0)])
    assert (rates.diff(dim=0) < 0).all()  # for every cell
    alike = x[:, :1].expand(-1, 9, -1)
    torch.testing.assert_close(attn(alike), torch.zeros_like(alike))  # tokens that are alike stay as they are


@torch.no_grad()
def test_tokens_of_the_descent_block_have_projections_of_their_own():
    model = make_model("descent", patch_size=1, condition_sizes=())
    assert model.num_tokens == 45
    model.proj_in.weight[7].zero_()
    x = make_inputs()["hidden_states"]
    changed, elsewhere = x.clone(), x.clone()
    changed[:, 7] += 1
    elsewhere[:, 8] += 1
    assert torch.equal(model(changed, 300).sample, model(x, 300).sample)
    assert not torch.equal(model(elsewhere, 300).sample, model(x, 300).sample)
