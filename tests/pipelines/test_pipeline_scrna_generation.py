import inspect
import json
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from conftest import make_pipeline
from diffusers import DDIMScheduler, DDPMScheduler
from scipy import sparse

import wbdit_diffusers
from wbdit_diffusers import ScRNAGenerationPipeline, __version__


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ==================== The cells ====================


def test_cells_are_an_anndata_that_scanpy_takes(pipe, pbmc, tmp_path):
    cells = pipe(num_cells=120, generator=seeded(7)).cells
    assert cells.shape == (120, 765)
    assert list(cells.var_names) == list(pbmc.var_names)
    assert sparse.isspmatrix_csr(cells.X)
    assert (cells.X.data > 0).all() and (cells.X.data == np.rint(cells.X.data)).all()
    assert list(cells.obs) == ["cell_type", "phase", "library_size", "generated"]
    assert set(cells.obs["cell_type"]) <= set(pbmc.obs["cell_type"])
    assert cells.obs_names.is_unique
    assert cells.uns["wbdit"] == {
        "model_id": "",
        "scheduler": "DDPMScheduler",
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "seed": 7,
        "version": __version__,
        "X": "counts",
    }
    assert type(cells.uns["wbdit"]["seed"]) is int

    others = pipe(num_cells=120, cell_types="Dendritic", library_size=900, generator=seeded(8)).cells
    assert others.uns["wbdit"]["request"] == {"cell_types": "Dendritic", "library_size": 900}
    both = ad.concat([cells, others])
    assert both.obs_names.is_unique and both.obs_names[0] == "wbdit_7_0" and both.obs["generated"].all()

    cells.write_h5ad(tmp_path / "cells.h5ad")
    again = ad.read_h5ad(tmp_path / "cells.h5ad")
    np.testing.assert_array_equal(again.X.toarray(), cells.X.toarray())
    assert again.uns["wbdit"]["seed"] == 7

    sc.pp.normalize_total(again, target_sum=1e4)
    sc.pp.log1p(again)
    sc.pp.pca(again, n_comps=5)
    sc.pp.neighbors(again)
    sc.tl.umap(again)
    sc.tl.rank_genes_groups(again, "phase", method="wilcoxon")


def test_output_types(pipe):
    expression = pipe(num_cells=10, generator=seeded(), output_type="pt").cells
    assert expression.shape == (10, 765) and expression.min() == 0 and not expression.requires_grad
    (array,) = pipe(num_cells=10, generator=seeded(), output_type="np", return_dict=False)
    np.testing.assert_array_equal(array, expression.numpy())
    latents = pipe(num_cells=10, generator=seeded(), output_type="latent").cells
    assert latents.shape == (10, 766)
    decoded = pipe.codec.decode(latents)
    torch.testing.assert_close(decoded.expression(), expression)
    cells = pipe(num_cells=10, generator=seeded()).cells
    np.testing.assert_array_equal(cells.X.toarray(), decoded.mean().round().numpy())
    np.testing.assert_allclose(cells.obs["library_size"], decoded.library_size)


def test_cell_types_and_conditions(pipe, pbmc):
    cells = pipe(num_cells=6, cell_types="CD19+ B").cells
    assert set(cells.obs["cell_type"]) == {"CD19+ B"}
    names = ["CD34+", "Dendritic", "CD56+ NK"]
    for num_cells in (None, 3):
        cells = pipe(num_cells=num_cells, cell_types=names, conditions={"phase": "S"}).cells
        assert list(cells.obs["cell_type"]) == names
        assert list(cells.obs["phase"]) == ["S", "S", "S"]
    cells = pipe(num_cells=2, conditions={"phase": ["G1", "S"], "cell_type": "CD34+"}).cells
    assert list(cells.obs["phase"]) == ["G1", "S"]
    drawn = pipe(num_cells=2000, generator=seeded(), num_inference_steps=1).cells.obs["cell_type"]
    frequencies = pbmc.obs["cell_type"].value_counts(normalize=True)
    assert (drawn.value_counts(normalize=True) - frequencies).abs().max() < 0.04


