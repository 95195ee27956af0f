"""All genes: those that do not define the programs follow them, and Scanpy's workflow has the right numbers."""

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import torch

from wbdit_diffusers import ProgramCodec, ScRNAGenerationPipeline
from wbdit_diffusers.data import CellSplit, read_cells
from wbdit_diffusers.training import TrainingConfig, codec, train
from wbdit_diffusers.training.other_genes import regress


MARKERS = "CD3E CD3D CD4 CD8A IL7R CCR7 CD79A MS4A1 CD14 LYZ FCGR3A NKG7 GNLY FCER1A PPBP FOXP3 MKI67".split()
MIN_COUNTS = 400  # of a marker in real cells: the mean of fewer is uncertain by more than 5%


@pytest.fixture(scope="module")
def few_variable_genes():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(codec, "NUM_VARIABLE_GENES", 150)
        monkeypatch.setattr(codec, "NUM_FREQUENT_GENES", 0)
        yield


@pytest.fixture(scope="module")
def trained(pbmc, few_variable_genes, tmp_path_factory) -> ScRNAGenerationPipeline:
    folder = tmp_path_factory.mktemp("model")
    steps = {"codec_max_steps": 300, "decoder_steps": 150, "max_train_steps": 10, "num_programs": 8}
    train(pbmc, TrainingConfig(output_dir=folder, label_keys=["cell_type"], **steps))
    return ScRNAGenerationPipeline.from_pretrained(folder)


def test_every_gene_has_the_mean_of_its_type(trained, pbmc):
    """Also the genes that the encoder does not read, such as markers of one type."""
    assert trained.codec.encoder[0].in_features == 151 and trained.codec.config.num_genes == pbmc.n_vars
    assert list(trained.processor.var_names) == list(pbmc.var_names)
    train_cells, _ = CellSplit.load(trained.config._name_or_path).apply(pbmc)
    latents, labels = trained.encode_cells(train_cells), trained.processor.encode_labels(train_cells)
    drawn = [trained.decode_latents(latents, labels, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    others = np.setdiff1d(np.arange(pbmc.n_vars), trained.codec.encoder_genes.numpy())
    real = train_cells.X.toarray()[:, others]
    generated = np.mean([cells.X.toarray()[:, others] for cells in drawn], axis=0)
    frequent = real.sum(axis=0) > MIN_COUNTS
    assert frequent.sum() > 20
    np.testing.assert_allclose(generated.mean(axis=0)[frequent], real.mean(axis=0)[frequent], rtol=0.12)
    types = train_cells.obs["cell_type"].to_numpy()
    changes = []
    names, numbers = np.unique(types, return_counts=True)
    for matrix in (real[:, frequent], generated[:, frequent]):
        means = np.stack([matrix[types == name].mean(axis=0) for name in names[numbers > 30]])
        changes.append(np.log((means + 0.05) / (matrix.mean(axis=0) + 0.05)))
    assert np.corrcoef(changes[0].ravel(), changes[1].ravel())[0, 1] > 0.95  # with constant shares: 0
    assert np.polyfit(changes[0].ravel(), changes[1].ravel(), 1)[0] == pytest.approx(1, abs=0.15)


def test_a_saved_codec_is_the_same(trained, tmp_path):
    trained.codec.save_pretrained(tmp_path)
    again, latents = ProgramCodec.from_pretrained(tmp_path), torch.randn(5, trained.codec.num_features)
    torch.testing.assert_close(again.decode(latents).mean(), trained.codec.decode(latents).mean())
    assert torch.equal(again.encoder_genes, trained.codec.encoder_genes)


def test_a_regression_finds_slopes_and_dispersion():
    rng = np.random.default_rng(0)
    programs, sizes = rng.normal(size=(3000, 2)), rng.lognormal(8, 0.4, 3000)
    slopes, dispersion = np.array([[0.5, -0.3], [0.0, 0.8], [0.0, 0.0]]), np.array([0.2, 1.0, 1e-9])
    means = sizes[:, None] * np.exp(-7 + programs @ slopes.T)
    counts = rng.poisson(means * rng.gamma(1 / dispersion, dispersion, means.shape))
    design = torch.from_numpy(np.column_stack([np.ones(3000), programs])).float()
    counts, offset = torch.from_numpy(counts).float(), torch.from_numpy(np.log(sizes)).float()
    coefficients, log_theta = regress(counts, offset, design, torch.tensor([1e-3, 1.0, 1.0]))
    np.testing.assert_allclose(coefficients[0], -7, atol=0.06)
    np.testing.assert_allclose(coefficients[1:].T, slopes, atol=0.06)
    np.testing.assert_allclose((-log_theta).exp()[:2], dispersion[:2], rtol=0.2)
    assert log_theta[2] > 3.5  # nearly Poisson
    # Read counts of full-length protocols do not make a linear predictor overshoot.
    reads = torch.from_numpy(rng.poisson(means[:240] * 50) * (rng.random((240, 3)) < 0.3)).float()
    fitted, _ = regress(reads, offset[:240], design[:240], torch.tensor([1e-3, 30.0, 30.0]))
    expected = (offset[:240, None] + design[:240] @ fitted).exp().sum(0)
    np.testing.assert_allclose(expected, reads.sum(0), rtol=0.3)
    rare, _ = regress(torch.zeros(3000, 1).index_fill(0, torch.tensor([5]), 3.0), offset, design, torch.ones(3))
    assert rare.isfinite().all()  # three counts in one cell


@pytest.mark.filterwarnings("ignore")  # of UMAP and Scanpy
def test_scanpy_on_generated_pbmcs(shared_data, tmp_path):
    """By default, textbook markers are there, and the standard workflow gives their real means as it stands."""
    real = read_cells(shared_data("pbmc3k"))
    steps = {"codec_max_steps": 400, "decoder_steps": 200, "max_train_steps": 300, "num_programs": 16}
    pipe = train(real, TrainingConfig(output_dir=tmp_path, label_keys=["cell_type"], **steps))
    pipe.set_progress_bar_config(disable=True)
    labels = real.obs["cell_type"].astype(str).tolist()
    cells = pipe(cell_types=labels, generator=torch.Generator().manual_seed(0)).cells
    assert set(MARKERS) <= set(cells.var_names) and cells.n_vars > 13_000
    assert cells.obs["generated"].all()
    both = ad.concat({"real": real[:, cells.var_names], "generated": cells}, label="source", index_unique="-")
    counts = (
        real[:, MARKERS].X.sum(axis=0).A1 if hasattr(real.X, "A1") else np.asarray(real[:, MARKERS].X.sum(0)).ravel()
    )
    sc.pp.normalize_total(both, target_sum=1e4)
    of_source = [both[both.obs["source"] == name, MARKERS].X.toarray() for name in ("real", "generated")]
    mean, expected = (values.mean(axis=0) for values in of_source[::-1])
    standard_error = np.sqrt(sum(values.var(axis=0) / len(values) for values in of_source))
    frequent = counts > MIN_COUNTS
    assert frequent.sum() >= 9
    assert (np.abs(mean - expected) < 0.1 * expected + 2 * standard_error)[frequent].all()
    assert (mean > 0).all()
    sc.pp.log1p(cells)
    sc.pp.pca(cells, n_comps=20)
    sc.pp.neighbors(cells)
    sc.tl.umap(cells, maxiter=50)
    assert cells.obsm["X_umap"].shape == (real.n_obs, 2)
