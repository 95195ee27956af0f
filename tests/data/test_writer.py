"""What `write_cells` leaves behind: the whole file, or what was there before."""

import resource
import signal
import stat
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from wbdit_diffusers.data import read_cells, write_cells
from wbdit_diffusers.data.writer import check_cells_file


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
    assert write_cells(tmp_path / "new" / name, batches(cells)) == (700, 50)
    again = READ[name](tmp_path / "new" / name)
    assert (again.X != cells.X).nnz == 0 and (again.layers["twice"] != cells.layers["twice"]).nnz == 0
    assert again.X.indptr.dtype == np.int64  # int32 ends at 2³¹ values
    assert again.obs.equals(cells.obs) and again.var_names.equals(cells.var_names)
    np.testing.assert_array_equal(again.obsm["X_programs"], cells.obsm["X_programs"])
    np.testing.assert_array_equal(again.varm["programs"], cells.varm["programs"])
    assert again.uns["wbdit"] == cells.uns["wbdit"]
    assert [file.name for file in (tmp_path / "new").iterdir()] == [name]


@pytest.mark.parametrize("name", ["cells", "cells.parquet", "cells.v2/"])
def test_a_folder_of_parquet_files_holds_sparse_rows(cells, name, tmp_path, monkeypatch):
    monkeypatch.setattr("wbdit_diffusers.data.writer.CELLS_PER_FILE", 600)
    assert write_cells(f"{tmp_path}/{name}", batches(cells)) == (700, 50)
    folder = tmp_path / name
    assert sorted(file.name for file in folder.iterdir()) == [
        "cells-00000.parquet",
        "cells-00001.parquet",
        "genes.parquet",
    ]
    table = pq.read_table(sorted(folder.glob("cells-*.parquet")))
    rows, genes, values = (table.column(key).to_pylist() for key in ("cell", "genes", "expressions"))
    assert rows == list(cells.obs_names)
    indptr = np.cumsum([0, *map(len, genes)])
    matrix = sparse.csr_matrix((np.concatenate(values), np.concatenate(genes), indptr), cells.shape)
    assert (matrix != cells.X).nnz == 0
    names = pq.read_table(folder / "genes.parquet").column("gene").to_pylist()
    assert names == list(cells.var_names)
    codes = table.column("cell_type").to_numpy()
    assert list(cells.obs["cell_type"].cat.categories[codes]) == list(cells.obs["cell_type"])
    assert b"ClassLabel" in table.schema.metadata[b"huggingface"]


