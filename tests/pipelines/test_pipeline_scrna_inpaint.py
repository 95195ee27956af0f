"""Cells that lack genes: measured genes stay, the others are draws from their posterior."""

import logging

import anndata as ad
import numpy as np
import pytest
import torch
from conftest import make_pipeline
from scipy import sparse

from wbdit_diffusers import GaussianMixtureDenoiser, ScRNAGenerationPipeline, ScRNAInpaintPipeline
from wbdit_diffusers.data import CellSplit, load_pbmc
from wbdit_diffusers.data.latents import CellDataset, encode_cells
from wbdit_diffusers.pipelines.observed_genes import ObservedGenes
from wbdit_diffusers.pretrained import FOLDER, PBMC
from wbdit_diffusers.training import CodecConfig, fit_codec


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe() -> ScRNAInpaintPipeline:
    pipe = ScRNAInpaintPipeline.from_pretrained(PBMC)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def real() -> ad.AnnData:
    """Cells that were held out when the pipeline was trained."""
    return CellSplit.load(FOLDER / PBMC).apply(load_pbmc())[1]


@pytest.fixture(scope="module")
def panel(pipe, real) -> ad.AnnData:
    """60 cells with the 100 modelled genes that have most counts, without labels."""
    names = pipe.processor.var_names
    totals = np.asarray(real[:, names].X.sum(axis=0)).ravel()
    cells = real[:60, names[np.argsort(-totals, kind="stable")[:100]]].copy()
    cells.obs = cells.obs[[]]
    return cells


def test_measured_genes_stay_and_rows_say_where_they_come_from(pipe, panel):
    before = panel.copy()
    full = pipe(panel, num_samples=3, generator=seeded()).cells
    assert list(full.var_names) == list(pipe.processor.var_names)
    assert list(full.obs["input_cell"]) == list(np.repeat(panel.obs_names, 3))
    assert list(full.obs["sample"]) == [0, 1, 2] * 60
    kept = full[:, panel.var_names].X.toarray()
    np.testing.assert_array_equal(kept, np.repeat(sparse.csr_matrix(panel.X).toarray(), 3, axis=0))
    assert (full.obs["library_size"] >= np.asarray(full.X.sum(axis=1)).ravel()).all()
    assert full.obs_names.is_unique and full.uns["wbdit"]["request"]["num_samples"] == 3
    assert (panel.X != before.X).nnz == 0 and list(panel.obs) == list(before.obs)
    # Draws of a cell differ in the other genes.
    others = full[:, ~full.var_names.isin(panel.var_names)].X.toarray()
    assert (others[0] != others[1]).any()


def test_other_genes_are_better_known_than_from_the_average_cell(pipe, panel, real):
    others = pipe.processor.var_names[~pipe.processor.var_names.isin(panel.var_names)]
    truth = np.log1p(real[:60, others].X.toarray())
    drawn = pipe(panel, num_samples=20, generator=seeded()).cells[:, others].X.toarray()
    predicted = np.log1p(drawn.reshape(60, 20, -1).mean(1))
    seen = (truth > 0).sum(axis=0) >= 10
    per_gene = [np.corrcoef(a, b)[0, 1] for a, b in zip(truth.T[seen], predicted.T[seen])]
    assert np.nanmean(per_gene) > 0.15  # the mean of all cells has 0


def test_labels_are_taken_from_obs_or_from_the_genes(pipe, panel, real):
    true = real.obs["cell_type"].astype(str).to_numpy()[:60]
    inferred = pipe(panel, generator=seeded()).cells.obs["cell_type"].astype(str).to_numpy()
    assert (inferred == true).mean() > 0.6  # of ten types
    labelled = panel.copy()
    labelled.obs["cell_type"] = ["Dendritic"] * 30 + ["a name that nobody knows"] * 30
    full = pipe(labelled, generator=seeded()).cells
    assert list(full.obs["cell_type"][:30]) == ["Dendritic"] * 30
    assert (full.obs["cell_type"].astype(str).to_numpy()[30:] == true[30:]).mean() > 0.6
    assert list(full.obs["input_cell_type"]) == list(labelled.obs["cell_type"])


def test_draws_have_the_spread_of_the_posterior(pipe):
    """Cells drawn from the model itself: the latents that made them are a draw like the others."""
    cells = ScRNAGenerationPipeline.from_pipe(pipe)(num_cells=150, output_type="latent", generator=seeded(1)).cells
    labels = pipe.gaussian_mixture.nearest_labels(cells, torch.full((150, 1), -1))
    made = pipe.decode_latents(cells, labels, generator=seeded(2))
    made.obs = made.obs[["cell_type"]]
    half = made[:, made.var_names[::2]].copy()
    drawn = pipe(half, num_samples=40, output_type="latent", generator=seeded(3)).cells.reshape(150, 40, -1)
    rank = (drawn < cells[:, None]).float().mean(1)  # (cells, num_features)
    for level in (0.5, 0.8, 0.95):
        inside = ((rank - 0.5).abs() <= level / 2).float().mean().item()
        assert abs(inside - level) < 0.05, (level, inside)
    spread = drawn.std(1).mean() / cells.std(0).mean()
    assert spread < 0.8  # narrower than all cells


def test_the_batch_size_changes_no_cell(pipe, panel):
    a, b = (pipe(panel, num_samples=2, batch_size=size, generator=seeded()).cells for size in (200, 13))
    assert (a.X != b.X).nnz <= 2 and list(a.obs_names) == list(b.obs_names)


def test_another_order_of_genes_and_cells_gives_the_same_predictions(pipe, panel):
    order = np.random.default_rng(0).permutation(panel.n_vars)
    a, b = (pipe(cells, output_type="np", generator=seeded()).cells for cells in (panel, panel[:, order].copy()))
    np.testing.assert_allclose(a, b, atol=1e-3)


