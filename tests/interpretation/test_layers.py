"""Hooks that leave no trace, and measures of steps whose answer is known."""

import numpy as np
import pytest
import torch
from conftest import randomize

from wbdit_diffusers import WhiteBoxDiTModel
from wbdit_diffusers.interpretation import record_blocks
from wbdit_diffusers.interpretation.denoising import add_noise
from wbdit_diffusers.interpretation.layers import (
    coding_rate,
    explained_by_tokens,
    measure_layers,
    step_of_attention,
    step_of_ista,
    subspaces_of,
    untrained_copy,
)
from wbdit_diffusers.models.transformer_white_box_dit import ISTA, MSSA


def test_hooks_record_every_block_and_leave_no_trace(program_pipe):
    denoiser = program_pipe.denoiser
    x, labels = torch.randn(5, denoiser.config.sample_size), torch.zeros(5, 2, dtype=torch.long)
    before = denoiser(x, 300, labels).sample
    with record_blocks(denoiser) as records:
        during = denoiser(x, 300, labels).sample
    assert torch.equal(before, during) and torch.equal(before, denoiser(x, 300, labels).sample)
    assert not any(module._forward_hooks for module in denoiser.modules())
    assert len(records) == 2 and torch.equal(records[0]["output"], records[1]["input"])
    assert records[1]["ff_output"].shape == (5, denoiser.num_tokens, 16)
    recorded = dict(records[0])
    denoiser(x + 1, 300, labels)
    assert all(torch.equal(recorded[name], records[0][name]) for name in recorded)


def test_hooks_are_removed_after_an_error(program_pipe):
    with pytest.raises(ValueError, match="values per cell"):
        with record_blocks(program_pipe.denoiser):
            program_pipe.denoiser(torch.zeros(2, 3), 300)
    assert not any(module._forward_hooks for module in program_pipe.denoiser.modules())


def test_the_coding_rate_is_that_of_the_covariances():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 7, 12, generator=generator, dtype=torch.double)
    subspaces = torch.randn(2, 4, 12, generator=generator, dtype=torch.double)
    expected = torch.zeros(3, dtype=torch.double)
    for basis in subspaces:
        w = tokens @ basis.T  # (3, 7, 4)
        expected += 0.5 * torch.logdet(torch.eye(4) + 4 / (7 * 0.5**2) * w.mT @ w)
    torch.testing.assert_close(coding_rate(tokens, subspaces), expected)


def test_a_step_of_steepest_descent_is_seen_as_one():
    torch.manual_seed(0)
    tokens = torch.randn(6, 5, 12)
    subspaces = subspaces_of(MSSA(12, heads=3))
    free = tokens.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(coding_rate(free, subspaces).sum(), free)
    step = step_of_attention(subspaces, tokens, -0.05 * gradient)
    assert step["cosine"] == pytest.approx(1, abs=1e-4) and step["own"] < -0.01
    up = step_of_attention(subspaces, tokens, 0.05 * gradient)
    assert up["cosine"] == pytest.approx(-1, abs=1e-4) and up["own"] > 0.01


def test_zeros_of_ista_and_of_its_relu():
    torch.manual_seed(0)
    ista, tokens = ISTA(12, step_size=0.1, lambd=0.1), torch.randn(50, 4, 12)
    with torch.no_grad():
        ista.dictionary.copy_(torch.eye(12))  # nothing is left to be explained: a ReLU with a threshold
        step = step_of_ista(ista, tokens, ista(tokens))
    assert step["zeros"] == step["zeros_of_relu"] == pytest.approx((tokens <= 0.01).float().mean().item())
    assert step["curvature"] == pytest.approx(0.1)
    # ReLU and threshold alone: what is above λη is explained as well as before, less the threshold.
    codes = tokens.relu(), (tokens - 0.01).relu()
    before, after = (0.5 * (tokens - code).square().sum() + 0.1 * code.sum() for code in codes)
    assert step["objective"] == pytest.approx((after / before - 1).item(), rel=1e-3) and step["objective"] < 0


def test_what_tokens_say_of_the_clean_cell():
    rng = np.random.default_rng(0)
    clean, noise = rng.normal(size=(2, 4000, 3))
    mixed = (clean + noise) @ rng.normal(size=(3, 8))
    assert explained_by_tokens(mixed, clean) == pytest.approx(0.5, abs=0.03)
    assert explained_by_tokens(rng.normal(size=(4000, 8)), clean) == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("block_type", ["descent", "white_box"])
def test_more_noise_leaves_less_of_the_cell_in_the_tokens(block_type, program_pipe, pbmc):
    config = {**program_pipe.denoiser.config, "block_type": block_type}
    denoiser = randomize(WhiteBoxDiTModel.from_config(config)).eval()
    latents = program_pipe.encode_cells(pbmc)
    labels = program_pipe.processor.encode_labels(pbmc)
    rows = measure_layers(denoiser, program_pipe.scheduler, latents, labels, [50, 500])
    assert len(rows) == 2 * 2 * 3
    at_input = [row["explained"] for row in rows if row["layer"] == 0 and row["network"] == "trained"]
    assert at_input[0] > 0.9 and at_input[0] > at_input[1] + 0.3
    blocks = [row for row in rows if row["layer"]]
    keys = ("step", "own", "random", "cosine", "zeros", "objective", "curvature")
    assert all(np.isfinite([row[key] for key in keys]).all() for row in blocks)
    if block_type == "descent":
        assert all(row["objective"] < 0 and row["curvature"] <= 1 for row in blocks)


def test_the_step_of_a_descent_block_is_what_it_adds(program_pipe, pbmc):
    denoiser, latents = program_pipe.denoiser, program_pipe.encode_cells(pbmc)[:50]
    (row,) = [row for row in measure_layers(denoiser, program_pipe.scheduler, latents, None, [300])][1:2]
    with record_blocks(denoiser) as records:
        denoiser(add_noise(latents, 300, program_pipe.scheduler, seed=0), 300)
    gate = records[0]["ff_input"] - records[0]["attn_input"]
    expected = step_of_attention(subspaces_of(denoiser.blocks[0].attn), records[0]["attn_input"], gate)
    assert {key: row[key] for key in expected} == pytest.approx(expected)


def test_a_dit_block_has_no_step_that_an_equation_says(program_pipe, pbmc):
    shape = {"patch_size": 3, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    dit = WhiteBoxDiTModel(sample_size=program_pipe.denoiser.config.sample_size, block_type="dit", **shape).eval()
    latents = program_pipe.encode_cells(pbmc)[:100]
    rows = measure_layers(dit, program_pipe.scheduler, latents, None, [300])
    assert not any("own" in row or "zeros" in row for row in rows) and "explained" in rows[-1]


def test_the_control_has_the_gates_and_other_matrices(program_pipe):
    denoiser = program_pipe.denoiser
    control = untrained_copy(denoiser)
    assert torch.equal(control.blocks[0].modulation.weight, denoiser.blocks[0].modulation.weight)
    assert torch.equal(control.proj_in.weight, denoiser.proj_in.weight)
    assert not torch.equal(control.blocks[1].attn.subspaces, denoiser.blocks[1].attn.subspaces)
    assert not torch.equal(control.blocks[1].ff.dictionary, denoiser.blocks[1].ff.dictionary)
    assert torch.equal(untrained_copy(denoiser).blocks[1].attn.subspaces, control.blocks[1].attn.subspaces)