def test_labels_reach_the_denoiser(pipe):
    by_type = [
        pipe(num_cells=3, cell_types=name, conditions={"phase": "S"}, generator=seeded(), output_type="pt").cells
        for name in ("CD34+", "Dendritic")
    ]
    assert not torch.allclose(*by_type)


def test_library_size_can_be_given(pipe):
    cells = pipe(num_cells=3, library_size=100_000, generator=seeded()).cells
    assert list(cells.obs["library_size"]) == [100_000] * 3
    more = pipe(num_cells=3, library_size=[1e5, 2e5, 3e5], generator=seeded()).cells
    np.testing.assert_array_equal(more.X[0].toarray(), cells.X[0].toarray())
    totals = np.asarray(more.X.sum(1) / cells.X.sum(1)).ravel()
    np.testing.assert_allclose(totals, [1, 2, 3], rtol=0.01)


def test_log_values_give_log_values(pbmc):
    log_values = ad.AnnData(
        sparse.csr_matrix(np.log2(pbmc.X.toarray() / np.linspace(0.5, 5, pbmc.n_vars) + 1)), obs=pbmc.obs, var=pbmc.var
    )
    pipe = make_pipeline(log_values, values="log", codec_kwargs={"standardize": False})
    cells = pipe(num_cells=4, generator=seeded()).cells
    assert list(cells.obs) == ["generated"] and cells.uns["wbdit"]["X"] == "log expression"
    expected = pipe(num_cells=4, generator=seeded(), output_type="np").cells
    np.testing.assert_array_equal(cells.X.toarray(), expected)
    assert (expected != np.rint(expected)).any()
    decoded = pipe.decode_latents(pipe.encode_cells(log_values))
    np.testing.assert_allclose(decoded.X.toarray(), log_values.X.toarray(), rtol=1e-6)
    for refused in (
        lambda: pipe(library_size=1000),
        lambda: pipe.decode_latents(torch.zeros(1, 765), None, torch.ones(1)),
    ):
        with pytest.raises(ValueError, match="`library_size` was given, but this model was trained on log values"):
            refused()


def test_counts_without_a_modelled_library_size(pbmc):
    """Library sizes are then drawn from training cells with the same labels."""
    pipe = make_pipeline(pbmc, label_keys=["cell_type"], codec_kwargs={"model_library_size": False})
    cells = pipe(num_cells=70, generator=seeded()).cells
    assert (cells.X.data == np.rint(cells.X.data)).all()
    again = pipe(num_cells=70, generator=seeded(), batch_size=9).cells
    np.testing.assert_array_equal(again.obs["library_size"], cells.obs["library_size"])
    assert cells.obs["library_size"].nunique() > 60

    totals = pd.Series(np.asarray(pbmc.X.sum(1)).ravel(), pbmc.obs_names)
    for name in ("CD34+", "Dendritic"):
        real = totals[pbmc.obs["cell_type"] == name]
        drawn = pipe(300, name, generator=seeded(), num_inference_steps=1).cells.obs["library_size"]
        assert real.min() * 0.999 <= drawn.min() and drawn.max() <= real.max() * 1.001
        np.testing.assert_allclose(drawn.quantile([0.25, 0.5, 0.75]), real.quantile([0.25, 0.5, 0.75]), rtol=0.1)
    with pytest.raises(ValueError, match="hold no library size"):
        pipe.codec.decode(pipe.encode_cells(pbmc)).mean()
    decoded = pipe.decode_latents(pipe.encode_cells(pbmc)).obs["library_size"]
    assert totals.min() <= decoded.min() and decoded.max() <= totals.max()


# ==================== Program space ====================


def test_program_space_gives_counts_at_the_generated_library_size(program_pipe, pbmc):
    cells = program_pipe(num_cells=300, generator=seeded()).cells
    assert cells.shape == (300, 765) and sparse.isspmatrix_csr(cells.X)
    assert (cells.X.data > 0).all() and (cells.X.data == np.rint(cells.X.data)).all()
    np.testing.assert_array_equal(np.asarray(cells.X.sum(1)).ravel(), cells.obs["library_size"])  # all genes modelled
    real = np.asarray(pbmc.X.sum(1)).ravel()
    assert real.min() * 0.99 <= cells.obs["library_size"].min()
    assert cells.obs["library_size"].max() <= real.max() * 1.01