def test_a_known_library_size_is_kept(pipe, panel):
    full = pipe(panel, library_size=4000.0, num_samples=5, match_detection=True, generator=seeded()).cells
    assert 3600 < full.obs["library_size"].mean() < 4400


def test_another_technology_is_reported_and_matched(pipe, panel, real, caplog):
    """Each gene of the panel is seen more or less often, as by probes."""
    factors = np.exp(np.random.default_rng(0).normal(1, 1.5, panel.n_vars))
    probes = panel.copy()
    probes.X = sparse.csr_matrix(np.random.default_rng(1).poisson(panel.X.toarray() * factors).astype(np.float32))
    with caplog.at_level(logging.WARNING):
        pipe(panel, generator=seeded())
        assert "match_detection" not in caplog.text
        plain = pipe(probes, generator=seeded()).cells
        assert "give `match_detection=True`" in caplog.text
    matched = pipe(probes, match_detection=True, generator=seeded()).cells
    true = real.obs["cell_type"].astype(str).to_numpy()[:60]
    right = [(cells.obs["cell_type"].astype(str).to_numpy() == true).mean() for cells in (plain, matched)]
    assert right[1] > right[0]
    # All genes have the scale of the training cells, not that of the probes.
    means = [np.asarray(cells[:, panel.var_names].X.mean(axis=0)).ravel() for cells in (matched, panel, probes)]
    distance = [np.abs(np.log(means[0] + 0.01) - np.log(one + 0.01)).mean() for one in means[1:]]
    assert distance[0] < 0.5 * distance[1]


def test_it_is_of_the_family(pipe, panel, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = ScRNAInpaintPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    seen = []
    arguments = {"output_type": "latent", "num_inference_steps": 5}
    callback = lambda pipe, i, t, tensors: seen.append((i, tensors["latents"].shape)) or {}  # noqa: E731
    latents = loaded(panel, generator=seeded(), callback_on_step_end=callback, **arguments).cells
    torch.testing.assert_close(latents, pipe(panel, generator=seeded(), return_dict=False, **arguments)[0])
    assert seen[-1][0] == len(seen) - 1 >= 4 and seen[0][1] == latents.shape


def test_log_values_are_completed_too(pbmc):
    """Sums of log values, from which no counts can be recovered."""
    cells = ad.AnnData(pbmc.X.log1p() * 1.7, obs=pbmc.obs, var=pbmc.var)[:, :200].copy()
    cells.X.data *= np.random.default_rng(0).uniform(0.9, 1.1, cells.X.nnz).astype(np.float32)
    processor, codec = fit_codec(
        cells, CodecConfig(values="log", num_programs=4, codec_max_steps=50, decoder_steps=20)
    )
    generate = make_pipeline(cells, codec="program", values="log")
    parts = generate.components | {"codec": codec, "processor": processor}
    mixture = GaussianMixtureDenoiser.fit(
        encode_cells(CellDataset(cells, processor), codec), torch.zeros(700, 0), (), generate.scheduler, 1
    )
    pipe = ScRNAInpaintPipeline(**parts | {"denoiser": mixture, "gaussian_mixture": mixture})
    pipe.set_progress_bar_config(disable=True)
    half = cells[:30, cells.var_names[::2]].copy()
    full = pipe(half, generator=seeded()).cells
    shared = half.var_names.intersection(full.var_names)
    np.testing.assert_allclose(full[:, shared].X.toarray(), half[:, shared].X.toarray(), rtol=1e-5)
    others = full[:, ~full.var_names.isin(shared)].X
    assert np.isfinite(others.data).all() and others.nnz > 0


def test_mistakes_are_named(pipe, panel):
    without = ScRNAInpaintPipeline(**{**pipe.components, "gaussian_mixture": None})
    with pytest.raises(ValueError, match="no Gaussian mixture of gene programs"):
        without(panel)
    with pytest.raises(ValueError, match="`num_samples` is 0"):
        pipe(panel, num_samples=0)
    with pytest.raises(ValueError, match="`num_inference_steps` must be between 1 and"):
        pipe(panel, num_inference_steps=0)
    with pytest.raises(ValueError, match="`library_size` has 2 entries for 60 cells"):
        pipe(panel, library_size=[4000.0, 5000.0])
    with pytest.raises(ValueError, match="`library_size` must be a positive number"):
        pipe(panel, library_size=-1.0)
    other = panel.copy()
    other.var_names = [f"ENSG{i}" for i in range(other.n_vars)]
    with pytest.raises(ValueError, match="are not in `adata.var_names`"):
        pipe(other)


def test_the_likelihood_is_that_of_the_codec(pipe, panel):
    """Near the most likely latents, the Gaussian has the gradient of the log-likelihood."""
    data = torch.zeros(60, len(pipe.processor.var_names))
    mask = torch.from_numpy(pipe.processor.var_names.isin(panel.var_names))
    data[:, mask] = torch.from_numpy(panel[:, pipe.processor.var_names[mask.numpy()]].X.toarray()).float()
    observed = ObservedGenes(pipe.codec, data, mask, gaussian_mixture=pipe.gaussian_mixture)
    latents = observed.latents.requires_grad_()
    log_prob = pipe.codec.decode(latents).log_prob(data, mask).sum()
    (gradient,) = torch.autograd.grad(log_prob, latents)
    of_gaussian = observed.shift - (observed.precision @ latents.detach().double()[..., None])[..., 0]
    torch.testing.assert_close(of_gaussian, gradient.double(), atol=1e-3, rtol=1e-3)
