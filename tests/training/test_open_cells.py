"""The cells of a training: the same from memory, from files of any size, and from a prepared folder."""

import re

import anndata as ad
import numpy as np
import pytest
from conftest import awkward
from scipy import sparse
from tiny import tiny_config

from wbdit_diffusers import ScRNAProcessor
from wbdit_diffusers.data import CellSplit, PrepareConfig, prepare, read_cells
from wbdit_diffusers.data.cells import BackedSource
from wbdit_diffusers.training import train
from wbdit_diffusers.training.cells import open_cells


@pytest.fixture(scope="module")
def folder(pbmc, tmp_path_factory):
    """In the order of cell types."""
    path = tmp_path_factory.mktemp("prepared")
    by_type = pbmc[np.argsort(pbmc.obs["cell_type"].cat.codes, kind="stable")].copy()
    by_type.write_h5ad(path / "pbmc.h5ad")
    prepare(PrepareConfig(files=[path / "pbmc.h5ad"], output_dir=path / "prepared", label_keys=["cell_type"]))
    return path / "prepared"


def config_of(tmp_path, **changes):
    return tiny_config(tmp_path / "out", **{"label_keys": ["cell_type"], **changes})


def with_an_empty_cell(pbmc) -> ad.AnnData:
    keeps = np.ones((700, 1))
    keeps[5] = 0
    matrix = sparse.csr_matrix(pbmc.X.multiply(keeps), dtype=np.float32)
    matrix.eliminate_zeros()
    return ad.AnnData(matrix, obs=pbmc.obs, var=pbmc.var)


@pytest.mark.parametrize(
    "suffix, layer, kind",
    [("h5ad", None, "csr"), ("zarr", "raw", "csr"), ("h5ad", None, "dense"), ("h5ad", None, "nullable names")],
)
def test_a_large_file_gives_the_cells_of_memory(suffix, layer, kind, pbmc, tmp_path, monkeypatch):
    cells = with_an_empty_cell(pbmc)
    if kind == "dense":
        cells.X = cells.X.toarray()
    if layer is not None:
        cells.layers[layer], cells.X = cells.X.copy(), cells.X * 0.5
    elif kind == "nullable names":  # as pandas 3 has them
        cells.obs_names, cells.var_names = (names.astype("string") for names in (cells.obs_names, cells.var_names))
    path = tmp_path / f"cells.{suffix}"
    with ad.settings.override(allow_write_nullable_strings=True):
        cells.write_h5ad(path) if suffix == "h5ad" else cells.write_zarr(path)
    in_file = ad.read_h5ad(path, backed="r") if suffix == "h5ad" else cells
    config = config_of(tmp_path, layer=layer)
    processor = ScRNAProcessor(layer=layer, label_keys=["cell_type"], num_genes=100)
    found = {}
    for name, source, limit in (
        ("AnnData", cells, 1000),
        ("backed AnnData", in_file, 1000),
        ("small file", path, 1000),
        ("large file", path, 100),
    ):
        monkeypatch.setattr("wbdit_diffusers.data.cells.MAX_CELLS_IN_MEMORY", limit)
        with open_cells(source, config) as (train_cells, test_cells, split):
            assert isinstance(train_cells, BackedSource) == (name == "large file")
            monkeypatch.undo()  # genes are chosen from all cells
            matrices = processor.fit(train_cells).select(train_cells)[0], processor.select(test_cells)[0]
            labels = list(train_cells.obs["cell_type"])
            found[name] = split, list(processor.var_names), *(matrix.toarray() for matrix in matrices), labels
    assert len(found["AnnData"][0].train) + len(found["AnnData"][0].test) == 699
    for others in found.values():
        for value, expected in zip(others, found["AnnData"]):
            np.testing.assert_equal(value, expected)


def test_raw_decimal_counts_next_to_antibodies(pbmc, tmp_path, monkeypatch):
    """A cell that has no counts once they are rounded is empty."""
    few = with_an_empty_cell(pbmc)[:100]
    cells, settings = awkward(few)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with open_cells(few, config_of(tmp_path)) as (train_cells, _, split):
        processor = ScRNAProcessor(num_genes=60).fit(train_cells)
        expected = processor.select(train_cells)[0]
    reader = ScRNAProcessor(var_names=list(processor.var_names), **settings)
    for source, limit in ((cells, 1000), (tmp_path / "cells.h5ad", 1000), (tmp_path / "cells.h5ad", 50)):
        monkeypatch.setattr("wbdit_diffusers.data.cells.MAX_CELLS_IN_MEMORY", limit)
        with open_cells(source, config_of(tmp_path, **settings)) as (train_cells, test_cells, again):
            assert again == split and (reader.select(train_cells)[0] != expected).nnz == 0
            assert (reader.select(test_cells)[0] != processor.select(few[test_cells.obs_names])[0]).nnz == 0


