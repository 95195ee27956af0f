import anndata as ad
import numpy as np
import pytest
import torch
from scipy import sparse

from wbdit_diffusers import ScRNAProcessor
from wbdit_diffusers.data import AnnDataSource, PrepareConfig, PreparedCells, prepare, read_cells
from wbdit_diffusers.data.backed import BackedFile, BackedSource


@pytest.fixture(scope="module")
def processor(pbmc) -> ScRNAProcessor:
    return ScRNAProcessor(num_genes=200).fit(pbmc)


def with_value(adata: ad.AnnData, value: float) -> ad.AnnData:
    """A copy whose third cell holds a wrong value."""
    adata = adata.copy()
    matrix = adata.X.tolil()
    matrix[2, 0] = value
    adata.X = matrix.tocsr()
    return adata


@pytest.mark.parametrize(
    "form", ["csc", "dense", "layer", "backed", "int64", "stored zeros", "a view", "several chunks"]
)
def test_every_form_of_the_matrix_is_the_same(form, processor, pbmc, pbmc_path, monkeypatch):
    expected, library_size = processor.select(pbmc)
    layer, adata = None, pbmc.copy()
    if form == "csc":
        adata.X = sparse.csc_matrix(adata.X)
    elif form == "dense":
        adata.X = adata.X.toarray()
    elif form == "int64":
        adata.X = adata.X.astype(np.int64)
    elif form == "layer":
        layer = "counts"
        adata.layers["counts"] = adata.X.copy()
        adata.X = np.full(adata.shape, np.nan)
    elif form == "backed":
        adata = ad.read_h5ad(pbmc_path, backed="r")
    elif form == "stored zeros":  # a gene is not expressed because its zeros are written down
        dense = adata.X.toarray()
        adata.X = sparse.csr_matrix((dense.ravel(), np.tile(np.arange(765), 700), np.arange(0, 700 * 765 + 1, 765)))
    elif form == "a view":
        adata = ad.concat([adata, adata], index_unique="-")[:700]
    elif form == "several chunks":
        monkeypatch.setattr("wbdit_diffusers.data.source.CHUNK_SIZE", 300)
    again = ScRNAProcessor(num_genes=200, layer=layer).fit(adata)
    assert list(again.var_names) == list(processor.var_names)
    matrix, totals = again.select(adata)
    assert sparse.isspmatrix_csr(matrix) and (matrix != expected).nnz == 0
    np.testing.assert_allclose(totals, library_size)


def test_bad_values_are_named_with_their_cell_and_the_mend(pbmc, processor):
    cell = pbmc.obs_names[2]
    for read in (ScRNAProcessor().fit, processor.select):
        with pytest.raises(ValueError, match=rf"adata.X holds nan \(cell '{cell}'\).*remove or replace"):
            read(with_value(pbmc, np.nan))
        with pytest.raises(ValueError, match=rf"holds inf \(cell '{cell}'\).*remove or replace"):
            read(with_value(pbmc, np.inf))
        with pytest.raises(ValueError, match=rf"holds -1 \(cell '{cell}'\).*never negative.*values='log'"):
            read(with_value(pbmc, -1))
        with pytest.raises(ValueError, match=rf"holds 0.5 \(cell '{cell}'\).*no integer count.*values='log'"):
            read(with_value(pbmc, 0.5))
    with pytest.raises(ValueError, match=r"holds nan"):
        ScRNAProcessor(values="log").fit(with_value(pbmc, np.nan))
    with pytest.raises(ValueError, match="value of 259, which is no logarithm of expression: pass values='counts'"):
        ScRNAProcessor(values="log").fit(pbmc)


def test_a_bad_value_in_a_later_piece_is_named_with_its_own_cell(pbmc, monkeypatch):
    monkeypatch.setattr("wbdit_diffusers.data.source.CHUNK_SIZE", 2)
    with pytest.raises(ValueError, match=rf"holds 0.5 \(cell '{pbmc.obs_names[2]}'\)"):
        ScRNAProcessor().fit(with_value(pbmc[:5], 0.5))


