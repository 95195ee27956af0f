import inspect
import json

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import torch
from conftest import make_pipeline
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    UniPCMultistepScheduler,
)
from scipy import sparse

from wbdit_diffusers import ScRNAGenerationPipeline, ScRNAPipelineOutput, WhiteBoxDiTModel, __version__
from wbdit_diffusers.pipelines import pipeline_scrna_generation


SCHEDULERS = [
    DDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    EulerAncestralDiscreteScheduler,
]


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def use_scheduler(pipe, scheduler_class):
    kwargs = {"algorithm_type": "sde-dpmsolver++"} if scheduler_class is DPMSolverMultistepScheduler else {}
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, **kwargs)


# ==================== The cells ====================


def test_cells_are_an_anndata_that_scanpy_takes(pipe, pbmc, tmp_path):
    cells = pipe(num_cells=120, generator=seeded(7)).cells
    assert cells.shape == (120, 765)
    assert list(cells.var_names) == list(pbmc.var_names)
    assert sparse.isspmatrix_csr(cells.X)
    assert (cells.X.data > 0).all() and (cells.X.data == np.rint(cells.X.data)).all()
    assert list(cells.obs) == ["cell_type", "phase", "library_size"]
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
    assert expression.shape == (10, 765) and expression.min() == 0
    array = pipe(num_cells=10, generator=seeded(), output_type="np").cells
    np.testing.assert_array_equal(array, expression.numpy())
    latents = pipe(num_cells=10, generator=seeded(), output_type="latent").cells
    assert latents.shape == (10, 766)
    decoded, library_size = pipe.processor.decode(latents)
    torch.testing.assert_close(decoded, expression)
    cells = pipe(num_cells=10, generator=seeded()).cells
    np.testing.assert_array_equal(cells.X.toarray(), pipe.processor.to_matrix(expression, library_size).toarray())
    np.testing.assert_allclose(cells.obs["library_size"], library_size)


def test_dict_and_tuple_output(pipe):
    output = pipe(num_cells=3, generator=seeded(), output_type="pt")
    assert isinstance(output, ScRNAPipelineOutput)
    as_tuple = pipe(num_cells=3, generator=seeded(), output_type="pt", return_dict=False)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], output[0])
    torch.testing.assert_close(output[0], output.cells)


def test_cell_types_and_conditions(pipe, pbmc):
    cells = pipe(num_cells=6, cell_types="CD19+ B").cells
    assert set(cells.obs["cell_type"]) == {"CD19+ B"}
    names = ["CD34+", "Dendritic", "CD56+ NK"]
    for num_cells in (1, 3):
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
    log_values = ad.AnnData(sparse.csr_matrix(np.log2(pbmc.X.toarray() / 3 + 1)), obs=pbmc.obs, var=pbmc.var)
    pipe = make_pipeline(log_values, values="log", standardize=False)
    cells = pipe(num_cells=4, generator=seeded()).cells
    assert list(cells.obs) == [] and cells.uns["wbdit"]["X"] == "log expression"
    expected = pipe(num_cells=4, generator=seeded(), output_type="np").cells
    np.testing.assert_array_equal(cells.X.toarray(), expected)


def test_counts_without_a_modelled_library_size(pbmc):
    pipe = make_pipeline(pbmc, label_keys=["cell_type"], model_library_size=False)
    cells = pipe(num_cells=70, generator=seeded()).cells
    assert (cells.X.data == np.rint(cells.X.data)).all()
    again = pipe(num_cells=70, generator=seeded(), batch_size=9).cells
    np.testing.assert_array_equal(again.obs["library_size"], cells.obs["library_size"])
    assert cells.obs["library_size"].nunique() > 60


# ==================== Program space ====================


def test_program_space_gives_counts_at_the_generated_library_size(program_pipe, pbmc):
    cells = program_pipe(num_cells=300, generator=seeded()).cells
    assert cells.shape == (300, 765) and sparse.isspmatrix_csr(cells.X)
    assert (cells.X.data > 0).all() and (cells.X.data == np.rint(cells.X.data)).all()
    totals = np.asarray(cells.X.sum(1)).ravel()
    np.testing.assert_allclose(np.mean(totals / cells.obs["library_size"]), 1, atol=0.05)
    real = np.asarray(pbmc.X.sum(1)).ravel()
    assert real.min() * 0.99 <= cells.obs["library_size"].min()
    assert cells.obs["library_size"].max() <= real.max() * 1.01


