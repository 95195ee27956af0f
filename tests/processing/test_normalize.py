import numpy as np
import pytest
import scanpy as sc
import torch
from scipy import sparse

from wbdit_diffusers.processing import TARGET_SUM, log_normalize
from wbdit_diffusers.processing.normalize import to_expression


@pytest.fixture(scope="module")
def library_size(pbmc) -> np.ndarray:
    return np.asarray(pbmc.X.sum(1)).ravel()


@pytest.fixture(scope="module")
def scanpy_s(pbmc) -> np.ndarray:
    normalised = pbmc.copy()
    sc.pp.normalize_total(normalised, target_sum=TARGET_SUM)
    sc.pp.log1p(normalised)
    return normalised.X.toarray()


def test_it_is_scanpy_s_for_every_kind_of_matrix(pbmc, library_size, scanpy_s):
    from_sparse = log_normalize(pbmc.X, library_size)
    assert sparse.isspmatrix_csr(from_sparse) and from_sparse.dtype == np.float32
    from_dense = log_normalize(pbmc.X.toarray(), library_size)
    from_torch = log_normalize(torch.from_numpy(pbmc.X.toarray()), torch.from_numpy(library_size))
    assert isinstance(from_dense, np.ndarray) and torch.is_tensor(from_torch)
    for values in (from_sparse.toarray(), from_dense, from_torch):
        np.testing.assert_allclose(values, scanpy_s, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float64])
def test_any_dtype_of_counts(dtype, pbmc, library_size, scanpy_s):
    counts = pbmc.X.astype(dtype)
    from_sparse = log_normalize(counts, library_size)
    assert from_sparse.dtype == np.float32
    np.testing.assert_allclose(from_sparse.toarray(), scanpy_s, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(log_normalize(counts.toarray(), library_size), scanpy_s, rtol=1e-5, atol=1e-6)


def test_genes_left_out_count_in_the_total(pbmc, library_size, scanpy_s):
    genes = np.arange(0, 765, 3)
    np.testing.assert_allclose(
        log_normalize(pbmc.X[:, genes], library_size).toarray(), scanpy_s[:, genes], rtol=1e-5, atol=1e-6
    )


def test_the_cells_given_are_not_changed(pbmc, library_size):
    before = pbmc.X.copy()
    log_normalize(pbmc.X, library_size)
    assert (pbmc.X != before).nnz == 0
    dense, tensor = before.toarray(), torch.from_numpy(before.toarray())
    log_normalize(dense, library_size)
    log_normalize(tensor, torch.from_numpy(library_size))
    np.testing.assert_array_equal(dense, before.toarray())
    np.testing.assert_array_equal(tensor, before.toarray())


def test_log_values_stay_as_they_are(pbmc, library_size, scanpy_s):
    assert to_expression(pbmc.X, library_size, "log") is pbmc.X
    np.testing.assert_allclose(to_expression(pbmc.X, library_size, "counts").toarray(), scanpy_s, rtol=1e-5, atol=1e-6)
