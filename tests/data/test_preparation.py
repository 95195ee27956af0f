"""AnnData files to parquet and back."""

import json

import anndata as ad
import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from wbdit_diffusers.cli import main
from wbdit_diffusers.data import PrepareConfig, PreparedCells, prepare, read_cells


@pytest.fixture
def small_files(monkeypatch):
    """Several row groups, files and flushes of 700 cells."""
    monkeypatch.setattr("wbdit_diffusers.data.preparation.CHUNK_SIZE", 64)
    monkeypatch.setattr("wbdit_diffusers.data.preparation.ROW_GROUP_SIZE", 50)
    monkeypatch.setattr("wbdit_diffusers.data.preparation.VALUES_PER_FILE", 2**14)
    monkeypatch.setattr("wbdit_diffusers.data.preparation.VALUES_AT_ONCE", 2**13)


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
    adata, layer, path = pbmc.copy(), None, tmp_path / ("cells.zarr" if form == "zarr" else "cells.h5ad")
    adata.obs["score"] = np.linspace(0, 1, 700)
    adata.obs["donor"] = [f"donor {i % 3}" for i in range(700)]
    adata.var["symbol"] = adata.var_names.str.lower()
    expected = adata.copy()
    if form == "dense":
        adata.X = adata.X.toarray()
    elif form == "int64":
        adata.X = adata.X.astype(np.int64)
    elif form == "layer":
        layer, adata.layers["counts"], adata.X = "counts", adata.X.copy(), np.full(adata.shape, np.nan)
    elif form == "stored zeros":
        dense = adata.X.toarray()
        adata.X = sparse.csr_matrix((dense.ravel(), np.tile(np.arange(765), 700), np.arange(0, 700 * 765 + 1, 765)))
    adata.write_zarr(path) if form == "zarr" else adata.write_h5ad(path)
    metadata = prepare([path], tmp_path / "out", PrepareConfig(layer=layer, label_keys=["cell_type"]))
    assert len(metadata["splits"]["train"]) > 3
    cells = read_cells(tmp_path / "out")
    assert_same_cells(cells, expected)
    np.testing.assert_array_equal(cells.obs["total_counts"], np.asarray(cells.X.sum(1)).ravel())
    np.testing.assert_array_equal(cells[adata.obs_names].obs["score"], adata.obs["score"])
    assert list(cells.var["symbol"]) == list(adata.var["symbol"])
    np.testing.assert_array_equal(cells.var["num_cells"], expected.X.getnnz(axis=0))
    assert [path.name for path in tmp_path.iterdir()].count("out") == 1 and len(list(tmp_path.iterdir())) == 2


def test_log_values_are_kept_in_float32(pbmc, tmp_path):
    adata = pbmc.copy()
    adata.X = sparse.csr_matrix(np.log1p(pbmc.X.toarray() * 1.37).astype(np.float32))
    adata.write_h5ad(tmp_path / "log.h5ad")
    with pytest.raises(ValueError, match="no integer count.*values='log'"):
        prepare([tmp_path / "log.h5ad"], tmp_path / "out", PrepareConfig(label_keys=[]))
    prepare([tmp_path / "log.h5ad"], tmp_path / "out", PrepareConfig(label_keys=[], values="log"))
    assert_same_cells(read_cells(tmp_path / "out"), adata)


