"""Programs as they are met in an AnnData and in a table."""

import anndata as ad
import numpy as np
import pytest
import torch
from conftest import make_pipeline

from wbdit_diffusers.cli import main
from wbdit_diffusers.data import write_cells
from wbdit_diffusers.interpretation import program_table


@pytest.fixture
def one_program(pbmc):
    """A pipeline whose first program raises the first gene alone, and a lot."""
    pipe = make_pipeline(pbmc, codec="program", label_keys=["cell_type"], num_genes=60)
    weight = pipe.codec.heads["log_rates"].weight.data
    weight[:, 0] = 0
    weight[0, 0] = 3 / pipe.codec.latents_std[0]
    return pipe


def test_cells_come_with_programs(one_program):
    cells = one_program(num_cells=40, generator=torch.Generator().manual_seed(0)).cells
    assert cells.varm["programs"].shape == (60, 6) and cells.obsm["X_programs"].shape == (40, 6)
    assert len(cells.uns["programs"]["name"]) == 6 and cells.uns["programs"]["explained"].sum() == pytest.approx(1)
    loadings = cells.varm["programs"][:, 0]
    assert loadings[0] - loadings[1] == pytest.approx(3, abs=1e-4) and np.ptp(loadings[1:]) < 1e-5
    assert cells.uns["programs"]["name"][0].startswith(cells.var_names[0])


def test_activities_are_the_latents(one_program, pbmc):
    """Of which a real cell's are its code: the way back from a generated cell to what the network made."""
    latents = one_program.encode_cells(pbmc[:30])
    cells = one_program.decode_latents(latents, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(cells.obsm["X_programs"], latents[:, :-1], rtol=1e-6)


def test_a_loading_is_what_a_program_does(one_program, pbmc):
    """One standard deviation more of it changes the log rates by the loadings and one number that all genes share."""
    codec = one_program.codec
    latents = one_program.encode_cells(pbmc[:1])
    more = latents.clone()
    more[:, 2] += 1
    with torch.no_grad():
        change = (codec.decode(more).log_proportions - codec.decode(latents).log_proportions)[0, :-1]
    assert (change - codec.loadings[:, 2]).std() < 1e-4 < codec.loadings[:, 2].std()


def test_a_gene_that_hardly_any_cell_has_is_not_named_first(one_program):
    codec = one_program.codec
    codec.heads["log_rates"].weight.data[1, 0] = 4 / codec.latents_std[0]
    codec.heads["log_rates"].bias.data[1] = -20
    first, second = one_program.processor.var_names[:2]
    assert codec.loadings[1, 0] > codec.loadings[0, 0]
    names = program_table(codec, one_program.processor.var_names, num_genes=3).name.iloc[0].split(", ")
    assert names[0] == first and names[1] == second  # all others are lowered


def test_streamed_cells_keep_their_programs(one_program, tmp_path):
    whole = one_program(num_cells=70, batch_size=70, generator=torch.Generator().manual_seed(0)).cells
    stream = one_program.stream(num_cells=70, batch_size=30, generator=torch.Generator().manual_seed(0))
    write_cells(tmp_path / "cells.h5ad", stream)
    cells = ad.read_h5ad(tmp_path / "cells.h5ad")
    np.testing.assert_allclose(cells.obsm["X_programs"], whole.obsm["X_programs"], atol=1e-5)
    np.testing.assert_array_equal(cells.varm["programs"], whole.varm["programs"])
    assert list(cells.uns["programs"]["name"]) == list(whole.uns["programs"]["name"])


def test_command(one_program, tmp_path, capsys):
    one_program.save_pretrained(tmp_path / "model")
    main(["programs", str(tmp_path / "model"), "--num_genes", "4", "--output", str(tmp_path / "loadings.csv")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("program_0 (") and lines[1].count(",") == 3 and len(lines) == 6 * 3 + 1
    written = np.loadtxt(tmp_path / "loadings.csv", delimiter=",", skiprows=1, usecols=range(1, 7))
    np.testing.assert_allclose(written, one_program.codec.loadings, rtol=1e-4, atol=1e-6)


def test_command_refuses_a_model_without_programs(pbmc, tmp_path, capsys):
    make_pipeline(pbmc, label_keys=["cell_type"]).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        main(["programs", str(tmp_path / "model")])
    assert "no gene programs: it was trained with ExpressionCodec" in capsys.readouterr().err
