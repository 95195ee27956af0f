import anndata as ad
import h5py
import numpy as np
import pytest
import torch
from conftest import awkward
from forms import in_form
from scipy import sparse

from wbdit_diffusers import ScRNAProcessor
from wbdit_diffusers.data import AnnDataSource, BackedSource, PrepareConfig, PreparedCells, prepare, read_cells
from wbdit_diffusers.data.cells import NotByCellError


@pytest.fixture(scope="module")
def processor(pbmc) -> ScRNAProcessor:
    return ScRNAProcessor(num_genes=200).fit(pbmc)


@pytest.mark.parametrize(
    "form", ["csc", "dense", "layer", "backed", "int64", "stored zeros", "a view", "several chunks"]
)
def test_every_form_of_the_matrix_is_the_same(form, processor, pbmc, pbmc_path, monkeypatch):
    expected, library_size = processor.select(pbmc)
    adata, layer = in_form(pbmc, form)
    if form == "backed":
        adata = ad.read_h5ad(pbmc_path, backed="r")
    elif form == "a view":
        adata = ad.concat([adata, adata], index_unique="-")[:700]
    elif form == "several chunks":
        monkeypatch.setattr("wbdit_diffusers.data.cells.CHUNK_SIZE", 300)
    again = ScRNAProcessor(num_genes=200, layer=layer).fit(adata)
    assert list(again.var_names) == list(processor.var_names)
    matrix, totals = again.select(adata)
    assert sparse.isspmatrix_csr(matrix) and (matrix != expected).nnz == 0
    np.testing.assert_allclose(totals, library_size)


@pytest.mark.parametrize("place", ["memory", "backed", "csc", "h5ad", "zarr", "dense", "prepared"])
def test_raw_decimal_counts_next_to_antibodies(place, pbmc, processor, tmp_path, caplog):
    expected, library_size = processor.select(pbmc[:100])
    cells, settings = awkward(pbmc[:100])
    path = tmp_path / ("cells.zarr" if place == "zarr" else "cells.h5ad")
    if place in ("csc", "dense"):
        raw = cells.raw.to_adata()
        raw.X = sparse.csc_matrix(raw.X) if place == "csc" else raw.X.toarray()
        cells.raw = raw
    if place not in ("memory", "csc"):
        cells.write_zarr(path) if place == "zarr" else cells.write_h5ad(path)
    reader = ScRNAProcessor(var_names=list(processor.var_names), **settings)
    if place == "backed":
        cells = ad.read_h5ad(path, backed="r")
    elif place in ("h5ad", "zarr", "dense"):
        cells = BackedSource(path, **settings)
    elif place == "prepared":
        prepare(PrepareConfig(files=[path], output_dir=tmp_path / "out", test_fraction=0, **settings))
        cells, reader = read_cells(tmp_path / "out")[pbmc.obs_names[:100]], processor
    matrix, totals = reader.select(cells)
    assert (matrix != expected).nnz == 0
    np.testing.assert_array_equal(totals, library_size)
    if place in ("h5ad", "prepared"):  # opened once, and twice
        assert caplog.text.count(f"12 features of {path} are Antibody Capture, not genes, and are left out.") == 1


@pytest.mark.parametrize("kind", ["Peaks", "Gene Expression", np.nan])
def test_features_of_one_kind_stay(kind, pbmc):
    cells = pbmc[:20, :700].copy()
    cells.var["feature_types"] = kind
    assert len(AnnDataSource(cells).var_names) == 700


def test_rounding_is_for_counts(pbmc_path, tmp_path):
    with pytest.raises(ValueError, match="round_counts.* is for counts: leave it out with values='log'"):
        ScRNAProcessor(values="log", round_counts=True)
    with pytest.raises(ValueError, match="--round_counts is for counts: leave it out with --values log"):
        prepare(PrepareConfig(files=[pbmc_path], output_dir=tmp_path / "out", values="log", round_counts=True))


# ==================== Files ====================