def test_datasets_reads_it_with_labels(pbmc_path, pbmc, tmp_path):
    main(["prepare", str(pbmc_path), "--output", str(tmp_path / "out"), "--label_keys", "cell_type"])
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
    for seed in (0, 0, 1):
        prepare([tmp_path / "sorted.h5ad"], tmp_path / f"{seed}", PrepareConfig(label_keys=["cell_type"], seed=seed))
        train, test = (read_cells(tmp_path / f"{seed}", split) for split in ("train", "test"))
        assert (len(train), len(test)) == (558, 142)
        real, held_out = (cells.obs["cell_type"].value_counts() for cells in (pbmc, test))
        assert ((held_out - 0.2 * real).abs() <= 1).all()
        # Neighbours are of the same type as often as by chance.
        codes = train.obs["cell_type"].cat.codes.to_numpy()
        by_chance = (np.bincount(codes) / len(codes)) @ (np.bincount(codes) / len(codes))
        assert abs((codes[1:] == codes[:-1]).mean() - by_chance) < 0.06
        if seed == 0 and (tmp_path / "again").exists():
            again = read_cells(tmp_path / "again", "train")
            assert list(again.obs_names) == list(train.obs_names)
        if seed == 0:
            (tmp_path / "0").rename(tmp_path / ("again" if not (tmp_path / "again").exists() else "twice"))
    assert list(train.obs_names) != list(again.obs_names)


@pytest.mark.parametrize("genes", ["intersection", "union"])
def test_several_files(genes, pbmc, tmp_path, small_files):
    first, second = pbmc[:300, :600].copy(), pbmc[200:, np.r_[764:99:-1]].copy()
    second.obs["only_here"] = 1
    second.obs["cell_type"] = second.obs["cell_type"].astype(str).str.upper()
    first.write_h5ad(tmp_path / "a.h5ad")
    second.write_zarr(tmp_path / "b.zarr")
    config = PrepareConfig(label_keys=["cell_type"], genes=genes, file_key="sample")
    metadata = prepare([tmp_path / "a.h5ad", tmp_path / "b.zarr"], tmp_path / "out", config)
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
        prepare([tmp_path / "cells.h5ad"], tmp_path / output, PrepareConfig(label_keys=["cell_type"], **config))
        expected = adata[np.r_[kept, 5:700]]
        assert_same_cells(read_cells(tmp_path / output), expected[:, :])


def test_no_split(pbmc_path, tmp_path):
    prepare([pbmc_path], tmp_path / "out", PrepareConfig(label_keys=[], test_fraction=0))
    assert read_cells(tmp_path / "out").n_obs == 700
    with pytest.raises(ValueError, match="no split 'test', only train"):
        read_cells(tmp_path / "out", "test")


def test_a_card_cannot_be_written_into_by_a_label(pbmc, tmp_path):
    adata = pbmc.copy()
    adata.obs["cell_type"] = np.where(np.arange(700) < 350, "`</code><script>\n# Title", "B")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    prepare([tmp_path / "cells.h5ad"], tmp_path / "out", PrepareConfig(label_keys=["cell_type"]))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<script>" not in card and "\n# Title" not in card and "&lt;script&gt;" in card
    assert "split: test" in card and "| train | 5" in card


# ==================== Bad input ====================


def write(adata: ad.AnnData, path, **changes):
    adata = adata[:50].copy()
    for name, value in changes.items():
        setattr(adata, name, value)
    adata.write_h5ad(path)


