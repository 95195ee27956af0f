"""AnnData files to parquet and back."""

import importlib

import anndata as ad
import datasets
import numpy as np
import pandas as pd
import pytest
from forms import in_form
from scipy import sparse

from wbdit_diffusers.cli import main
from wbdit_diffusers.data import PrepareConfig, PreparedCells, prepare, read_cells


@pytest.fixture
def small_files(monkeypatch):
    """Several chunks, row groups and files of 700 cells."""
    module = importlib.import_module("wbdit_diffusers.data.prepare")
    for name, size in (("CHUNK_SIZE", 64), ("ROW_GROUP_SIZE", 50), ("CELLS_PER_FILE", 100)):
        monkeypatch.setattr(module, name, size)


def assert_same_cells(cells: ad.AnnData, expected: ad.AnnData):
    """Values bit by bit, names and labels; in any order of cells."""
    assert sorted(cells.obs_names) == sorted(expected.obs_names) and list(cells.var_names) == list(expected.var_names)
    cells = cells[expected.obs_names]
    counts = sparse.csr_matrix(expected.X)
    assert (cells.X != counts).nnz == 0 and cells.X.nnz == counts.nnz
    for key in expected.obs:
        assert list(cells.obs[key].astype(str)) == list(expected.obs[key].astype(str))


@pytest.mark.parametrize("form", ["h5ad", "zarr", "dense", "layer", "int64", "stored zeros"])
def test_counts_survive_bit_by_bit(form, pbmc, tmp_path, small_files):
    path = tmp_path / ("cells.zarr" if form == "zarr" else "cells.h5ad")
    expected = pbmc.copy()
    expected.obs["score"] = np.linspace(0, 1, 700)
    expected.obs["donor"] = [f"donor {i % 3}" for i in range(700)]
    expected.var["symbol"] = expected.var_names.str.lower()
    adata, layer = in_form(expected, form)
    adata.write_zarr(path) if form == "zarr" else adata.write_h5ad(path)
    metadata = prepare(PrepareConfig(files=[path], output_dir=tmp_path / "out", layer=layer, label_keys=["cell_type"]))
    assert len(metadata["splits"]["train"]) > 3
    cells = read_cells(tmp_path / "out")
    assert_same_cells(cells, expected)
    np.testing.assert_array_equal(cells.obs["total_counts"], np.asarray(cells.X.sum(1)).ravel())
    np.testing.assert_array_equal(cells[adata.obs_names].obs["score"], adata.obs["score"])
    assert list(cells.var["symbol"]) == list(adata.var["symbol"])
    np.testing.assert_array_equal(cells.var["num_cells"], expected.X.getnnz(axis=0))
    assert [path.name for path in tmp_path.iterdir()].count("out") == 1 and len(list(tmp_path.iterdir())) == 2


def test_log_values_are_kept_in_float32_and_need_no_split(pbmc, tmp_path):
    adata = pbmc.copy()
    adata.X = sparse.csr_matrix(np.log1p(pbmc.X.toarray() * 1.37).astype(np.float32))
    adata.write_h5ad(tmp_path / "log.h5ad")
    with pytest.raises(ValueError, match="not an integer count.*values='log'"):
        prepare(PrepareConfig(files=[tmp_path / "log.h5ad"], output_dir=tmp_path / "out", label_keys=[]))
    prepare(
        PrepareConfig(
            files=[tmp_path / "log.h5ad"], output_dir=tmp_path / "out", label_keys=[], values="log", test_fraction=0
        )
    )
    assert_same_cells(read_cells(tmp_path / "out"), adata)
    with pytest.raises(ValueError, match="no split 'test', only train"):
        read_cells(tmp_path / "out", "test")


def test_labels_are_not_needed(pbmc, tmp_path):
    ad.AnnData(pbmc.X, var=pbmc.var).write_h5ad(tmp_path / "cells.h5ad")
    prepare(PrepareConfig(files=[tmp_path / "cells.h5ad"], output_dir=tmp_path / "out"))
    assert len(PreparedCells(tmp_path / "out").obs) == 560


def test_datasets_reads_it_with_labels(pbmc_path, pbmc, tmp_path):
    main(["prepare", str(pbmc_path), "--output_dir", str(tmp_path / "out"), "--label_keys", "cell_type"])
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 558, "test": 142}
    row = loaded["test"][3]
    label = loaded["test"].features["cell_type"]
    assert isinstance(label, datasets.ClassLabel) and label.names == list(pbmc.obs["cell_type"].cat.categories)
    cell = pbmc[row["cell"]]
    assert label.int2str(row["cell_type"]) == cell.obs["cell_type"].iloc[0]
    genes = read_cells(tmp_path / "out").var_names
    np.testing.assert_array_equal(cell[:, genes[row["genes"]]].X.toarray().ravel(), row["expressions"])
    assert row["total_counts"] == cell.X.sum()