def test_program_space_output_types(program_pipe):
    latents = program_pipe(num_cells=10, generator=seeded(), output_type="latent").cells
    assert latents.shape == (10, 7)
    cells = program_pipe(num_cells=10, generator=seeded()).cells
    class_labels = program_pipe.processor.encode_labels(cells)  # those that were drawn
    decoded = program_pipe.codec.decode(latents, class_labels=class_labels)
    expression = program_pipe(num_cells=10, generator=seeded(), output_type="pt").cells
    torch.testing.assert_close(expression, decoded.expression())
    torch.testing.assert_close(expression, torch.log1p(decoded.mean() / decoded.library_size[:, None] * 1e4))
    np.testing.assert_allclose(cells.obs["library_size"], decoded.library_size, rtol=0.2)  # what was drawn
    given = program_pipe(num_cells=10, generator=seeded(), library_size=5000).cells
    np.testing.assert_allclose(np.asarray(given.X.sum(1)).ravel(), 5000, rtol=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_program_space_in_half_precision(program_pipe, dtype):
    cells = program_pipe.to(dtype=dtype)(num_cells=10, generator=seeded()).cells
    assert (cells.X.data == np.rint(cells.X.data)).all() and (np.asarray(cells.X.sum(1)) > 0).all()


def test_many_small_steps_are_not_rounded_away_in_half_precision(program_pipe):
    """With latents in bfloat16 the cells of 1,000 ancestral steps had a seventh of their variance."""
    program_pipe.scheduler = DDPMScheduler.from_config(program_pipe.scheduler.config)
    many = {"num_cells": 100, "num_inference_steps": 1000, "output_type": "latent"}
    whole = program_pipe(**many, generator=seeded()).cells
    half = program_pipe.to(dtype=torch.bfloat16)(**many, generator=seeded()).cells
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.std(0), whole.std(0), rtol=0.1, atol=0)


# ==================== Real cells as latents, and back ====================


@pytest.mark.parametrize("codec", ["program", "expression"])
def test_real_cells_survive_encoding_and_decoding(pbmc, codec):
    pipe = make_pipeline(pbmc, codec=codec, label_keys=["cell_type", "phase"])
    latents, class_labels = pipe.encode_cells(pbmc), pipe.processor.encode_labels(pbmc)
    assert latents.shape == (700, pipe.codec.num_features) and not latents.requires_grad
    assert latents.mean(0).abs().max() < 0.01 and (latents.std(0) - 1).abs().max() < 0.01
    cells = pipe.decode_latents(latents, class_labels, generator=seeded())
    assert cells.var_names.equals(pbmc.var_names) and cells.obs_names.is_unique
    for key in ("cell_type", "phase"):
        assert list(cells.obs[key]) == list(pbmc.obs[key])
    # Counts are drawn around the library size, and the library is what was drawn.
    rtol = {"program": 0.3, "expression": 1e-4}[codec]
    np.testing.assert_allclose(cells.obs["library_size"], np.asarray(pbmc.X.sum(1)).ravel(), rtol=rtol)
    drawn, real = (np.log1p(np.asarray(adata.X.mean(0)).ravel()) for adata in (cells, pbmc))
    assert np.corrcoef(drawn, real)[0, 1] > {"program": 0.85, "expression": 0.9999}[codec]  # of random weights
    expected = pipe.codec.decode(latents, class_labels=class_labels).mean().detach().mean(0)
    np.testing.assert_allclose(np.asarray(cells.X.mean(0)).ravel(), expected, rtol=0.2, atol=0.05)

    again = pipe.decode_latents(latents, class_labels, generator=seeded())
    assert (again.X != cells.X).nnz == 0
    other = pipe.decode_latents(latents, generator=seeded(1))
    assert ((other.X != cells.X).nnz > 0) == (codec == "program")  # expression is decoded without noise
    assert list(other.obs) == ["library_size", "generated"]
    named = pipe.decode_latents(latents, obs_names=pbmc.obs_names)
    assert named.obs_names.equals(pbmc.obs_names)
    deeper = pipe.decode_latents(latents[:50], library_size=torch.full((50,), 20_000.0), generator=seeded())
    np.testing.assert_allclose(deeper.obs["library_size"], 20_000, rtol=rtol)
    assert deeper.X.sum() > 2 * cells[:50].X.sum()