def test_a_failure_leaves_nothing(pbmc, pbmc_path, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there is there already: remove it"):
        prepare([pbmc_path], tmp_path / "there", PrepareConfig(label_keys=[]))

    def disk_is_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_table", disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        prepare([pbmc_path], tmp_path / "out", PrepareConfig(label_keys=[]))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["absent.h5ad"], "There is no file .*absent.h5ad"),
        (["text.h5ad"], "text.h5ad cannot be read as an .h5ad or .zarr file"),
        (["truncated.h5ad"], "truncated.h5ad.* cannot be read"),
        (["csc.h5ad"], r"stored by gene \(CSC\).*tocsr"),
        (["half.h5ad"], "half.h5ad holds 0.5 .*no integer count"),
        (["nan.h5ad"], "nan.h5ad holds nan"),
        (["negative.h5ad"], "holds -1.*never negative"),
        (["large.h5ad"], "a count of 3e[+]09, more than 2147483647"),
        (["no_x.h5ad"], "no_x.h5ad has no matrix in X, only layers .*counts"),
        (["no_x.h5ad", "--layer", "spliced"], "no layer 'spliced'"),
        (["empty.h5ad"], "No cell is left: lower --min_counts"),
        (["genes.h5ad"], "has gene 'A' more than once.*var_names_make_unique"),
        (["cells.h5ad"], "has cell 'A' more than once.*obs_names_make_unique"),
        (["column.h5ad"], "an obs column 'genes', a name that the dataset needs"),
        (["good.h5ad", "--label_keys", "louvain"], "no obs column 'louvain'; it has"),
        (["missing.h5ad", "--label_keys", "cell_type"], "is missing for 1 cells"),
        (["good.h5ad", "good.h5ad"], "2 files are called 'good'"),
        (["good.h5ad", "other.h5ad"], "No gene is in all files: use --genes union"),
        (["good.h5ad", "--file_key", "phase"], "--file_key phase: .*such a column"),
        (["good.h5ad", "--genes", "all"], "--genes is intersection or union, not 'all'"),
        (["good.h5ad", "--values", "tpm"], "--values is counts or log, not 'tpm'"),
        (["good.h5ad", "--values", "log", "--min_counts", "5"], "--min_counts has no effect on log values"),
        (["good.h5ad", "--min_genes", "0"], "--min_genes is at least 1"),
        (["good.h5ad", "--test_fraction", "1"], "--test_fraction is at least 0 and less than 1"),
        (["good.h5ad", "--test_fraction", "nan"], "--test_fraction is at least 0 and less than 1"),
        (["good.h5ad", "--seed", "-1"], "--seed is not negative"),
        (["good.h5ad", "--hub_dataset_id", "me/x"], "--hub_dataset_id has no effect without --push_to_hub"),
    ],
)
def test_bad_files_and_flags_end_with_one_line(arguments, message, pbmc, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dense = pbmc[:50].X.toarray()
    wrong = {"half": 0.5, "nan": np.nan, "negative": -1, "large": 3e9}
    for name in {argument.removesuffix(".h5ad") for argument in arguments if argument.endswith(".h5ad")}:
        path, changes = tmp_path / f"{name}.h5ad", {}
        if name in wrong:
            changes["X"] = sparse.csr_matrix(np.where(np.arange(50)[:, None] == 2, wrong[name], dense))
        elif name == "csc":
            changes["X"] = sparse.csc_matrix(dense)
        elif name == "empty":
            changes["X"] = sparse.csr_matrix(dense.shape)
        elif name == "no_x":
            changes["X"] = None
        elif name == "genes":
            changes["var_names"] = ["A", "A", *pbmc.var_names[2:]]
        elif name == "cells":
            changes["obs_names"] = ["A", "A", *pbmc.obs_names[2:50]]
        elif name == "column":
            changes["obs"] = pbmc.obs[:50].assign(genes=1)
        elif name == "missing":
            changes["obs"] = pbmc.obs[:50].assign(cell_type=[None] + ["B"] * 49)
        elif name == "other":
            changes["var_names"] = "x" + pbmc.var_names
        if name == "text":
            path.write_text("no cells")
        elif name != "absent":
            adata = pbmc[:50].copy()
            adata.layers["counts"] = adata.X.copy()
            write(adata, path, **changes)
        if name == "truncated":
            path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(SystemExit) as error:
        main(["prepare", *arguments, "--output", "out"])
    assert error.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("wbdit prepare: ")]
    assert len(lines) == 1 and pd.Series(lines).str.contains(message).all(), lines
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.fixture
def folder(pbmc_path, tmp_path, small_files):
    prepare([pbmc_path], tmp_path / "out", PrepareConfig(label_keys=["cell_type"]))
    return tmp_path / "out"


def first_file(folder):
    return sorted((folder / "data").glob("train-*"))[0]


def rewrite(path, **columns):
    """A file with other columns or metadata."""
    table = pq.read_table(path)
    metadata = columns.pop("metadata", table.schema.metadata)
    for name, values in columns.items():
        field = table.schema.field(name)
        table = table.set_column(table.column_names.index(name), field, pa.array(values(table[name]), field.type))
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=50)


