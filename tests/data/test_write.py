"""`write_cells` leaves a whole file, or nothing."""

import resource
import signal

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from wbdit_diffusers.data import PreparedCells, read_cells, write_cells


@pytest.fixture(scope="module")
def cells(pbmc) -> ad.AnnData:
    cells = pbmc[:, :50].copy()
    cells.X = cells.X.astype(np.float32)
    cells.layers["twice"] = cells.X * 2
    cells.obs["library_size"] = np.asarray(cells.X.sum(1)).ravel()
    cells.obsm["X_programs"] = np.arange(1400, dtype=np.float32).reshape(700, 2)
    cells.varm["programs"] = np.ones((50, 2), dtype=np.float32)
    cells.uns["wbdit"] = {"seed": 1, "model_id": "me/model"}
    return cells


def batches(cells, size=300):
    for start in range(0, cells.n_obs, size):
        batch = cells[start : start + size].copy()
        for key in ("cell_type", "phase"):
            batch.obs[key] = batch.obs[key].cat.set_categories(cells.obs[key].cat.categories)
        yield batch


READ = {"cells.h5ad": ad.read_h5ad, "cells.zarr": ad.read_zarr}


@pytest.mark.parametrize("name", READ)
def test_batches_are_one_anndata(cells, name, tmp_path):
    write_cells(tmp_path / "new" / name, batches(cells))
    again = READ[name](tmp_path / "new" / name)
    assert (again.X != cells.X).nnz == 0 and (again.layers["twice"] != cells.layers["twice"]).nnz == 0
    assert again.X.indptr.dtype == np.int64  # int32 ends at 2³¹ values
    assert again.obs.equals(cells.obs) and again.var_names.equals(cells.var_names)
    np.testing.assert_array_equal(again.obsm["X_programs"], cells.obsm["X_programs"])
    np.testing.assert_array_equal(again.varm["programs"], cells.varm["programs"])
    assert again.uns["wbdit"] == cells.uns["wbdit"]
    assert [file.name for file in (tmp_path / "new").iterdir()] == [name]


@pytest.mark.parametrize("kind", ["log", "counts"])
def test_parquet_files_are_read_again(kind, cells, tmp_path):
    """All but `uns`. Counts, which are float32 in generated cells, have a total."""
    given = cells.copy()
    if kind == "log":
        given.layers["counts"], given.X = given.X.copy(), given.X.log1p()
    folder = tmp_path / ("cells.parquet" if kind == "log" else "cells")
    write_cells(folder, batches(given))
    assert sorted(file.name for file in folder.iterdir()) == ["cells.json", "data", "genes.parquet"]
    assert PreparedCells(folder).metadata["values"] == kind
    again = read_cells(folder)
    assert (again.X != given.X).nnz == 0 and list(again.layers) == list(given.layers)
    for name, layer in given.layers.items():
        assert (again.layers[name] != layer).nnz == 0
    if kind == "counts":
        np.testing.assert_array_equal(again.obs.pop("total_counts"), np.asarray(given.X.sum(1)).ravel())
    pd.testing.assert_frame_equal(again.obs, given.obs, check_names=False)
    assert list(again.var_names) == list(given.var_names)
    for part in ("obsm", "varm"):
        assert list(getattr(again, part)) == list(getattr(given, part))
        for key, values in getattr(given, part).items():
            np.testing.assert_allclose(getattr(again, part)[key], values, rtol=1e-6)


@pytest.mark.parametrize("name", ["cells.h5ad", "cells.zarr", "cells"])
def test_an_output_that_exists_is_refused_and_stays(cells, name, tmp_path):
    write_cells(tmp_path / name, batches(cells[:10].copy()))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OSError, match=f"{name} exists: remove it, or give another path"):
        write_cells(tmp_path / name, batches(cells))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["cells.h5ad", "cells.zarr", "cells"])
def test_a_failure_leaves_nothing(cells, name, tmp_path):
    def failing():
        yield next(batches(cells))
        raise ValueError("no more")

    for mistake, message in ((failing(), "no more"), (iter([]), "There are no cells to write")):
        with pytest.raises(ValueError, match=message):
            write_cells(tmp_path / name, mistake)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["cells.zarr", "cells"])
def test_a_write_that_is_refused_ends_with_one_line(cells, name, tmp_path):
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(OSError, match=f"{name} was not written: ") as error:
            write_cells(tmp_path / name, batches(cells))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(error.value)
    assert not (tmp_path / name).exists()


def test_other_suffixes_are_refused(cells, tmp_path):
    with pytest.raises(ValueError, match="has the suffix '.csv': give an .h5ad file"):
        write_cells(tmp_path / "cells.csv", batches(cells))