def test_encoding_needs_no_labels(pipe, pbmc):
    bare = ad.AnnData(pbmc.X, var=pbmc.var)
    assert torch.equal(pipe.encode_cells(bare), pipe.encode_cells(pbmc))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"latents": torch.zeros(3, 5)}, r"`latents` has shape \(3, 5\), expected \(3, 766\)"),
        (
            {"class_labels": torch.zeros(2, 2, dtype=torch.long)},
            r"`class_labels` has shape \(2, 2\), expected \(3, 2\)",
        ),
        ({"library_size": torch.ones(4)}, r"`library_size` has shape \(4,\), expected \(3,\)"),
    ],
)
def test_latents_that_do_not_fit_are_refused(pipe, wrong, message):
    with pytest.raises(ValueError, match=message):
        pipe.decode_latents(**({"latents": torch.zeros(3, 766)} | wrong))


def test_decoding_latents_is_the_end_of_a_call(pipe):
    arguments = {"num_cells": 20, "generator": seeded(), "cell_types": "Dendritic", "conditions": {"phase": "S"}}
    latents = pipe(**arguments, output_type="latent").cells
    cells = pipe(**{**arguments, "generator": seeded()}).cells
    decoded = pipe.decode_latents(latents)
    assert (decoded.X != cells.X).nnz == 0
    np.testing.assert_array_equal(decoded.obs["library_size"], cells.obs["library_size"])


def test_gradients_flow_from_the_likelihood_to_the_latents(program_pipe, pbmc):
    """Only the pipeline's own methods work without gradients: what they are made of is there to be differentiated."""
    latents = program_pipe.encode_cells(pbmc[:20]).requires_grad_()
    counts = torch.from_numpy(pbmc.X[:20].toarray()).float()
    log_prob = program_pipe.codec.decode(latents).log_prob(counts)
    log_prob.sum().backward()
    assert torch.isfinite(latents.grad).all() and (latents.grad != 0).all()
    with torch.no_grad():
        better = program_pipe.codec.decode(latents + 1e-2 * latents.grad / latents.grad.norm(dim=1, keepdim=True))
    assert (better.log_prob(counts) > log_prob).all()
    for output_type in ("latent", "pt"):
        assert not program_pipe(num_cells=2, latents=latents[:2], output_type=output_type).cells.requires_grad


# ==================== Schedulers and guidance ====================


def test_reverse_process_is_the_scheduler_s_own(pbmc):
    """Against the loop written out for a block of 64 cells, with one generator."""
    pipe = make_pipeline(pbmc)
    cells = pipe(num_cells=64, generator=seeded(), output_type="latent").cells
    seed = torch.randint(2**62, (1,), generator=seeded()).item()
    generator = torch.Generator().manual_seed(seed)
    torch.rand(64, 2, generator=generator)  # labels and library sizes
    latents = torch.randn(1, 64, 766, generator=generator)
    pipe.scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            output = pipe.denoiser(latents[0], t).sample[None]
            latents = pipe.scheduler.step(output, t, latents, generator=generator).prev_sample
    torch.testing.assert_close(cells, latents[0])


def test_guidance_moves_away_from_the_unconditional_prediction(pipe):
    arguments = {
        "num_cells": 4,
        "cell_types": "CD34+",
        "conditions": {"phase": "S"},
        "latents": torch.randn(4, 766, generator=seeded()),
        "num_inference_steps": 1,
        "output_type": "latent",
    }
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    results = [pipe(**arguments, guidance_scale=scale).cells for scale in (0.0, 1.0, 3.0)]
    # One step is linear in the prediction.
    torch.testing.assert_close(results[2] - results[0], 3 * (results[1] - results[0]), atol=1e-3, rtol=1e-3)


def test_default_number_of_steps_is_the_pipeline_s(pipe):
    pipe(num_cells=1)
    assert pipe.num_timesteps == 4
    pipe(num_cells=1, num_inference_steps=7)
    assert pipe.num_timesteps == 7