def test_a_bad_layer_is_named(pbmc):
    with pytest.raises(ValueError, match=r"no layer 'counts'; it has \[\]"):
        ScRNAProcessor(layer="counts").fit(pbmc)
    adata = with_value(pbmc, np.nan)
    adata.layers["counts"], adata.X = adata.X.copy(), pbmc.X.copy()
    with pytest.raises(ValueError, match=r"adata.layers\['counts'\] holds nan"):
        ScRNAProcessor(layer="counts").fit(adata)


def test_empty_cells_are_named(pbmc):
    zeros = pbmc.copy()
    zeros.X = sparse.csr_matrix(zeros.X.toarray() * (np.arange(700) != 4)[:, None])
    with pytest.raises(ValueError, match=rf"1 cells .*no counts at all.*'{pbmc.obs_names[4]}'.*filter_cells"):
        ScRNAProcessor().fit(zeros)
    zeros.X = sparse.csr_matrix(pbmc.shape, dtype=np.float32)
    with pytest.raises(ValueError, match="700 cells .*no counts at all"):
        ScRNAProcessor().fit(zeros)


# ==================== One interface ====================


@pytest.fixture(scope="module")
def sources(pbmc, tmp_path_factory):
    """The same training cells in memory, in backed files, and prepared."""
    folder = tmp_path_factory.mktemp("sources")
    pbmc.write_h5ad(folder / "pbmc.h5ad")
    prepare([folder / "pbmc.h5ad"], folder / "prepared", PrepareConfig(label_keys=["cell_type"]))
    train = read_cells(folder / "prepared", "train")
    train.X = train.X.astype(np.float32)
    with_others = ad.concat([pbmc[:20], train], index_unique="-")  # whose first cells are left out again
    with_others.write_h5ad(folder / "train.h5ad")
    train.write_h5ad(folder / "train_alone.h5ad")
    train.write_zarr(folder / "train.zarr")
    return {
        "memory": AnnDataSource(train),
        "backed AnnData": AnnDataSource(ad.read_h5ad(folder / "train_alone.h5ad", backed="r")),
        "h5ad": BackedSource(BackedFile(folder / "train.h5ad"), np.arange(20, 578)),
        "zarr": BackedSource(BackedFile(folder / "train.zarr")),
        "parquet": PreparedCells(folder / "prepared"),
        "fsspec": PreparedCells(f"file://{folder / 'prepared'}"),
    }


@pytest.mark.parametrize("name", ["backed AnnData", "h5ad", "zarr", "parquet", "fsspec"])
def test_a_processor_knows_the_same_from_every_source(name, sources):
    expected = ScRNAProcessor(label_keys=["cell_type"], num_genes=100).fit(sources["memory"].adata)
    fitted = ScRNAProcessor(label_keys=["cell_type"], num_genes=100).fit(sources[name])
    assert fitted.config.var_names == expected.config.var_names
    assert fitted.config.categories == expected.config.categories
    for statistic in ("library_size_quantiles", "label_combinations", "label_frequencies"):
        assert torch.equal(getattr(fitted, statistic), getattr(expected, statistic))
    matrix, library_size = fitted.select(sources[name])
    expected_matrix, expected_size = expected.select(sources["memory"].adata)
    assert (matrix != expected_matrix).nnz == 0 and matrix.dtype == np.float32
    np.testing.assert_array_equal(library_size, expected_size)
    assert torch.equal(fitted.encode_labels(sources[name]), expected.encode_labels(sources["memory"].adata))


def test_a_source_has_no_layers(sources):
    with pytest.raises(ValueError, match="one matrix and no layer 'counts': leave `layer` out"):
        ScRNAProcessor(layer="counts").fit(sources["parquet"])
