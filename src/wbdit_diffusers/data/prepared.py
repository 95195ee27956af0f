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
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

from ..files import one_line
from .cells import sorted_csr


FORMAT_VERSION = 2
METADATA = "cells.json"
GENES = "genes.parquet"
ROW_GROUP_SIZE = 4096  # cells


def is_prepared(path: str | Path) -> bool:
    """Whether a path is an address, or a folder of parquet files of this layout."""
    return "://" in str(path) or (Path(path) / METADATA).is_file()


def make_features(cells: ad.AnnData, values: str):
    """The `datasets.Features` of cells with counts or log values: categorical columns of `obs` are labels."""
    from datasets import ClassLabel, Features, List, Value

    value = Value("int32" if values == "counts" else "float32")
    features: dict[str, Any] = {"genes": List(Value("int32")), "expressions": List(value), "cell": Value("string")}
    features |= {name: List(Value("float32")) for name in [*cells.layers, *cells.obsm]}
    for key, column in cells.obs.items():
        if key in features:
            raise ValueError(f"The obs column {key!r} has a name that parquet files need: rename it.")
        if isinstance(column.dtype, pd.CategoricalDtype):
            features[str(key)] = ClassLabel(names=column.cat.categories.astype(str).tolist())
        else:
            features[str(key)] = Value("string" if column.dtype.kind not in "biuf" else str(column.dtype))
    return Features(features)


def make_table(cells: ad.AnnData, features) -> pa.Table:
    """Cells as an Arrow table, with each cell's values as lists that share the memory of CSR."""
    matrix = sorted_csr(cells.X)
    columns = {
        "genes": pa.ListArray.from_arrays(matrix.indptr, matrix.indices),
        "expressions": pa.ListArray.from_arrays(matrix.indptr, matrix.data),
        "cell": pa.array(cells.obs_names, pa.string()),
    }
    for name, layer in cells.layers.items():  # other values of the same genes
        layer = sparse.csr_matrix(layer).sorted_indices()
        columns[name] = pa.ListArray.from_arrays(layer.indptr, layer.data)
    for name, values in cells.obsm.items():
        columns[name] = pa.ListArray.from_arrays(np.arange(len(values) + 1) * values.shape[1], np.ravel(values))
    for key, column in cells.obs.items():
        missing = column.isna().to_numpy()
        if isinstance(column.dtype, pd.CategoricalDtype):
            column = column.cat.codes
        elif column.dtype.kind not in "biuf":
            column = column.astype(str).astype(object)
        columns[str(key)] = pa.array(column.to_numpy(), mask=missing)
    return pa.table(columns, schema=features.arrow_schema)


def write_file(path: Path, tables: Iterable[pa.Table], features) -> list[int]:
    """Writes tables as the row groups of one parquet file, and returns their sizes."""
    sizes = []
    # Labels and small counts have few different values; the genes of a cell increase.
    encoding = {"genes.list.element": "DELTA_BINARY_PACKED"}
    dictionary = ["expressions.list.element", *(set(features) - {"genes", "expressions", "cell"})]
    with pq.ParquetWriter(
        path, features.arrow_schema, compression="zstd", use_dictionary=dictionary, column_encoding=encoding
    ) as writer:
        for table in tables:
            writer.write_table(table.cast(features.arrow_schema), row_group_size=len(table))
            sizes.append(len(table))
    return sizes


def write_metadata(
    folder: Path, cells: ad.AnnData, values: str, features, splits: dict[str, dict[str, list[int]]], **more: Any
) -> dict[str, Any]:
    """Writes `genes.parquet`, and `cells.json` with the names of all else. Returns the contents of the latter."""
    var, varm = cells.var.copy(), {key: np.asarray(loadings) for key, loadings in cells.varm.items()}
    for key, loadings in varm.items():
        var[[f"{key}_{i}" for i in range(loadings.shape[1])]] = loadings
    var.assign(gene=var.index).to_parquet(folder / GENES, index=False)
    metadata = {
        "format_version": FORMAT_VERSION,
        "values": values,
        "num_genes": len(var),
        "labels": {key: feature.names for key, feature in features.items() if hasattr(feature, "names")},
        "obs": list(cells.obs),
        "layers": list(cells.layers),
        "obsm": list(cells.obsm),
        "varm": {key: loadings.shape[1] for key, loadings in varm.items()},
        "splits": splits,
        **more,
    }
    (folder / METADATA).write_text(json.dumps(metadata, indent=1))
    return metadata