# ==================== Callbacks and progress ====================


def test_callbacks(pipe):
    calls = []

    def callback(pipe, step, timestep, callback_kwargs):
        calls.append((step, callback_kwargs["latents"].shape[0]))
        if step == pipe.num_timesteps - 1:
            callback_kwargs["latents"] = torch.zeros_like(callback_kwargs["latents"])
        return callback_kwargs

    latents = pipe(num_cells=5, batch_size=3, callback_on_step_end=callback, output_type="latent").cells
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3), (0, 2), (1, 2), (2, 2), (3, 2)]
    assert latents.abs().sum() == 0


def test_a_callback_can_change_the_guidance(pipe):
    def callback(pipe, step, timestep, callback_kwargs):
        pipe._guidance_scale += 1.0
        return callback_kwargs

    pipe(num_cells=2, guidance_scale=2.0, callback_on_step_end=callback)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps


def test_progress_bar_counts_all_steps(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    pipe(num_cells=5, batch_size=2)
    assert "12/12" in capsys.readouterr().err


# ==================== Saving and loading ====================


@pytest.mark.parametrize("codec, class_name", [("expression", "ExpressionCodec"), ("program", "ProgramCodec")])
def test_save_and_load(pbmc, codec, class_name, tmp_path, monkeypatch):
    pipe = make_pipeline(pbmc, codec=codec, label_keys=["cell_type"])
    expected = pipe(num_cells=20, generator=seeded()).cells
    folder = tmp_path / "runs" / "wbdit-pbmc"
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["denoiser"] == ["wbdit_diffusers", "WhiteBoxDiTModel"]
    assert index["processor"] == ["wbdit_diffusers", "ScRNAProcessor"]
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert index["codec"] == ["wbdit_diffusers", class_name]
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pkl", ".pt", ".npy")]

    monkeypatch.chdir(tmp_path)
    for path in (folder, "runs/wbdit-pbmc", "./runs/wbdit-pbmc/"):
        loaded = ScRNAGenerationPipeline.from_pretrained(path)
        loaded.set_progress_bar_config(disable=True)
        cells = loaded(num_cells=20, generator=seeded()).cells
        np.testing.assert_array_equal(cells.X.toarray(), expected.X.toarray())
        assert cells.uns["wbdit"]["model_id"] == "wbdit-pbmc"
    assert set(loaded.components) == {"denoiser", "scheduler", "processor", "codec"}
    assert loaded.config.num_inference_steps == 4


def test_variants_and_dtypes(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "variant", variant="fp16")
    loaded = ScRNAGenerationPipeline.from_pretrained(tmp_path / "variant", variant="fp16")
    for name, parameter in loaded.denoiser.named_parameters():
        assert torch.equal(parameter, pipe.denoiser.get_parameter(name))
    pipe.save_pretrained(tmp_path)
    assert ScRNAGenerationPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16).denoiser.dtype == torch.bfloat16
    half = pipe.to(dtype=torch.bfloat16)(num_cells=5, output_type="pt").cells
    assert half.dtype == torch.float32 and torch.isfinite(half).all()


def test_signature_is_the_frozen_one():
    names = list(inspect.signature(ScRNAGenerationPipeline.__call__).parameters)
    assert names[1:6] == ["num_cells", "cell_types", "conditions", "library_size", "guidance_scale"]
    assert names[6:10] == ["num_inference_steps", "batch_size", "generator", "latents"]
    assert names[10:] == [
        "output_type",
        "return_dict",
        "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
        "guides",
        "first_cell",
        "prompt",
        "negative_prompt",
    ]


def test_a_call_enters_few_functions(program_pipe):
    """A reader can follow it. Comprehensions are not counted."""
    entered, package = set(), str(Path(wbdit_diffusers.__file__).parent)

    def record(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package) and not code.co_name.startswith("<"):
            entered.add((code.co_filename, code.co_qualname))

    sys.setprofile(record)
    try:
        program_pipe(num_cells=10)
    finally:
        sys.setprofile(None)
    assert "ScRNAGenerationPipeline.__call__" in {name for _, name in entered}
    assert len(entered) <= 45, sorted(entered)