@pytest.fixture(scope="module")
def sources(pbmc, tmp_path_factory):
    """The same training cells in memory, in files that stay on disk, and prepared."""
    folder = tmp_path_factory.mktemp("sources")
    pbmc.write_h5ad(folder / "pbmc.h5ad")
    prepare(PrepareConfig(files=[folder / "pbmc.h5ad"], output_dir=folder / "prepared", label_keys=["cell_type"]))
    train = read_cells(folder / "prepared", "train")
    train.X = train.X.astype(np.float32)
    with_others = ad.concat([pbmc[:20], train], index_unique="-")  # whose first cells are left out again
    with_others.write_h5ad(folder / "train.h5ad")
    train.write_zarr(folder / "train.zarr")
    dense = ad.AnnData(train.X.toarray(), obs=train.obs, var=train.var)
    dense.write_h5ad(folder / "dense.h5ad")
    return {
        "memory": AnnDataSource(train),
        "h5ad": BackedSource(folder / "train.h5ad").take(np.arange(20, 578)),
        "zarr": BackedSource(folder / "train.zarr"),
        "dense": BackedSource(folder / "dense.h5ad"),
        "parquet": PreparedCells(folder / "prepared"),
        "fsspec": PreparedCells(f"file://{folder / 'prepared'}"),
    }


@pytest.mark.parametrize("name", ["h5ad", "zarr", "dense", "parquet", "fsspec"])
def test_a_processor_learns_the_same_from_every_source(name, sources):
    expected = ScRNAProcessor(label_keys=["cell_type"], num_genes=100).fit(sources["memory"])
    fitted = ScRNAProcessor(label_keys=["cell_type"], num_genes=100).fit(sources[name])
    assert fitted.config.var_names == expected.config.var_names
    assert fitted.config.categories == expected.config.categories
    for statistic in ("label_combinations", "label_frequencies", "library_size_quantiles"):
        assert torch.equal(getattr(fitted, statistic), getattr(expected, statistic))
    matrix, library_size = fitted.select(sources[name])
    expected_matrix, expected_size = expected.select(sources["memory"])
    assert (matrix != expected_matrix).nnz == 0 and matrix.dtype == np.float32
    np.testing.assert_array_equal(library_size, expected_size)
    assert torch.equal(fitted.encode_labels(sources[name]), expected.encode_labels(sources["memory"]))


@pytest.mark.parametrize("name", ["memory", "h5ad", "dense"])
def test_each_value_is_checked_once(name, sources, monkeypatch):
    source, checked = sources[name].take(np.arange(100)), []
    monkeypatch.setattr("wbdit_diffusers.data.cells.check_values", lambda matrix, *_: checked.append(matrix.shape[0]))
    processor = ScRNAProcessor(num_genes=100).fit(source)
    processor.select(source)
    assert checked == [100]


# ==================== Bad input ====================

VALUES = [
    (np.nan, "counts", "holds nan .cell '{cell}'., which can't be modelled: remove or replace"),
    (np.inf, "counts", "holds inf .cell '{cell}'."),
    (-1, "counts", "holds -1 .cell '{cell}'., but expression is never negative: .*values='log'"),
    (0.5, "counts", "holds 0.5 .cell '{cell}'., which is not an integer count: name .* with --round_counts, or"),
    (3e38, "counts", "holds 3e.38 .cell '{cell}'., which is not a count"),
    (51, "log", "holds 51 .cell '{cell}'., which is not a logarithm of expression: use values='counts'"),
]


@pytest.mark.parametrize("value, values, message", VALUES)
def test_a_bad_value_is_named_with_its_cell_and_the_fix(value, values, message, pbmc, monkeypatch):
    monkeypatch.setattr("wbdit_diffusers.data.cells.CHUNK_SIZE", 2)
    cells = pbmc[:5].copy()
    if values == "log":
        cells.X = cells.X.log1p()
    matrix = cells.X.tolil()
    matrix[2, 0] = value
    wrong = ad.AnnData(matrix.tocsr(), obs=cells.obs, var=cells.var)
    processor = ScRNAProcessor(values=values, num_genes=50, recover_counts=False)
    for read in (processor.fit, ScRNAProcessor(values=values, recover_counts=False).fit(cells).select):
        with pytest.raises(ValueError, match=message.format(cell=pbmc.obs_names[2])):
            read(wrong)


def test_empty_cells_are_named(pbmc):
    zeros = pbmc.copy()
    zeros.X = sparse.csr_matrix(zeros.X.toarray() * (np.arange(700) != 4)[:, None])
    with pytest.raises(ValueError, match=rf"1 cells .*no counts at all.*'{pbmc.obs_names[4]}'.*filter_cells"):
        ScRNAProcessor().fit(zeros)


def test_a_file_that_cannot_be_read_by_cell(pbmc, tmp_path):
    cells, _ = in_form(pbmc, "csc")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(NotByCellError, match="stored by gene .CSC.: use `adata.X"):
        BackedSource(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "a") as file:  # as AnnData 0.6 wrote it
        del file["X"].attrs["encoding-type"]
    with pytest.raises(NotByCellError, match="as AnnData did before 0.7: .* write it again"):
        BackedSource(tmp_path / "cells.h5ad")