def test_parquet_files_are_read_again(cells, tmp_path, monkeypatch):
    """All but `uns`; also where a layer holds the counts of log values."""
    monkeypatch.setattr("wbdit_diffusers.data.writer.CELLS_PER_FILE", 600)
    for name, given in (("cells", cells), ("log", cells.copy())):
        if name == "log":
            given.layers["counts"] = given.X.copy()
            given.X = given.X.log1p()
        write_cells(tmp_path / name, batches(given))
        again = read_cells(tmp_path / name)
        assert (again.X != given.X).nnz == 0 and list(again.layers) == list(given.layers)
        pd.testing.assert_frame_equal(again.obs, given.obs, check_names=False)
        assert list(again.var_names) == list(given.var_names)
        for part in ("obsm", "varm"):
            assert list(getattr(again, part)) == list(getattr(given, part))
            for key, values in getattr(given, part).items():
                np.testing.assert_allclose(getattr(again, part)[key], values, rtol=1e-6)
    assert (again.layers["counts"] != cells.X).nnz == 0
    pq.write_table(pq.read_table(tmp_path / "cells" / "genes.parquet").slice(0, 10), tmp_path / "cells/genes.parquet")
    with pytest.raises(ValueError, match="cells is damaged"):
        read_cells(tmp_path / "cells")
    (tmp_path / "log" / "cells-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="log is damaged"):
        read_cells(tmp_path / "log")


@pytest.mark.parametrize("name", ["cells.h5ad", "cells.zarr", "cells"])
def test_what_was_there_is_replaced_at_the_end(cells, name, tmp_path):
    write_cells(tmp_path / name, batches(cells[:10].copy()))

    def failing():
        yield next(batches(cells))
        raise ValueError("no more")

    before = sorted(path.name for path in tmp_path.rglob("*"))
    for mistake, message in ((failing(), "no more"), (iter([]), "There are no cells to write")):
        with pytest.raises(ValueError, match=message):
            write_cells(tmp_path / name, mistake)
        assert sorted(path.name for path in tmp_path.rglob("*")) == before
    check_cells_file(tmp_path / name, {"cells.h5ad": "h5ad", "cells.zarr": "zarr"}.get(name, "parquet"), 10, 50)
    write_cells(tmp_path / name, batches(cells))
    check_cells_file(tmp_path / name, {"cells.h5ad": "h5ad", "cells.zarr": "zarr"}.get(name, "parquet"), 700, 50)


@pytest.mark.parametrize(
    "name, size",
    [*(("cells.h5ad", size) for size in (500, 3_000, 15_000, 20_000)), ("cells.zarr", 500), ("cells", 3_000)],
)
def test_a_write_that_is_refused_ends_at_once_with_one_line(cells, name, size, tmp_path):
    """As a full disk refuses it: HDF5 alone goes on, and crashes at the end."""
    (tmp_path / "before.txt").write_text("")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    taken = []

    def watched():
        for batch in batches(cells, 50):
            taken.append(batch)
            yield batch

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(OSError, match=f"{name} was not written: File too large") as error:
            write_cells(tmp_path / name, watched())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["before.txt"]
    if size <= 3_000:
        assert len(taken) < 14  # not all cells, only to fail at the end


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda file: file["X"]["indices"].__setitem__(slice(100, 200), 0), "X has wrong indices"),
        (lambda file: file["X"]["indices"].__setitem__(5, 50), "a gene that there is not"),
        (lambda file: file["X"]["data"].__setitem__(slice(100, 200), 0), "X/data holds zeros"),
        (lambda file: file["X"]["data"].__setitem__(7, np.nan), "NaN"),
        (lambda file: file["X"]["indptr"].__setitem__(5, 10**6), "descends|cut off"),
        (lambda file: file["X"]["data"].resize((50,)), "cut off"),
        (lambda file: file["layers/twice/data"].__setitem__(7, np.inf), "layers/twice holds NaN or infinite"),
        (lambda file: file["obs/library_size"].resize((50,)), "obs/library_size has 50 entries for 700 cells"),
        (lambda file: file["obs/cell_type/codes"].resize((50,)), "obs/cell_type has 50 entries"),
        (lambda file: file["obsm/X_programs"].resize((50, 2)), "obsm/X_programs has 50 entries"),
    ],
)
def test_a_file_is_looked_at_before_it_is_named(cells, damage, message, tmp_path):
    write_cells(tmp_path / "cells.h5ad", batches(cells))
    check_cells_file(tmp_path / "cells.h5ad", "h5ad", 700, 50)
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        damage(file)
    with pytest.raises(OSError, match=f"not what was written .*{message}"):
        check_cells_file(tmp_path / "cells.h5ad", "h5ad", 700, 50)


def test_only_files_are_replaced(cells, tmp_path):
    target = tmp_path / "target.h5ad"
    target.write_text("old")
    (tmp_path / "link.h5ad").symlink_to(target)
    write_cells(tmp_path / "link.h5ad", batches(cells))
    assert (tmp_path / "link.h5ad").is_symlink() and ad.read_h5ad(target).n_obs == 700
    for path in ("/dev/null", "/dev/full"):
        with pytest.raises((OSError, ValueError), match="is a device or a pipe, which is never replaced|suffix"):
            write_cells(path, batches(cells))
        assert stat.S_ISCHR(Path(path).stat().st_mode)


def test_two_writers_do_not_mix(cells, tmp_path):
    path = tmp_path / "cells.h5ad"

    def with_another_at_work():
        yield from batches(cells, 500)
        with pytest.raises(OSError, match="another process is writing"):
            write_cells(path, batches(cells))

    assert write_cells(path, with_another_at_work()) == (700, 50)
