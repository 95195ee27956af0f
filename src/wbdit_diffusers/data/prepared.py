"""Cells in parquet files, the layout that `wbdit prepare` and `wbdit generate` write.

A folder holds `cells.json`, `genes.parquet` and `data/SPLIT-*.parquet`. Each row is a cell: `genes` are row numbers of
genes.parquet, `expressions` their values, as in Tahoe-100M. Layers and `obsm` are further lists, labels `ClassLabel`.
"""

import json
from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import anndata as ad
import fsspec
import numpy as np
import pandas as pd
from scipy import sparse

from ..files import one_line
from .cells import choose_groups


FORMAT_VERSION = 2
METADATA = "cells.json"
GENES = "genes.parquet"
ROW_GROUP_SIZE = 4096  # cells
RESERVED = ("genes", "expressions", "cell", "total_counts")  # columns that are not obs


def is_prepared(path: str | Path) -> bool:
    """Whether a path is an address, or a folder of parquet files of this layout."""
    return "://" in str(path) or (Path(path) / METADATA).is_file()


# ==================== Writing ====================


def make_features(obs: pd.DataFrame, is_counts: bool, layers: Iterable[str] = (), obsm: Iterable[str] = ()):
    """The `datasets.Features` of cells: categorical columns of `obs` are labels."""
    from datasets import ClassLabel, Features, List, Value

    value = Value("int32" if is_counts else "float32")
    features: dict[str, Any] = {"genes": List(Value("int32")), "expressions": List(value), "cell": Value("string")}
    features |= {"total_counts": Value("int64")} if is_counts else {}
    features |= {name: List(Value("float32")) for name in [*layers, *obsm]}
    for key, column in obs.items():
        if isinstance(column.dtype, pd.CategoricalDtype):
            features[str(key)] = ClassLabel(names=column.cat.categories.astype(str).tolist())
        else:
            features[str(key)] = Value("string" if column.dtype.kind not in "biuf" else str(column.dtype))
    return Features(features)


def make_table(
    matrix: sparse.csr_matrix,
    obs: pd.DataFrame,
    features: Any,
    total_counts: np.ndarray | None = None,
    layers: dict[str, Any] | None = None,
    obsm: dict[str, Any] | None = None,
):
    """Cells as an Arrow table, with each cell's values as lists that share the memory of CSR."""
    import pyarrow as pa

    def lists(values: np.ndarray, offsets: np.ndarray, name: str):
        kind = features[name].feature.pa_type
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values).cast(kind, safe=False))

    columns = {"genes": lists(matrix.indices, matrix.indptr, "genes")}
    columns["expressions"] = lists(matrix.data, matrix.indptr, "expressions")
    columns["cell"] = pa.array(obs.index.astype(str), pa.string())
    if total_counts is not None:
        columns["total_counts"] = pa.array(total_counts.astype(np.int64))
    for name, layer in (layers or {}).items():  # other values of the same genes
        layer = sparse.csr_matrix(layer).sorted_indices()
        columns[name] = lists(layer.data, layer.indptr, name)
    for name, values in (obsm or {}).items():
        values = np.asarray(values, dtype=np.float32)
        columns[name] = lists(values.ravel(), np.arange(len(values) + 1) * values.shape[1], name)
    for key, column in obs.items():
        is_label = isinstance(column.dtype, pd.CategoricalDtype)
        values = column.cat.codes.to_numpy().astype(np.int64) if is_label else column.to_numpy()
        if not is_label and column.dtype.kind not in "biuf":
            values = column.astype(str).to_numpy(dtype=object)
        columns[str(key)] = pa.array(values, mask=column.isna().to_numpy())
    return pa.table({name: columns[name] for name in features}).cast(features.arrow_schema)