def test_program_space_output_types(program_pipe):
    latents = program_pipe(num_cells=10, generator=seeded(), output_type="latent").cells
    assert latents.shape == (10, 7)
    proportions, _, detection, library_size = program_pipe.autoencoder.decode(latents)
    expression = program_pipe(num_cells=10, generator=seeded(), output_type="pt").cells
    torch.testing.assert_close(expression, torch.log1p(proportions * detection * 1e4))
    cells = program_pipe(num_cells=10, generator=seeded()).cells
    np.testing.assert_allclose(cells.obs["library_size"], library_size)
    given = program_pipe(num_cells=10, generator=seeded(), library_size=5000).cells
    np.testing.assert_allclose(np.asarray(given.X.sum(1)).ravel(), 5000, rtol=0.2)


def test_program_space_batch_size_never_changes_the_cells(program_pipe):
    expected = program_pipe(num_cells=150, generator=seeded(), guidance_scale=2.0).cells
    for batch_size in (1, 37, 64, 100):
        cells = program_pipe(num_cells=150, generator=seeded(), guidance_scale=2.0, batch_size=batch_size).cells
        assert (cells.obs["cell_type"] == expected.obs["cell_type"]).all()
        # A rate that differs in its last digit may, rarely, change a count.
        assert (cells.X != expected.X).nnz <= 1e-3 * expected.X.nnz


def test_program_space_saves_and_loads(program_pipe, tmp_path):
    expected = program_pipe(num_cells=20, generator=seeded()).cells
    program_pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["autoencoder"] == [
        "wbdit_diffusers",
        "CountAutoencoder",
    ]
    loaded = ScRNAGenerationPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    cells = loaded(num_cells=20, generator=seeded()).cells
    np.testing.assert_array_equal(cells.X.toarray(), expected.X.toarray())