class PreparedCells:
    """One split of a prepared folder, or of an address such as `hf://datasets/me/cells`, as a [`CellSource`]."""

    def __init__(self, folder: str | Path, split: str = "train"):
        self.folder, self.name = str(folder), f"{folder}, split {split!r},"
        self.metadata = read_metadata(folder)
        self.fingerprint = self.metadata.get("fingerprint", "")  # of the names of all cells and genes
        file_system, root = fsspec.core.url_to_fs(self.folder)
        if split not in self.metadata["splits"]:
            raise ValueError(f"{folder} has no split {split!r}, only {', '.join(self.metadata['splits'])}.")
        files: dict[str, list[int]] = self.metadata["splits"][split]  # the sizes of each file's row groups
        self.groups = [(name, row) for name, sizes in files.items() for row in range(len(sizes))]
        self.group_sizes = np.concatenate(list(files.values()))
        self._open = lru_cache(32)(lambda name: pq.ParquetFile(f"{root}/{name}", filesystem=file_system))
        self.var = self._table(GENES).to_pandas().set_index("gene").rename_axis(None)
        self.var_names = self.var.index

    @cached_property
    def obs(self) -> pd.DataFrame:
        """The labels of all cells. Names and numbers stay on disk."""
        keys = list(self.metadata["labels"])
        obs = self._labels_and_numbers([self._table(*group, keys) for group in self.groups], keys)
        return obs.reindex(range(self.group_sizes.sum()))  # cells without labels too

    def read_group(self, group: int) -> tuple[sparse.csr_matrix, np.ndarray | None]:
        is_counts = self.metadata["values"] == "counts"
        table = self._table(*self.groups[group], ["genes", "expressions"] + ["total_counts"] * is_counts)
        # float32, as the sum of a row of float32 is.
        totals = table["total_counts"].to_numpy().astype(np.float32) if is_counts else None
        return self._matrix([table], "expressions"), totals

    def read(self, groups: Iterable[int] | None = None) -> ad.AnnData:
        """Cells of some groups, or all, in memory, with layers, `obsm` and `varm`."""
        groups = range(len(self.groups)) if groups is None else groups
        tables = [self._table(*self.groups[group]) for group in groups]
        obs = self._labels_and_numbers(tables, self.metadata["obs"])
        obs.index = np.concatenate([table["cell"].to_numpy() for table in tables])
        cells = ad.AnnData(self._matrix(tables, "expressions"), obs=obs, var=self.var)
        for name in self.metadata["layers"]:
            cells.layers[name] = self._matrix(tables, name)
        for key in self.metadata["obsm"]:
            parts = [table[key].combine_chunks().flatten().to_numpy() for table in tables]
            cells.obsm[key] = np.concatenate(parts).reshape(len(obs), -1)
        for key, size in self.metadata["varm"].items():
            columns = [f"{key}_{i}" for i in range(size)]
            cells.varm[key], cells.var = cells.var[columns].to_numpy(), cells.var.drop(columns=columns)
        return cells

    def _labels_and_numbers(self, tables: list[pa.Table], keys: list[str]) -> pd.DataFrame:
        """Columns of `obs`, with codes as categories."""
        obs, labels = pa.concat_tables([table.select(keys) for table in tables]).to_pandas(), self.metadata["labels"]
        for key in labels.keys() & keys:
            obs[key] = pd.Categorical.from_codes(obs[key].fillna(-1).astype(int), categories=labels[key])
        return obs

    def _table(self, name: str, row: int = 0, columns: list[str] | None = None) -> pa.Table:
        """A row group of a file."""
        return self._open(name).read_row_group(row, columns=columns)

    def _matrix(self, tables: list[pa.Table], name: str) -> sparse.csr_matrix:
        """The lists of some row groups as CSR."""
        parts = []
        for table in tables:
            genes, values = (table[key].combine_chunks() for key in ("genes", name))
            indptr, shape = genes.offsets.to_numpy(), (len(table), len(self.var_names))
            arrays = values.flatten().to_numpy(), genes.flatten().to_numpy(), indptr - indptr[0]
            parts.append(sparse.csr_matrix(arrays, shape=shape))
        return parts[0] if len(parts) == 1 else sparse.vstack(parts, format="csr")


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """The contents of `cells.json`. Raises a `ValueError` if it is missing, damaged or of another version."""
    file_system, root = fsspec.core.url_to_fs(str(folder))
    try:
        metadata = json.loads(file_system.cat_file(f"{root}/{METADATA}"))
        version = metadata.get("format_version")
    except (ValueError, OSError) as error:
        fix = "prepare the cells by `wbdit prepare`"
        raise ValueError(f"{folder} has no {METADATA} that can be read ({one_line(error)}): {fix}.") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{folder} has format version {version}, and this package reads {FORMAT_VERSION}.")
    return metadata
