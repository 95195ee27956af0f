"""Reads what `wbdit prepare` writes: a folder of parquet files, on this machine or on the Hub (`hf://datasets/…`)."""

import hashlib
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

from .generated import is_generated
from .latents import choose_groups
from .tenx import is_10x


FORMAT_VERSION = 1
METADATA = "prepared.json"
GENES = "genes.parquet"
GENES_KEY = b"wbdit_genes"  # in the schema of each parquet file: of which genes its numbers are
SPLITS = ("train", "test")
COLUMNS = ("genes", "expressions", "cell", "total_counts")  # of ours; all others are the cells' obs


def is_prepared(path: str | Path) -> bool:
    """Whether a path can only be a prepared folder: an address, or a folder of no other kind that is known."""
    folder = Path(path)
    others = folder.suffix == ".zarr" or is_10x(folder) or is_generated(folder)
    return "://" in str(path) or (folder.is_dir() and not others)


def hash_of_genes(names: list[str]) -> str:
    """Tells one table of genes from another."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


class PreparedCells:
    """
    One split of a prepared folder as a [`CellSource`]: its groups are parquet's row groups, read into CSR as they are.

    Args:
        folder (`str` or `Path`): What `wbdit prepare` wrote; also an address that fsspec knows, such as
            `hf://datasets/me/cells`.
        split (`str`, defaults to `"train"`): `"train"` or `"test"`.

    Raises:
        FileNotFoundError: If the folder or one of its files is missing.
        ValueError: If it is not what `wbdit prepare` wrote, or a file is damaged or of another set.
    """

    is_shuffled = True

    def __init__(self, folder: str | Path, split: str = "train"):
        self.folder, self.name = str(folder), f"{folder}, split {split!r},"
        self.metadata = read_metadata(folder)
        self.file_system, self.root = fsspec.core.url_to_fs(self.folder)
        self.is_local = isinstance(self.file_system, fsspec.implementations.local.LocalFileSystem)
        if split not in self.metadata["splits"]:
            raise ValueError(f"{folder} has no split {split!r}, only {', '.join(self.metadata['splits'])}.")
        self.files: dict[str, int] = self.metadata["splits"][split]  # names, and how many cells each holds
        self.var_names = pd.Index(self.var.index)
        size = self.metadata["row_group_size"]
        self.groups = [(name, row) for name, num in self.files.items() for row in range(-(-num // size))]
        self.group_sizes = np.array([min(size, self.files[name] - row * size) for name, row in self.groups])
        self._file = lru_cache(maxsize=32)(self._open_file)
        if self.is_local:  # elsewhere, when it is read
            for name in self.files:
                self._file(name)

    @cached_property
    def var(self) -> pd.DataFrame:
        """The gene table, by name."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with self.file_system.open(f"{self.root}/{GENES}", "rb") as file:
                var = pq.read_table(file).to_pandas().set_index("gene").rename_axis(None)
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.folder}/{GENES} is missing: copy or prepare it again.") from None
        except (pa.ArrowException, OSError, KeyError) as error:
            raise ValueError(f"{self.folder}/{GENES} is damaged: copy or prepare it again.") from error
        if hash_of_genes(var.index.tolist()) != self.metadata["genes_sha256"]:
            raise ValueError(f"{self.folder}/{GENES} is not that of {METADATA}: copy or prepare it again.")
        return var

    @cached_property
    def obs(self) -> pd.DataFrame:
        """The labels of all cells; names and numbers of theirs stay on disk."""
        columns: dict[str, list[pd.Categorical]] = {key: [] for key in self.metadata["labels"]}
        for name in self.files if columns else ():
            table = self._read(name, None, list(columns))
            for key, names in self.metadata["labels"].items():
                columns[key].append(_categorical(table[key], names, f"{self.folder}/{name}", key))
        num_cells = int(self.group_sizes.sum())
        data = {
            key: pd.Categorical.from_codes(np.concatenate([part.codes for part in parts]), dtype=parts[0].dtype)
            for key, parts in columns.items()
        }
        return pd.DataFrame(data, index=pd.RangeIndex(num_cells))

    def read_group(self, group: int) -> tuple[sparse.csr_matrix, np.ndarray | None]:
        name, row = self.groups[group]
        columns = ["genes", "expressions"]
        if self.metadata["values"] == "counts":
            columns.append("total_counts")
        table = self._read(name, row, columns)
        # As the sum of a row of float32 is.
        totals = table["total_counts"].to_numpy().astype(np.float32) if "total_counts" in columns else None
        return self._matrix(table, name), totals

    @property
    def fingerprint(self) -> str:
        """Of names and values of all cells of both splits."""
        return f"{self.metadata['fingerprint']}"

    def sample(self, num_cells: int, seed: int = 0) -> ad.AnnData:
        """So many cells or somewhat more, from random groups: [`~PreparedCells.read`]."""
        return self.read(choose_groups(self.group_sizes, num_cells, seed))

    def read(self, groups: Iterable[int] | None = None) -> ad.AnnData:
        """Cells in memory, those of some groups or all, with all columns of `obs` and `var`."""
        matrices, tables = [], []
        parts = [(name, None) for name in self.files] if groups is None else [self.groups[group] for group in groups]
        for name, row in parts:
            table = self._read(name, row, None)
            matrices.append(self._matrix(table, name))
            obs = table.drop_columns([key for key in ("genes", "expressions") if key in table.column_names])
            frame = obs.to_pandas().set_index("cell").rename_axis(None)
            for key, names in self.metadata["labels"].items():
                frame[key] = _categorical(table[key], names, f"{self.folder}/{name}", key)
            tables.append(frame)
        return ad.AnnData(sparse.vstack(matrices, format="csr"), obs=pd.concat(tables), var=self.var)

    def _open_file(self, name: str):
        """A parquet file of ours, checked against what the folder says of it."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = f"{self.root}/{name}"
        try:
            file = pq.ParquetFile(path if self.is_local else self.file_system.open(path, "rb"))
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.folder}/{name} is missing: copy or prepare it again.") from None
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{self.folder}/{name} is truncated or no parquet file: copy or prepare it again."
            ) from error
        schema_metadata = file.schema_arrow.metadata or {}
        if schema_metadata.get(GENES_KEY, b"").decode() != self.metadata["genes_sha256"]:
            raise ValueError(f"{self.folder}/{name} was prepared with other genes than {GENES}: it is of another set.")
        features = json.loads(schema_metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        for key, names in self.metadata["labels"].items():
            if features.get(key, {}).get("names") != names:
                raise ValueError(f"{self.folder}/{name} has other labels of {key!r} than {METADATA}.")
        if file.metadata.num_rows != self.files[name]:
            raise ValueError(
                f"{self.folder}/{name} has {file.metadata.num_rows} cells, and not {self.files[name]} as {METADATA}"
                " says: it is of another set."
            )
        return file

    def _read(self, name: str, row: int | None, columns: list[str] | None):
        """A table of a file, or of one of its row groups."""
        import pyarrow as pa

        file = self._file(name)
        try:
            return file.read(columns=columns) if row is None else file.read_row_group(row, columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.folder}/{name} is damaged: copy or prepare it again.") from error

    def _matrix(self, table, name: str) -> sparse.csr_matrix:
        """Sparse rows as CSR: the offsets and values of the lists, where Arrow has them."""
        lists = {key: table[key].combine_chunks() for key in ("genes", "expressions")}
        offsets = {key: array.offsets.to_numpy() for key, array in lists.items()}
        indptr = offsets["genes"]
        if not np.array_equal(indptr, offsets["expressions"]):
            raise ValueError(f"{self.folder}/{name} is damaged: a cell has more genes than values.")
        genes, values = (lists[key].values[indptr[0] : indptr[-1]] for key in ("genes", "expressions"))
        if genes.null_count or values.null_count or any(array.null_count for array in lists.values()):
            raise ValueError(f"{self.folder}/{name} has cells or values that are missing: prepare it again.")
        indices = genes.to_numpy()
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self.var_names):
            raise ValueError(f"{self.folder}/{name} has numbers of genes that {GENES} does not have.")
        shape = (len(table), len(self.var_names))
        return sparse.csr_matrix((values.to_numpy(), indices, indptr - indptr[0]), shape=shape)


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """
    What a prepared folder says of itself.

    Raises:
        FileNotFoundError: If there is no such folder, or it was not written by `wbdit prepare`.
        ValueError: If its metadata are damaged, or of a version that is not known here.
    """
    file_system, root = fsspec.core.url_to_fs(str(folder))
    try:
        with file_system.open(f"{root}/{METADATA}", "rb") as file:
            metadata = json.loads(file.read())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} is no folder that `wbdit prepare` wrote, nor has it the matrix.mtx of 10x: it has no"
            f" {METADATA}. Prepare the cells first."
        ) from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder}/{METADATA} cannot be read: {' '.join(str(error).split())[:300]}") from error
    known = {"splits": dict, "labels": dict, "values": str, "row_group_size": int, "genes_sha256": str}
    if not isinstance(metadata, dict) or metadata.get("format_version") != FORMAT_VERSION:
        version = metadata.get("format_version") if isinstance(metadata, dict) else None
        raise ValueError(f"{folder} has format version {version}, and this package reads {FORMAT_VERSION}.")
    if any(not isinstance(metadata.get(key), kind) for key, kind in known.items()) or metadata["row_group_size"] < 1:
        raise ValueError(f"{folder}/{METADATA} is damaged: copy or prepare it again.")
    return metadata


def _categorical(column, names: list[str], path: str, key: str) -> pd.Categorical:
    """A column of codes as labels."""
    codes = column.to_numpy(zero_copy_only=False) if column.null_count == 0 else column.fill_null(-1).to_numpy()
    if len(codes) and not -1 <= codes.min() <= codes.max() < len(names):
        raise ValueError(f"{path} has a label of {key!r} that its {len(names)} names do not have: {codes.max()}.")
    return pd.Categorical.from_codes(codes, categories=names)