@pytest.mark.parametrize("space", ["program", "expression"])
@pytest.mark.parametrize("offload", ["model", "group"])
def test_offloading_does_not_change_the_cells(pbmc, space, offload):
    """The hooks of a GPU's offloading, on the CPU: each model is fetched before it is used, whatever its method."""
    pipe = make_pipeline(pbmc, space=space, label_keys=["cell_type", "phase"])
    arguments = {"num_cells": 30, "guidance_scale": 1.5}
    expected = pipe(**arguments, generator=seeded()).cells
    if offload == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        cpu = torch.device("cpu")
        pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    cells = pipe(**arguments, generator=seeded()).cells
    assert (cells.X != expected.X).nnz == 0
    assert list(cells.obs["cell_type"]) == list(expected.obs["cell_type"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_program_space_in_half_precision(program_pipe, dtype):
    cells = program_pipe.to(dtype=dtype)(num_cells=10, generator=seeded()).cells
    assert (cells.X.data == np.rint(cells.X.data)).all() and (np.asarray(cells.X.sum(1)) > 0).all()


# ==================== Same seed, same cells ====================


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_batch_size_never_changes_the_cells(pipe, scheduler_class):
    use_scheduler(pipe, scheduler_class)
    arguments = {"num_cells": 150, "guidance_scale": 2.0, "output_type": "latent"}
    expected = pipe(**arguments, generator=seeded()).cells
    assert torch.isfinite(expected).all() and expected.std() > 0.1
    for batch_size in (37, 64, 100):
        cells = pipe(**arguments, generator=seeded(), batch_size=batch_size).cells
        torch.testing.assert_close(cells, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(pipe(**arguments, generator=seeded(1)).cells, expected)


def test_batch_sizes_64_and_2500_give_the_same_5000_cells(pipe):
    cells = [
        pipe(num_cells=5000, batch_size=size, generator=seeded(), num_inference_steps=2).cells for size in (64, 2500)
    ]
    assert (cells[0].obs["cell_type"] == cells[1].obs["cell_type"]).all()
    np.testing.assert_allclose(cells[0].obs["library_size"], cells[1].obs["library_size"], rtol=1e-4)
    # A count may round the other way after a difference in the last digit.
    assert (cells[0].X != cells[1].X).nnz < 1e-5 * cells[0].X.nnz


@pytest.mark.parametrize("space", ["expression", "program"])
def test_a_stream_gives_the_cells_of_a_call(pbmc, space):
    pipe = make_pipeline(pbmc, space=space, label_keys=["cell_type"])
    batches = list(pipe.stream(num_cells=150, batch_size=60, generator=seeded()))
    assert [batch.n_obs for batch in batches] == [60, 60, 30]
    assert all(
        batch.obs["cell_type"].cat.categories.tolist() == batches[0].obs["cell_type"].cat.categories.tolist()
        for batch in batches
    )
    together = ad.concat(batches)
    cells = pipe(num_cells=150, generator=seeded()).cells
    assert together.obs_names.equals(cells.obs_names)
    assert (together.obs["cell_type"].astype(str) == cells.obs["cell_type"].astype(str)).all()
    assert (together.X != cells.X).nnz == 0
    with pytest.raises(ValueError, match="Dendritik"):
        next(pipe.stream(cell_types="Dendritik"))


def test_streams_do_not_disturb_each_other(pipe):
    arguments = {"num_cells": 128, "batch_size": 64, "cell_types": "Dendritic"}
    pairs = zip(
        pipe.stream(**arguments, generator=seeded(), guidance_scale=1.0),
        pipe.stream(**arguments, generator=seeded(), guidance_scale=3.0),
    )
    ones, threes = (ad.concat(batches) for batches in zip(*pairs))
    for cells, guidance_scale in ((ones, 1.0), (threes, 3.0)):
        alone = pipe(**arguments, generator=seeded(), guidance_scale=guidance_scale).cells
        assert (cells.X != alone.X).nnz == 0
    assert (ones.X != threes.X).nnz > 0


def test_counts_are_drawn_block_by_block(program_pipe, monkeypatch):
    """The pieces in which counts are made dense never change them, nor does a generator per cell."""
    expected = program_pipe(num_cells=150, generator=seeded()).cells
    monkeypatch.setattr(pipeline_scrna_generation, "VALUES_AT_ONCE", 1)
    for batch_size in (150, 100):
        cells = program_pipe(num_cells=150, generator=seeded(), batch_size=batch_size).cells
        assert (cells.X != expected.X).nnz <= 1e-3 * expected.X.nnz
        np.testing.assert_allclose(cells.obs["library_size"], expected.obs["library_size"], rtol=1e-4)
    together = program_pipe(generator=[seeded(i) for i in range(3)]).cells
    alone = program_pipe(generator=seeded(2)).cells
    assert (together[2:].X != alone.X).nnz <= 1


def test_one_cell_at_a_time_gives_the_same_cells(pipe):
    expected = pipe(num_cells=70, generator=seeded(), num_inference_steps=2, output_type="pt").cells
    cells = pipe(num_cells=70, generator=seeded(), num_inference_steps=2, output_type="pt", batch_size=1).cells
    torch.testing.assert_close(cells, expected, atol=1e-4, rtol=1e-4)


def test_fewer_cells_are_the_first_of_more(pipe):
    few = pipe(num_cells=10, generator=seeded(), output_type="pt").cells
    more = pipe(num_cells=100, generator=seeded(), output_type="pt").cells
    torch.testing.assert_close(few, more[:10], atol=1e-4, rtol=1e-4)


def test_global_seed_without_a_generator(pipe):
    cells = []
    for batch_size in (None, 2):
        torch.manual_seed(0)
        cells.append(pipe(num_cells=5, batch_size=batch_size, output_type="pt").cells)
    torch.testing.assert_close(*cells, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_a_list_of_generators_gives_the_cells_of_single_calls(pipe, scheduler_class):
    use_scheduler(pipe, scheduler_class)
    names = ["CD34+", "Dendritic", "CD34+"]
    together = pipe(cell_types=names, generator=[seeded(i) for i in range(3)], output_type="pt").cells
    for i in range(3):
        alone = pipe(cell_types=names[i], generator=seeded(i), output_type="pt").cells
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


def test_latents_replace_the_initial_noise(pipe):
    use_scheduler(pipe, DDIMScheduler)
    latents = torch.randn(5, 766, generator=seeded(3))
    arguments = {"num_cells": 5, "cell_types": "CD34+", "conditions": {"phase": "S"}, "output_type": "latent"}
    first = pipe(**arguments, latents=latents, generator=seeded(0)).cells
    second = pipe(**arguments, latents=latents, generator=seeded(1), batch_size=2).cells
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(pipe(**arguments, latents=latents.flip(0)).cells, first)


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
    use_scheduler(pipe, DDIMScheduler)
    results = [pipe(**arguments, guidance_scale=scale).cells for scale in (0.0, 1.0, 3.0)]
    # One step is linear in the prediction.
    torch.testing.assert_close(results[2] - results[0], 3 * (results[1] - results[0]), atol=1e-3, rtol=1e-3)


def test_guidance_is_one_forward_per_step(pipe, monkeypatch):
    sizes = []
    forward = pipe.denoiser.forward
    monkeypatch.setattr(
        pipe.denoiser, "forward", lambda *args, **kwargs: sizes.append(len(args[0])) or forward(*args, **kwargs)
    )
    pipe(num_cells=5, guidance_scale=2.0)
    pipe(num_cells=5)
    assert sizes == [10] * 4 + [5] * 4


def test_default_number_of_steps_is_the_pipeline_s(pipe):
    pipe(num_cells=1)
    assert pipe.num_timesteps == 4
    pipe(num_cells=1, num_inference_steps=7)
    assert pipe.num_timesteps == 7


def test_memory_follows_the_batch(pipe, monkeypatch):
    sizes = []
    decode = pipe.processor.decode
    monkeypatch.setattr(pipe.processor, "decode", lambda latents: sizes.append(len(latents)) or decode(latents))
    pipe(num_cells=100, batch_size=30)
    assert sizes == [30, 30, 30, 10]


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


def test_save_and_load(pipe, tmp_path):
    expected = pipe(num_cells=20, generator=seeded()).cells
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["denoiser"] == ["wbdit_diffusers", "WhiteBoxDiTModel"]
    assert index["processor"] == ["wbdit_diffusers", "ScRNAProcessor"]
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pkl", ".pt", ".npy")]

    loaded = ScRNAGenerationPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert set(loaded.components) == {"denoiser", "scheduler", "processor", "autoencoder"}
    assert index["autoencoder"] == [None, None] and loaded.autoencoder is None
    cells = loaded(num_cells=20, generator=seeded()).cells
    np.testing.assert_array_equal(cells.X.toarray(), expected.X.toarray())
    assert loaded.config.num_inference_steps == 4
    assert cells.uns["wbdit"]["model_id"] == str(tmp_path)


def test_variants_and_dtypes(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16", safe_serialization=False)
    loaded = ScRNAGenerationPipeline.from_pretrained(tmp_path, variant="fp16", use_safetensors=False)
    for name, parameter in loaded.denoiser.named_parameters():
        assert torch.equal(parameter, pipe.denoiser.get_parameter(name))
    pipe.save_pretrained(tmp_path)
    assert (
        ScRNAGenerationPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).denoiser.dtype == torch.bfloat16
    )
    half = pipe.to(dtype=torch.bfloat16)(num_cells=5, output_type="pt").cells
    assert half.dtype == torch.float32 and torch.isfinite(half).all()


def test_signature_is_the_frozen_one():
    parameters = inspect.signature(ScRNAGenerationPipeline.__call__).parameters
    assert {name: parameter.default for name, parameter in parameters.items() if name != "self"} == {
        "num_cells": 1,
        "cell_types": None,
        "conditions": None,
        "library_size": None,
        "guidance_scale": 1.0,
        "num_inference_steps": None,
        "batch_size": None,
        "generator": None,
        "latents": None,
        "output_type": "anndata",
        "return_dict": True,
        "callback_on_step_end": None,
        "callback_on_step_end_tensor_inputs": ["latents"],
    }


# ==================== Bad input ====================


def test_bad_arguments_are_named(pipe, pbmc):
    for arguments, message in [
        ({"num_cells": 0}, "positive integer"),
        ({"num_cells": 2.5}, "positive integer"),
        ({"cell_types": []}, "empty list"),
        ({"cell_types": "T cell"}, r"'T cell' is not a cell_type of this model, which knows CD14\+ Monocyte"),
        ({"num_cells": 3, "cell_types": ["CD34+", "Dendritic"]}, "cell_type has 2 entries for 3 cells"),
        ({"conditions": {"donor": "1"}}, "'donor' is not a condition"),
        ({"cell_types": "CD34+", "conditions": {"cell_type": "CD34+"}}, "say the same thing"),
        ({"num_cells": 3, "generator": [seeded(), seeded()]}, "generator has 2 entries for 3 cells"),
        ({"num_cells": 2, "latents": torch.zeros(2, 5)}, r"shape \(2, 5\), expected \(2, 766\)"),
        ({"library_size": -1}, "positive number of counts"),
        ({"library_size": np.nan}, "positive number of counts"),
        ({"output_type": "pil"}, "one of anndata, np, pt, latent"),
        ({"callback_on_step_end_tensor_inputs": ["prompt"]}, "prompt"),
        ({"num_cells": 5, "batch_size": 0}, "batch_size"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe(**arguments)
    with pytest.raises(ValueError, match="unconditional"):
        make_pipeline(pbmc)(cell_types="CD34+")
    other = WhiteBoxDiTModel(num_genes=10, num_attention_heads=2, attention_head_dim=8)
    with pytest.raises(ValueError, match="not of one model.*num_features=766.*num_genes=10"):
        ScRNAGenerationPipeline(denoiser=other, scheduler=pipe.scheduler, processor=pipe.processor)


def test_bad_folders_are_named(pipe, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"empty is no pipeline: .*model_index.json.*training/train.py"):
        ScRNAGenerationPipeline.from_pretrained(tmp_path / "empty")
    pipe.save_pretrained(tmp_path / "foreign")
    index = tmp_path / "foreign" / "model_index.json"
    index.write_text(index.read_text().replace("ScRNAGenerationPipeline", "StableDiffusionPipeline"))
    with pytest.raises(OSError, match="foreign holds a StableDiffusionPipeline"):
        ScRNAGenerationPipeline.from_pretrained(tmp_path / "foreign")
    pipe.save_pretrained(tmp_path / "truncated")
    weights = tmp_path / "truncated" / "denoiser" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(OSError, match=r"denoiser.diffusion_pytorch_model.safetensors is truncated or damaged.*again"):
        ScRNAGenerationPipeline.from_pretrained(tmp_path / "truncated")