def test_the_split_is_that_of_a_training_and_the_order_is_random(pbmc, tmp_path, small_files):
    by_type = pbmc[np.argsort(pbmc.obs["cell_type"].cat.codes)].copy()
    by_type.write_h5ad(tmp_path / "sorted.h5ad")
    orders = []
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        prepare(
            PrepareConfig(
                files=[tmp_path / "sorted.h5ad"], output_dir=tmp_path / name, label_keys=["cell_type"], seed=seed
            )
        )
        train, test = (read_cells(tmp_path / name, split) for split in ("train", "test"))
        orders.append(list(train.obs_names))
        assert (len(train), len(test)) == (558, 142)
        real, held_out = (cells.obs["cell_type"].value_counts() for cells in (pbmc, test))
        assert ((held_out - 0.2 * real).abs() <= 1).all()
        # Neighbours are of the same type as often as by chance.
        codes = train.obs["cell_type"].cat.codes.to_numpy()
        by_chance = (np.bincount(codes) / len(codes)) @ (np.bincount(codes) / len(codes))
        assert abs((codes[1:] == codes[:-1]).mean() - by_chance) < 0.06
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("genes", ["intersection", "union"])
def test_several_files(genes, pbmc, tmp_path, small_files):
    first, second = pbmc[:300, :600].copy(), pbmc[200:, np.r_[764:99:-1]].copy()
    second.obs["only_here"] = 1
    second.obs["cell_type"] = second.obs["cell_type"].astype(str).str.upper()
    first.write_h5ad(tmp_path / "a.h5ad")
    second.write_zarr(tmp_path / "b.zarr")
    files, output = [tmp_path / "a.h5ad", tmp_path / "b.zarr"], tmp_path / "out"
    config = PrepareConfig(files=files, output_dir=output, label_keys=["cell_type"], genes=genes, file_key="sample")
    metadata = prepare(config)
    first.obs_names, second.obs_names = first.obs_names + "-a", second.obs_names + "-b"
    expected = ad.concat([first, second], join={"intersection": "inner", "union": "outer"}[genes], fill_value=0)
    expected.obs = pd.concat([first.obs, second.obs])[["cell_type", "phase"]].astype(str)
    expected.obs["sample"] = ["a"] * 300 + ["b"] * 500
    cells = read_cells(tmp_path / "out")
    assert metadata["num_genes"] == {"intersection": 500, "union": 765}[genes]
    assert cells.var_names[0] == first.var_names[{"intersection": 100, "union": 0}[genes]]
    assert_same_cells(cells, expected[:, cells.var_names])
    # The total is over all genes of a cell's own file.
    totals = np.concatenate([np.asarray(part.X.sum(1)).ravel() for part in (first, second)])
    np.testing.assert_array_equal(cells[expected.obs_names].obs["total_counts"], totals)


def test_copies_in_other_files_stay_on_one_side(pbmc, tmp_path, small_files, caplog):
    """The same counts in other types, places and orders of genes."""
    again = pbmc[600::-1, ::-1].copy()
    again.X = again.X.astype(np.int64).toarray()
    for name, cells in (("a", pbmc), ("b", again)):
        cells.write_h5ad(tmp_path / f"{name}.h5ad")
    prepare(PrepareConfig(files=[tmp_path / "a.h5ad", tmp_path / "b.h5ad"], output_dir=tmp_path / "out"))
    train, test = (read_cells(tmp_path / "out", split).obs_names.str[:-2] for split in ("train", "test"))
    assert len(train) + len(test) == 1301 and len(test) > 40 and not set(train) & set(test)
    assert "601 cells are copies of others. They stay on one side of the split." in caplog.text


def test_labels_called_position_survive(pbmc, tmp_path, small_files):
    cells = pbmc.copy()
    cells.obs["position"] = cells.obs["phase"].astype(str)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    prepare(PrepareConfig(files=[tmp_path / "cells.h5ad"], output_dir=tmp_path / "out", label_keys=["position"]))
    assert_same_cells(read_cells(tmp_path / "out"), cells)


def test_poor_cells_are_left_out(pbmc, tmp_path):
    adata = pbmc.copy()
    counts = adata.X.toarray()
    counts[:5] = 0
    counts[1, :3], counts[2, 0], counts[3, :10] = 1, 30, 30
    adata.X = sparse.csr_matrix(counts)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    for output, kept, config in (
        ("any", [1, 2, 3], {}),
        ("counts", [2, 3], {"min_counts": 20}),
        ("genes", [1, 3], {"min_genes": 3}),
        ("both", [3], {"min_counts": 20, "min_genes": 3}),
    ):
        prepare(
            PrepareConfig(
                files=[tmp_path / "cells.h5ad"], output_dir=tmp_path / output, label_keys=["cell_type"], **config
            )
        )
        expected = adata[np.r_[kept, 5:700]]
        assert_same_cells(read_cells(tmp_path / output), expected[:, :])


