"""Cells under other labels: they keep what the labels do not explain."""

import logging

import numpy as np
import pytest
import torch
from conftest import awkward, make_pipeline

from wbdit_diffusers import ScRNAGenerationPipeline, ScRNAToScRNAPipeline
from wbdit_diffusers.interpretation import fit_gaussian_mixture


NEW = {"conditions": {"phase": "S"}}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe(pbmc) -> ScRNAToScRNAPipeline:
    """The closed form denoises, so that the answer is known without a training. No dendritic cell is in phase S."""
    cells = pbmc[~((pbmc.obs["cell_type"] == "Dendritic") & (pbmc.obs["phase"] == "S"))].copy()
    generate = make_pipeline(cells, codec="program", label_keys=["cell_type", "phase"])
    mixture = fit_gaussian_mixture(generate, cells)
    pipe = ScRNAToScRNAPipeline(**{**generate.components, "denoiser": mixture, "gaussian_mixture": mixture})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def controls(pbmc):
    return pbmc[(pbmc.obs["phase"] == "G1") & (pbmc.obs["cell_type"] == "CD14+ Monocyte")][:40].copy()


def test_the_way_to_noise_and_back_returns_the_cells(pipe, controls):
    latents = pipe.encode_cells(controls)
    same = pipe(controls, conditions={"phase": "G1"}, output_type="latent").cells
    assert (same - latents).norm() < 0.15 * latents.norm()


def test_cells_move_to_the_new_label_and_stay_themselves(pipe, pbmc, controls):
    latents = pipe.encode_cells(controls)
    moved = pipe(controls, **NEW, output_type="latent").cells
    is_new = ((pbmc.obs["phase"] == "S") & (pbmc.obs["cell_type"] == "CD14+ Monocyte")).to_numpy()
    target = pipe.encode_cells(pbmc[is_new].copy()).mean(0)
    assert (moved.mean(0) - target).norm() < 0.6 * (latents.mean(0) - target).norm()
    # Relative to the others, each translated cell is where its origin was.
    apart = torch.cdist(moved - moved.mean(0), latents - latents.mean(0))
    rank = (apart < apart.diagonal()[:, None]).float().mean(1)
    assert (rank < 0.1).float().mean() > 0.9
    fresh = ScRNAGenerationPipeline.from_pipe(pipe)(40, conditions={"cell_type": "CD14+ Monocyte", "phase": "S"},
                                                    output_type="latent", generator=seeded()).cells  # fmt: skip
    apart = torch.cdist(fresh - fresh.mean(0), latents - latents.mean(0))
    assert ((apart < apart.diagonal()[:, None]).float().mean(1) < 0.1).float().mean() < 0.4


def test_rows_say_where_they_come_from_and_the_input_stays(pipe, controls):
    before = controls.copy()
    cells = pipe(controls, **NEW, generator=seeded()).cells
    assert list(cells.obs["input_cell"]) == list(controls.obs_names) and cells.obs["generated"].all()
    assert set(cells.obs["phase"]) == {"S"} and set(cells.obs["input_phase"]) == {"G1"}
    assert not set(cells.obs_names) & set(controls.obs_names)
    assert cells.uns["wbdit"]["request"] == {"phase": "S", "strength": 1.0}
    assert (controls.X != before.X).nnz == 0 and controls.obs.equals(before.obs)
    again = pipe(controls, **NEW, generator=seeded(), batch_size=7).cells
    assert (abs(again.X - cells.X) > 0).nnz <= 0.001 * cells.X.nnz  # sums in another order may round differently


def test_less_strength_moves_less(pipe, controls):
    latents = pipe.encode_cells(controls)
    moves = [
        (pipe(controls, **NEW, strength=strength, output_type="latent").cells - latents).mean(0).norm()
        for strength in (0.2, 0.6, 1.0)
    ]
    assert moves[0] < moves[1] < moves[2]


def test_cells_of_another_dataset(pipe, controls, caplog):
    """Fewer genes in another order, a type with another name, and no column for the condition."""
    keep = np.random.default_rng(0).permutation(controls.n_vars)[:400]
    other = controls[:, keep].copy()
    other.obs["cell_type"] = "Mono (cluster 3)"
    del other.obs["phase"]
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        logging.getLogger("diffusers").propagate = True
        cells = pipe(other, **NEW, generator=seeded()).cells
    text = caplog.text
    assert "'Mono (cluster 3)' is new: taken as the nearest" in text and "`cells.obs` has no 'phase'" in text
    assert "365 of the 765 modelled genes are missing" in text
    assert set(cells.obs["input_cell_type"]) == {"Mono (cluster 3)"} and cells.n_vars == 765
    assert cells.obs["cell_type"].nunique() == 1


def test_genes_that_were_not_measured_are_not_zero(pbmc):
    """A model of one program per cell type: half of the genes say as much about it."""
    pipe = make_pipeline(pbmc, codec="program", label_keys=["cell_type"])
    full = pipe.encode_cells(pbmc)
    measured = np.random.default_rng(1).permutation(pbmc.n_vars)[: pbmc.n_vars // 2]
    half = pbmc[:, measured].copy()
    zeros = pbmc.copy()
    absent = np.setdiff1d(np.arange(pbmc.n_vars), measured)
    dense = zeros.X.toarray()
    dense[:, absent] = 0
    zeros.X = dense
    filled, padded = pipe.encode_cells(half), pipe.encode_cells(zeros)
    library = slice(-1, None)  # the log library size, which lacks the counts that were not measured
    assert (filled - full)[:, library].abs().mean() < 0.5 * (padded - full)[:, library].abs().mean()
    assert (filled - full).abs().mean() < (padded - full).abs().mean()


def test_missing_genes_in_expression_space_and_in_raw(pbmc):
    expression = make_pipeline(pbmc, label_keys=["cell_type"])
    assert expression.encode_cells(pbmc[:5, :700]).shape == (5, 766)
    raw, settings = awkward(pbmc)
    pipe = make_pipeline(raw, codec="program", label_keys=["cell_type"], **settings)
    torch.testing.assert_close(pipe.encode_cells(raw[:5]), pipe.encode_cells(raw)[:5])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "No label changes"),
        ({**NEW, "strength": 0.0}, "`strength` is between 0 and 1"),
        ({"conditions": {"phase": "X"}}, "'X' is not a phase"),
        ({**NEW, "guidance_scale": {"dose": 2.0}}, "`guidance_scale` has 'dose'"),
        ({**NEW, "output_type": "pil"}, "`output_type`"),
    ],
)
def test_a_call_refuses(pipe, controls, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(controls, **arguments)


def test_an_unseen_combination_is_named(pipe, pbmc, caplog):
    cells = pbmc[(pbmc.obs["phase"] == "G1") & (pbmc.obs["cell_type"] == "Dendritic")][:5].copy()
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        logging.getLogger("diffusers").propagate = True
        unseen = pipe(cells, **NEW).cells.uns["wbdit"]["unseen_combinations"]
    assert unseen["combination"].tolist() == ["cell_type=Dendritic, phase=S"]
    assert unseen["composed_from"][0].startswith("cell_type=") and np.isfinite(unseen["change"]).all()
    assert "No training cell has cell_type=Dendritic, phase=S. It is composed from" in caplog.text