def test_held_out_cells_are_at_most_as_many_as_a_loss_needs(pbmc, pbmc_path, tmp_path, monkeypatch):
    monkeypatch.setattr("wbdit_diffusers.training.cells.MAX_TEST_CELLS", 50)
    for limit in (1000, 100):
        monkeypatch.setattr("wbdit_diffusers.data.cells.MAX_CELLS_IN_MEMORY", limit)
        with open_cells(pbmc_path, config_of(tmp_path)) as (train_cells, test_cells, split):
            assert (test_cells.n_obs, len(train_cells.obs), len(split.test)) == (50, 558, 142)
            assert set(test_cells.obs_names) < set(split.test)


def test_a_file_stored_by_gene_is_read_whole(pbmc, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("wbdit_diffusers.data.cells.MAX_CELLS_IN_MEMORY", 100)
    ad.AnnData(sparse.csc_matrix(pbmc.X), obs=pbmc.obs, var=pbmc.var).write_h5ad(tmp_path / "cells.h5ad")
    with open_cells(tmp_path / "cells.h5ad", config_of(tmp_path)) as (train_cells, _, split):
        matrix, _ = ScRNAProcessor(num_genes=None, min_cells=0).fit(train_cells).select(train_cells)
        assert (matrix != pbmc[split.train].X).nnz == 0
    assert "stored by gene" in caplog.text


# ==================== Prepared folders ====================


def test_a_prepared_folder_has_its_own_split(folder, tmp_path):
    for path in (folder, f"file://{folder}"):
        with open_cells(path, config_of(tmp_path)) as (train_cells, test_cells, split):
            assert (len(train_cells.obs), test_cells.n_obs) == (558, 142)
    (tmp_path / "out").mkdir()
    split.save(tmp_path / "out")
    train_cells, test_cells = CellSplit.load(tmp_path / "out").read(folder)
    assert (train_cells.n_obs, test_cells.n_obs) == (558, 142)
    assert train_cells.obs_names.equals(read_cells(folder, "train").obs_names)
    with open_cells(folder, config_of(tmp_path, resume_from_checkpoint="latest")) as (*_, again):
        assert again == split


def test_a_prepared_folder_trains(folder, tmp_path):
    pipe = train(folder, config_of(tmp_path, codec="expression", max_train_steps=1))
    assert pipe.processor.condition_sizes == (10,)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"values": "log"}, "not a logarithm of expression: use values='counts'"),
        ({"label_keys": ["louvain"]}, "no column 'louvain'; it has ['cell_type', 'phase']"),
        ({"split": "split.json"}, "is not the prepared folder of the split"),
    ],
)
def test_what_a_prepared_folder_is_not(changes, message, folder, pbmc, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    CellSplit.draw(pbmc).save(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        train(folder, config_of(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def test_another_prepared_folder(folder, pbmc_path, tmp_path):
    prepare(PrepareConfig(files=[pbmc_path], output_dir=tmp_path / "all", label_keys=[], test_fraction=0))
    with (
        pytest.raises(ValueError, match="has no split 'test', only train"),
        open_cells(tmp_path / "all", config_of(tmp_path, label_keys=[])),
    ):
        pass
    (tmp_path / "out").mkdir()
    CellSplit([], [], 0, "0" * 64).save(tmp_path / "out")
    with (
        pytest.raises(ValueError, match="is not the prepared folder of the split"),
        open_cells(folder, config_of(tmp_path, resume_from_checkpoint="latest")),
    ):
        pass


def test_copies_stay_on_one_side_of_the_split(pbmc, tmp_path):
    both = ad.concat([pbmc, pbmc[:80]], index_unique="-")
    with open_cells(both, tiny_config(tmp_path)) as (train, test, split):
        pass
    sides = {name.rpartition("-")[0]: side for side in ("train", "test") for name in getattr(split, side)}
    assert all(name.rpartition("-")[0] in sides for name in both.obs_names)
    for side in ("train", "test"):
        assert all(sides[name.rpartition("-")[0]] == side for name in getattr(split, side))