def write_file(path: Path, tables: Iterable[Any], features: Any) -> list[int]:
    """Writes tables as the row groups of one parquet file, and returns their sizes."""
    import pyarrow.parquet as pq

    sizes = []
    # Labels and small counts have few different values; the genes of a cell increase.
    encoding = {"genes.list.element": "DELTA_BINARY_PACKED"}
    dictionary = [name for name in features if name not in ("genes", "cell")]
    dictionary = ["expressions.list.element" if name == "expressions" else name for name in dictionary]
    with pq.ParquetWriter(
        path, features.arrow_schema, compression="zstd", use_dictionary=dictionary, column_encoding=encoding
    ) as writer:
        for table in tables:
            writer.write_table(table.cast(features.arrow_schema), row_group_size=len(table))
            sizes.append(len(table))
    return sizes


def write_tables_of_folder(folder: Path, var: pd.DataFrame, metadata: dict[str, Any]):
    """Writes `genes.parquet` from the gene table, and `cells.json`, which completes the folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"gene": pa.array(var.index.astype(str), pa.string())}
    for key in var:
        try:
            columns[str(key)] = pa.Array.from_pandas(var[key])
        except (pa.ArrowException, TypeError):  # a type that parquet does not have
            columns[str(key)] = pa.array(var[key].astype(str))
    pq.write_table(pa.table(columns), folder / GENES)
    (folder / METADATA).write_text(json.dumps({"format_version": FORMAT_VERSION, **metadata}, indent=1))


# ==================== Reading ====================


class PreparedCells:
    """
    One split of a folder as a [`CellSource`]. Groups are parquet's row groups, read into CSR as they are.

    Args:
        folder (`str` or `Path`): The folder, or an address that fsspec knows, such as `hf://datasets/me/cells`.
        split (`str`, defaults to `"train"`): `"train"` or `"test"`.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If the folder has no such split, or is damaged.
    """

    def __init__(self, folder: str | Path, split: str = "train"):
        self.folder, self.name = str(folder), f"{folder}, split {split!r},"
        self.metadata = read_metadata(folder)
        self.file_system, self.root = fsspec.core.url_to_fs(self.folder)
        if split not in self.metadata["splits"]:
            raise ValueError(f"{folder} has no split {split!r}, only {', '.join(self.metadata['splits'])}.")
        self.files: dict[str, list[int]] = self.metadata["splits"][split]  # the sizes of each file's row groups
        self.groups = [(name, row) for name, sizes in self.files.items() for row in range(len(sizes))]
        self.group_sizes = np.array([size for sizes in self.files.values() for size in sizes])
        self._file = lru_cache(maxsize=32)(self._open_file)

    @cached_property
    def var(self) -> pd.DataFrame:
        """The gene table, by name."""
        return self._table(GENES).to_pandas().set_index("gene").rename_axis(None)

    @property
    def var_names(self) -> pd.Index:
        return self.var.index

    @cached_property
    def obs(self) -> pd.DataFrame:
        """The labels of all cells. Names and numbers stay on disk."""
        keys = list(self.metadata["labels"])
        tables = [self._table(name, columns=keys) for name in self.files if keys]
        obs = pd.concat([self._labels(table) for table in tables]) if tables else pd.DataFrame()
        return obs.set_axis(pd.RangeIndex(len(obs))) if keys else pd.DataFrame(index=range(self.group_sizes.sum()))

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the names of all cells and genes."""
        return str(self.metadata.get("fingerprint", ""))

    def read_group(self, group: int) -> tuple[sparse.csr_matrix, np.ndarray | None]:
        name, row = self.groups[group]
        is_counts = self.metadata["values"] == "counts"
        table = self._table(name, row, ["genes", "expressions"] + ["total_counts"] * is_counts)
        # float32, as the sum of a row of float32 is.
        totals = table["total_counts"].to_numpy().astype(np.float32) if is_counts else None
        return self._matrix(table, "expressions"), totals

    def sample(self, num_cells: int, seed: int = 0) -> ad.AnnData:
        """About `num_cells` cells from random groups, in memory."""
        return self.read(choose_groups(self.group_sizes, num_cells, seed))

    def read(self, groups: Iterable[int] | None = None) -> ad.AnnData:
        """Cells of some groups, or all, in memory, with layers, `obsm` and `varm`."""
        parts = [(name, None) for name in self.files] if groups is None else [self.groups[group] for group in groups]
        layers, obsm = self.metadata["layers"], self.metadata["obsm"]
        cells = []
        for name, row in parts:
            table = self._table(name, row)
            numbers = table.drop_columns(["genes", "expressions", *layers, *obsm, *self.metadata["labels"]])
            obs = numbers.to_pandas().set_index("cell").rename_axis(None)
            labels = self._labels(table)
            for key in labels:
                obs[key] = labels[key].to_numpy() if not len(labels) else labels[key].array
            part = ad.AnnData(self._matrix(table, "expressions"), obs=obs[self._columns(obs)])
            for layer in layers:
                part.layers[layer] = self._matrix(table, layer)
            for key in obsm:
                part.obsm[key] = table[key].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
            part.var_names = self.var_names
            cells.append(part)
        whole = ad.concat(cells) if len(cells) > 1 else cells[0]
        loadings = {key: [f"{key}_{i}" for i in range(size)] for key, size in self.metadata["varm"].items()}
        whole.var = self.var.drop(columns=[name for names in loadings.values() for name in names])
        for key, names in loadings.items():
            whole.varm[key] = self.var[names].to_numpy()
        return whole

    def _columns(self, obs: pd.DataFrame) -> list[str]:
        """Columns of `obs` in the order in which they were written."""
        return [key for key in self.metadata["obs"] if key in obs] + [key for key in ("total_counts",) if key in obs]

    def _labels(self, table) -> pd.DataFrame:
        """Columns of codes as categories."""
        labels = {}
        for key, names in self.metadata["labels"].items():
            codes = table[key].fill_null(-1).to_numpy()
            labels[key] = pd.Categorical.from_codes(codes, categories=names)
        return pd.DataFrame(labels)

    def _open_file(self, name: str):
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(self.file_system.open(f"{self.root}/{name}", "rb"))
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.folder}/{name} is missing: copy or prepare it again.") from None

    def _table(self, name: str, row: int | None = None, columns: list[str] | None = None):
        """A table of a file, or of one of its row groups."""
        import pyarrow as pa

        try:
            file = self._file(name)
            return file.read(columns=columns) if row is None else file.read_row_group(row, columns=columns)
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.folder}/{name} is damaged: {one_line(error)}. Copy it again.") from error

    def _matrix(self, table, name: str) -> sparse.csr_matrix:
        """Sparse rows as CSR, which shares the memory of the lists. Raises a `ValueError` if they are damaged."""
        genes, values = (table[key].combine_chunks() for key in ("genes", name))
        indptr = genes.offsets.to_numpy()
        try:
            matrix = sparse.csr_matrix(
                (values.flatten().to_numpy(), genes.flatten().to_numpy(), indptr - indptr[0]),
                shape=(len(table), len(self.var_names)),
            )
            matrix.check_format()
        except ValueError as error:
            raise ValueError(f"{self.folder} is damaged: {one_line(error)}. Copy or prepare it again.") from error
        return matrix


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """
    The contents of `cells.json`.

    Raises:
        FileNotFoundError: If there is no such folder, or `wbdit prepare` did not write or complete it.
        ValueError: If the file is damaged, or of another version.
    """
    file_system, root = fsspec.core.url_to_fs(str(folder))
    try:
        with file_system.open(f"{root}/{METADATA}", "rb") as file:
            metadata = json.loads(file.read())
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} has no {METADATA}: prepare the cells first, by `wbdit prepare`.") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder}/{METADATA} cannot be read: {one_line(error)}") from error
    if metadata.get("format_version") != FORMAT_VERSION:
        version = metadata.get("format_version")
        raise ValueError(f"{folder} has format version {version}, and this package reads {FORMAT_VERSION}.")
    return metadata
