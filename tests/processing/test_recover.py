"""Counts out of log values, on real cells that were normalised in the ways that files are."""

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import torch
from scipy import sparse

from wbdit_diffusers import ScRNAProcessor
from wbdit_diffusers.data import load_pbmc
from wbdit_diffusers.processing.recover import find_log_scale, recover_counts


@pytest.fixture(scope="module")
def counts() -> sparse.csr_matrix:
    return load_pbmc()[::4].X.astype(np.float64)


def normalised(counts, target_sum=1e4, ln_base=1.0, size_factors=None) -> sparse.csr_matrix:
    """As most files are made: float32 from the start."""
    library_size = np.asarray(counts.sum(1)).ravel() if size_factors is None else size_factors
    values = sparse.csr_matrix(sparse.diags_array((target_sum / library_size).astype(np.float32)) @ counts)
    values.data = (np.log1p(values.data.astype(np.float32)) / ln_base).astype(np.float32)
    return values


def assert_recovered(values, counts, library_size=None):
    scale = find_log_scale(values)
    recovered, sizes, found = recover_counts(values, scale)
    assert found.all() and (recovered != counts).nnz == 0
    np.testing.assert_allclose(sizes, np.asarray(counts.sum(1)).ravel() if library_size is None else library_size)
    return scale


@pytest.mark.parametrize("target_sum", [1e4, 1e6, 1234.5])
@pytest.mark.parametrize("base", [np.e, 2, 10])
def test_counts_of_normalised_cells(counts, target_sum, base):
    scale = assert_recovered(normalised(counts, target_sum, np.log(base)), counts)
    assert scale.target_sum == pytest.approx(target_sum, rel=1e-5) and scale.ln_base == pytest.approx(np.log(base))
    back = scale.apply(counts, np.asarray(counts.sum(1)).ravel())
    expected = normalised(counts, target_sum, np.log(base))
    np.testing.assert_allclose(back.toarray(), expected.toarray(), rtol=1e-5)


def test_counts_of_cells_whose_genes_were_chosen_afterwards(counts):
    """The library sizes, which the file no longer holds, are whole numbers."""
    library_size = np.asarray(counts.sum(1)).ravel()
    genes = np.sort(np.argsort(-np.asarray(counts.sum(0)).ravel())[:300])
    scale = assert_recovered(normalised(counts)[:, genes], counts[:, genes], library_size)
    assert scale.target_sum == 1e4 and scale.knows_library_size


def test_counts_with_size_factors_rounded_values_and_no_scaling(counts):
    factors = np.exp(np.random.default_rng(0).normal(0, 0.5, counts.shape[0]))
    assert not assert_recovered(normalised(counts, 1.0, size_factors=factors), counts).knows_library_size
    rounded = normalised(counts)
    rounded.data = rounded.data.round(4)
    assert assert_recovered(rounded, counts).decimals == 4
    raw = counts.copy()
    raw.data = np.log1p(raw.data)
    scale = assert_recovered(raw.astype(np.float32), counts)
    np.testing.assert_allclose(scale.apply(counts, np.ones(counts.shape[0])).toarray(), raw.toarray(), rtol=1e-5)


def other_values(counts) -> dict[str, sparse.csr_matrix]:
    rng = np.random.default_rng(0)
    values = normalised(counts)
    twice, rescaled, ambient = values.copy(), values.copy(), counts.copy()
    twice.data = np.log1p(twice.data)
    rescaled.data = 0.9 * rescaled.data + 0.05
    ambient.data = np.maximum(ambient.data - rng.uniform(0, 0.5, len(ambient.data)), 0.01)
    return {
        "divided by gene lengths": normalised(counts @ sparse.diags_array(1 / rng.uniform(0.5, 5, counts.shape[1]))),
        "means of two cells": normalised(sparse.csr_matrix(values[:-1].expm1() + values[1:].expm1())),
        "logarithm of logarithms": twice,
        "rescaled": rescaled,
        "corrected for ambient RNA": normalised(ambient),
        "counts": counts,
        "few genes": values[:, rng.permutation(counts.shape[1])[:40]],
    }


def test_values_that_are_no_log_counts_are_refused(counts):
    accepted = [name for name, values in other_values(counts).items() if find_log_scale(values) is not None]
    assert accepted == []


def test_published_tpm_values_are_refused(shared_data):
    values = ad.read_h5ad(shared_data("hnscc_puram_chetah_subset_log")).X
    assert find_log_scale(sparse.csr_matrix(values).astype(np.float32)) is None


def test_a_processor_gives_values_back_on_the_scale_of_the_file(pbmc):
    log_values = pbmc.copy()
    sc.pp.normalize_total(log_values, target_sum=1e4)
    sc.pp.log1p(log_values)
    processor = ScRNAProcessor(values="log", label_keys=["cell_type"]).fit(log_values)
    assert processor.is_counts
    matrix, library_size = processor.select(log_values)
    assert (matrix != pbmc[:, processor.var_names].X).nnz == 0
    sizes = torch.from_numpy(library_size)
    cells = processor.to_anndata(matrix, processor.encode_labels(log_values), sizes)
    np.testing.assert_allclose(cells.X.toarray(), log_values.X.toarray(), atol=2e-6)
    assert (cells.layers["counts"] != pbmc.X).nnz == 0
    np.testing.assert_allclose(cells.obs["library_size"], np.asarray(pbmc.X.sum(1)).ravel())

    broken = log_values.copy()
    broken.X.data[broken.X.indptr[3] : broken.X.indptr[4]] += 0.1
    with pytest.raises(ValueError, match=f"1 cells .the first is '{pbmc.obs_names[3]}'. are not logarithms to base e"):
        processor.select(broken)
    as_they_are = ScRNAProcessor(values="log", recover_counts=False).fit(log_values)
    assert not as_they_are.is_counts
    np.testing.assert_array_equal(as_they_are.select(log_values)[0].toarray(), log_values.X.toarray())
