"""How a condition acts, where the answer is known."""

import pytest
import torch
from conftest import make_pipeline

from wbdit_diffusers.interpretation import fit_gaussian_mixture
from wbdit_diffusers.interpretation.condition import block_shares, measure_condition, split_change, timestep_shares


@pytest.fixture(scope="module")
def measured(pbmc):
    pipe = make_pipeline(pbmc, codec="program", label_keys=["cell_type", "phase"])
    latents, labels = pipe.encode_cells(pbmc), pipe.processor.encode_labels(pbmc)
    return pipe, latents, labels, measure_condition(pipe, fit_gaussian_mixture(pipe, pbmc), latents, labels)


def test_each_type_has_all_shares(measured):
    pipe, _, labels, report = measured
    assert report["key"] == "phase" and {report["control"], report["condition"]} <= set(
        pipe.processor.config.categories[1]
    )
    assert report["types"]
    for row in report["types"]:
        assert len(row["blocks"]) == len(row["untrained_blocks"]) == len(pipe.denoiser.blocks) + 1
        assert len(row["timesteps"]) == len(row["closed_form_timesteps"]) == 4
        assert [one["share"] for one in row["programs"]] == sorted((o["share"] for o in row["programs"]), reverse=True)
        assert all(torch.tensor(row[key]).isfinite().all() for key in ("blocks", "timesteps", "closed_form_timesteps"))


def test_a_condition_of_one_block_alone_is_found(measured):
    """A network in which only the second block sees the labels."""
    pipe, _, labels, _ = measured
    network = pipe.denoiser
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    try:
        for module in (network.blocks[0].modulation, network.modulation_out):
            torch.nn.init.zeros_(module.weight)
        rows = labels[:1].repeat(2, 1)
        rows[:, 1] = torch.tensor([0, 1])
        assert block_shares(network, pipe, rows, 0) == pytest.approx([0, 1, 0], abs=1e-4)
    finally:
        network.load_state_dict(weights)


def test_quarters_of_the_steps_add_up_where_labels_add_a_constant(measured):
    pipe, _, labels, _ = measured

    def denoiser(noisy, timestep, labels, return_dict, label_index):
        return (labels[label_index][:, 1:].float().expand_as(noisy),)

    rows = labels[:1].repeat(2, 1)
    rows[:, 1] = torch.tensor([1, 0])
    shares = timestep_shares(denoiser, pipe, rows, 0)
    assert all(share > 0 for share in shares) and sum(shares) == pytest.approx(1, abs=1e-3)


def test_the_decoder_alone_or_the_programs_alone(measured):
    pipe, latents, _, _ = measured
    sizes, none = pipe.processor.condition_sizes, torch.zeros(latents.shape[1])
    step = none.clone()
    step[:6] = torch.linalg.inv(pipe.codec.program_axes)[:, 3].detach()
    share, programs = split_change(pipe.codec, step, sizes, 1, 1)
    assert share == 0 and programs[0]["program"] == "program_3" and programs[0]["share"] == pytest.approx(1, abs=1e-4)
    share, _ = split_change(pipe.codec, none + 1e-9, sizes, 1, 0)
    assert share == pytest.approx(1, abs=1e-4)


def test_there_is_nothing_to_measure_without_a_second_label(measured):
    pipe, latents, labels, _ = measured
    assert measure_condition(pipe, None, latents, labels[:, :1]) is None
    assert measure_condition(pipe, None, latents, None) is None