def test_the_card_names_files_and_splits_as_text(pbmc_path, tmp_path):
    path = tmp_path / "`<b>`\n# Title.h5ad"
    path.write_bytes(pbmc_path.read_bytes())
    prepare(PrepareConfig(files=[path], output_dir=tmp_path / "out", label_keys=["cell_type"]))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<b>" not in card and "\n# Title" not in card and "&lt;b&gt;" in card
    assert "data/test-*.parquet" in card and "700 cells (558 in train, 142 in test)" in card


# ==================== Bad input ====================


def test_a_failure_leaves_nothing(pbmc, pbmc_path, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there exists: remove it"):
        prepare(PrepareConfig(files=[pbmc_path], output_dir=tmp_path / "there", label_keys=[]))

    def disk_is_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_table", disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        prepare(PrepareConfig(files=[pbmc_path], output_dir=tmp_path / "out", label_keys=[]))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def write_spoiled(cells: ad.AnnData, name: str, path):
    """Cells with the mistake that their file is named after."""
    cells.layers["counts"] = cells.X.copy()
    if name == "half":
        cells.X = cells.X * 0.5
    elif name == "csc":
        cells.X = sparse.csc_matrix(cells.X)
    elif name == "empty":
        cells.X = sparse.csr_matrix(cells.shape)
    elif name == "no_x":
        cells.X = None
    elif name == "genes":
        cells.var_names = ["A", "A", *cells.var_names[2:]]
    elif name == "cells":
        cells.obs_names = ["A", "A", *cells.obs_names[2:]]
    elif name in ("cell", "expressions"):
        cells.obs[name] = "A"
    elif name == "column":
        cells.obs["genes"] = 1
    elif name == "missing":
        cells.obs["cell_type"] = [None] + ["B"] * 49
    elif name == "other":
        cells.var_names = "x" + cells.var_names
    cells.write_h5ad(path)
    if name == "text":
        path.write_text("no cells")
    elif name == "truncated":
        path.write_bytes(path.read_bytes()[:-5000])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["absent.h5ad"], "There is no file .*absent.h5ad"),
        (["text.h5ad"], "text.h5ad cannot be read as an .h5ad or .zarr file"),
        (["truncated.h5ad"], "truncated.h5ad.* cannot be read"),
        (["csc.h5ad"], r"stored by gene \(CSC\).*tocsr"),
        (["half.h5ad"], "half.h5ad holds .*.5 .*not an integer count"),
        (["no_x.h5ad"], "no_x.h5ad has no matrix in X; its layers are .*counts"),
        (["no_x.h5ad", "--layer", "spliced"], "no layer 'spliced'"),
        (["empty.h5ad"], "0 cells are too few to hold out"),
        (["genes.h5ad"], "gene name 'A' occurs more than once in genes.h5ad.*var_names_make_unique"),
        (["cells.h5ad"], "cell name 'A' occurs more than once in cells.h5ad.*obs_names_make_unique"),
        (["column.h5ad"], "obs column 'genes' has a name that parquet files need"),
        (["cell.h5ad"], "obs column 'cell' has a name that parquet files need: rename it"),
        (["expressions.h5ad"], "obs column 'expressions' has a name that parquet files need: rename it"),
        (["good.h5ad", "--label_keys", "louvain"], "no column 'louvain'; it has"),
        (["missing.h5ad", "--label_keys", "cell_type"], "is missing for 1 cells"),
        (["good.h5ad", "good.h5ad"], "Two files are called 'good'"),
        (["good.h5ad", "other.h5ad"], "Only 0 of .* genes are in all files: use --genes union"),
        (["good.h5ad", "--file_key", "phase"], "cannot insert phase, already exists"),
    ],
)
def test_bad_files_and_flags_end_with_one_line(arguments, message, pbmc, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in {argument.removesuffix(".h5ad") for argument in arguments if argument.endswith(".h5ad")} - {"absent"}:
        write_spoiled(pbmc[:50].copy(), name, tmp_path / f"{name}.h5ad")
    with pytest.raises(SystemExit) as error:
        main(["prepare", *arguments, "--output_dir", "out"])
    assert error.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("wbdit prepare: ")]
    assert len(lines) == 1 and pd.Series(lines).str.contains(message).all(), lines
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


BREAK = {
    None: "has no cells.json .*: prepare the cells",
    "{": "no cells.json that can be read",
    '{"format_version": 9}': "format version 9, and",
}


@pytest.mark.parametrize("content, message", BREAK.items())
def test_a_folder_without_its_contents_is_named(content, message, tmp_path):
    if content is not None:
        (tmp_path / "cells.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        PreparedCells(tmp_path)