def break_metadata(folder, **changes):
    metadata = json.loads((folder / "prepared.json").read_text())
    (folder / "prepared.json").write_text(json.dumps(metadata | changes))


BREAK = {
    "truncated shard": (
        lambda folder: first_file(folder).write_bytes(first_file(folder).read_bytes()[:-100]),
        r"train-00000.*is truncated or no parquet file",
    ),
    "text for a shard": (lambda folder: first_file(folder).write_text("x"), r"truncated or no parquet file"),
    "damaged pages": (
        lambda folder: first_file(folder).write_bytes(
            b"PAR1" + b"\xff" * 2000 + first_file(folder).read_bytes()[2004:]
        ),
        "train-00000.* is damaged",
    ),
    "missing shard": (lambda folder: first_file(folder).unlink(), r"train-00000.*is missing"),
    "shard of a shorter set": (
        lambda folder: pq.write_table(pq.read_table(first_file(folder))[:20], first_file(folder)),
        r"has 20 cells, and not",
    ),
    "shard with other genes": (
        lambda folder: rewrite(
            first_file(folder), metadata=pq.read_schema(first_file(folder)).metadata | {b"wbdit_genes": b"0"}
        ),
        "was prepared with other genes",
    ),
    "shard with other labels": (
        lambda folder: rewrite(
            first_file(folder),
            metadata={
                key: value.replace(b"Dendritic", b"Dendrites")
                for key, value in pq.read_schema(first_file(folder)).metadata.items()
            },
        ),
        "has other labels of 'cell_type'",
    ),
    "unseen label": (
        lambda folder: rewrite(first_file(folder), cell_type=lambda codes: pd.Series(codes.to_numpy() + 9).to_list()),
        "a label of 'cell_type' that its 10 names do not have",
    ),
    "unknown gene": (
        lambda folder: rewrite(first_file(folder), genes=lambda lists: [[9000] * len(x) for x in lists.to_pylist()]),
        "numbers of genes that genes.parquet does not have",
    ),
    "missing values": (
        lambda folder: rewrite(
            first_file(folder), expressions=lambda lists: [[None] * len(x) for x in lists.to_pylist()]
        ),
        "cells or values that are missing",
    ),
    "more genes than values": (
        lambda folder: rewrite(first_file(folder), expressions=lambda lists: [x[1:] for x in lists.to_pylist()]),
        "more genes than values",
    ),
    "no genes": (lambda folder: (folder / "genes.parquet").unlink(), "genes.parquet is missing"),
    "other genes": (
        lambda folder: pq.write_table(pq.read_table(folder / "genes.parquet")[:-1], folder / "genes.parquet"),
        "genes.parquet is not that of prepared.json",
    ),
    "text for genes": (lambda folder: (folder / "genes.parquet").write_text("x"), "genes.parquet is damaged"),
    "foreign folder": (lambda folder: (folder / "prepared.json").unlink(), "no folder that `wbdit prepare` wrote"),
    "text for metadata": (lambda folder: (folder / "prepared.json").write_text("{"), "prepared.json cannot be read"),
    "a list for metadata": (lambda folder: (folder / "prepared.json").write_text("[1]"), "format version None"),
    "a later format": (lambda folder: break_metadata(folder, format_version=2), "format version 2, and this package"),
    "damaged metadata": (lambda folder: break_metadata(folder, splits=3), "prepared.json is damaged"),
    "no groups": (lambda folder: break_metadata(folder, row_group_size=0), "prepared.json is damaged"),
}


@pytest.mark.parametrize("name", BREAK)
def test_a_damaged_folder_is_named(name, folder):
    breaks, message = BREAK[name]
    breaks(folder)
    with pytest.raises((ValueError, OSError), match=message):
        source = PreparedCells(folder)
        _ = source.obs
        for group in range(len(source.groups)):
            source.read_group(group)
