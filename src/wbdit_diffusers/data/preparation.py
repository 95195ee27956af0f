"""`wbdit prepare`: AnnData files of any size to a shuffled parquet dataset, without ever having one in memory.

Cells are read twice. The first pass checks them and decides which stay, which are held out, and where each one goes in
the shuffled set. The second one scatters them to buckets on disk, of as many as make one parquet file. Then each
bucket is put in order and written. So the memory is that of one bucket, however many cells there are.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from diffusers.utils import logging
from scipy import sparse
from tqdm.auto import tqdm

from .card import write_card
from .cells import CHUNK_SIZE, BackedSource, check_values, place_genes
from .columns import Column, merge_columns
from .prepared import COLUMNS, FORMAT_VERSION, GENES, GENES_KEY, METADATA, SPLITS, PreparedCells, hash_of_genes
from .split import held_out


logger = logging.get_logger(__name__)

ROW_GROUP_SIZE = 4096  # cells
VALUES_PER_FILE = 2**24  # about: a file is shuffled in memory
VALUES_AT_ONCE = 2**23  # that are scattered together
MAX_COUNT = 2**31 - 1  # int32


@dataclass(kw_only=True)
class PrepareConfig:
    """
    How AnnData files are prepared.

    Args:
        layer (`str`, *optional*): Layer that holds the matrix; `X` by default.
        values (`str`, defaults to `"counts"`):
            What it holds: `"counts"`, which are kept bit by bit, or `"log"` values, kept in float32.
        label_keys (`list[str]`):
            Columns of `obs` that are labels whatever they hold. Strings and categories are labels anyway. The split is
            stratified by the first one.
        genes (`str`, defaults to `"intersection"`): Which genes of several files: those that all have
            (`"intersection"`), or those that any has (`"union"`, in which those that a file lacks are zero).
        file_key (`str`, *optional*): Column of `obs` to make, with the name of each cell's file.
        min_counts (`int`, *optional*): Cells with fewer counts are left out; of counts, 1 by default.
        min_genes (`int`, defaults to 1): Cells with fewer expressed genes are left out.
        test_fraction (`float`, defaults to 0.2): Share of the cells that is held out, within each label; 0 for none.
        seed (`int`, defaults to 0): Seed of split and order.
    """

    layer: str | None = None
    values: str = "counts"
    label_keys: list[str]
    genes: str = "intersection"
    file_key: str | None = None
    min_counts: int | None = None
    min_genes: int = 1
    test_fraction: float = 0.2
    seed: int = 0

    def __post_init__(self):
        for name, choices in {"values": ("counts", "log"), "genes": ("intersection", "union")}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} is {' or '.join(choices)}, not {getattr(self, name)!r}.")
        if self.values == "log" and self.min_counts is not None:
            raise ValueError("--min_counts has no effect on log values: leave it out.")
        self.min_counts = 1 if self.min_counts is None else self.min_counts
        for name in ("min_counts", "min_genes"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is at least 1, not {getattr(self, name)}: empty cells can't be modelled.")
        if not 0 <= self.test_fraction < 1:
            raise ValueError(f"--test_fraction is at least 0 and less than 1, not {self.test_fraction}.")
        if self.seed < 0:
            raise ValueError(f"--seed is not negative, as {self.seed} is.")


def prepare(sources: list[str | Path], output: str | Path, config: PrepareConfig) -> dict[str, Any]:
    """
    Writes AnnData files as one shuffled parquet dataset with a training and a held-out split, which `train` reads, and
    `datasets.load_dataset(folder)` too. Nothing is left of it if it fails.

    Args:
        sources (`list[str | Path]`): .h5ad or .zarr files. Of several, cells are named `name-file`.
        output (`str` or `Path`): The folder to write, which must not exist.
        config ([`PrepareConfig`]): How.

    Returns:
        `dict`: what stands in the folder's `prepared.json`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file can't be read, or holds what can't be modelled, with the name of the first such cell.
        OSError: If the folder is there already, or the disk is full.
    """
    output = Path(output)
    if output.exists() or output.is_symlink():
        raise FileExistsError(f"{output} is there already: remove it, or name another folder.")
    paths = [Path(source) for source in sources]
    names = [path.name.removesuffix(".h5ad").removesuffix(".zarr") for path in paths]
    twice = [name for name in names if names.count(name) > 1]
    if twice or not names:
        what = f"are called {twice[0]!r}: name them apart" if twice else "are given: give at least one"
        raise ValueError(f"{len(twice)} files {what}.")
    output.parent.mkdir(parents=True, exist_ok=True)
    job = _Preparation(paths, names, config)
    job.scan()
    free = shutil.disk_usage(output.parent).free
    needed = 10 * job.num_values + 200 * len(job.position)
    if free < needed:
        raise OSError(f"{output.parent} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB are needed.")
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        buckets, folder = Path(temporary, "buckets"), Path(temporary, "folder")
        buckets.mkdir()
        (folder / "data").mkdir(parents=True)
        job.scatter(buckets)
        metadata = job.write(buckets, folder)
        for split in metadata["splits"]:
            _ = PreparedCells(folder, split).obs  # is read back before it is said to be there
        folder.rename(output)
    return metadata


class _Preparation:
    """What is known of all cells between the passes: some bytes of each."""

    def __init__(self, paths: list[Path], names: list[str], config: PrepareConfig):
        self.paths, self.names, self.config = paths, names, config
        self.columns = self._gather_names()

    # ==================== Names ====================

    def _gather_names(self) -> dict[str, Column]:
        """Columns and genes of the dataset, and the place of each file's genes in it."""
        config, all_genes = self.config, []
        all_columns: dict[str, None] = {}
        columns: dict[str, Column] | None = None
        self.num_cells = 0
        for path, name in zip(self.paths, self.names):
            with BackedSource(path, config.layer) as file:
                _check_names(file)
                obs = self._obs(file, name)
                for key in config.label_keys:
                    if key not in obs:
                        raise ValueError(f"{path} has no obs column {key!r}; it has {list(obs)}.")
                    if obs[key].isna().any():
                        raise ValueError(f"{path}: obs[{key!r}] is missing for {obs[key].isna().sum()} cells.")
                all_genes.append(file.var.index.astype(str))
                all_columns |= dict.fromkeys(obs)
                columns = merge_columns(columns, obs, config.label_keys)
                self.num_cells += len(obs)
                if len(all_genes) == 1:
                    var = file.var
        assert columns is not None  # there is a file
        left_out = [key for key in all_columns if key not in columns]
        if left_out:
            logger.warning(f"Columns of obs that not all files have are left out: {', '.join(map(str, left_out))}.")
        genes = all_genes[0]
        for others in all_genes[1:]:
            if config.genes == "union":
                genes = genes.append(others[~others.isin(genes)])
            else:
                genes = genes[genes.isin(others)]
        if len(genes) == 0:
            raise ValueError("No gene is in all files: use --genes union, or the same kind of gene name.")
        self.genes = genes
        self.places = [genes.get_indexer(own) for own in all_genes]
        # What is known of genes is taken from the first file, if it has all of them.
        has_all = genes.isin(all_genes[0]).all()
        self.var = var.set_axis(all_genes[0]).reindex(genes) if has_all else pd.DataFrame(index=genes)
        return columns

    def _obs(self, file: BackedSource, name: str) -> pd.DataFrame:
        """`obs` as it will be: cells of several files named after them, and the file as a label."""
        obs = file.obs.drop(columns=["total_counts"], errors="ignore")  # is counted anew
        obs.columns = obs.columns.astype(str)
        for key in obs:
            if key in COLUMNS:
                raise ValueError(f"{file.path} has an obs column {key!r}, a name that the dataset needs: rename it.")
        if self.config.file_key is not None:
            if self.config.file_key in obs or self.config.file_key in COLUMNS:
                raise ValueError(f"--file_key {self.config.file_key}: {file.path} has such a column: name another.")
            obs = obs.assign(**{self.config.file_key: pd.Categorical([name] * len(obs))})
        if len(self.names) > 1:
            obs = obs.set_axis(obs.index.astype(str) + f"-{name}")
        return obs

    # ==================== First pass ====================

    def scan(self):
        """Checks all values, and decides for each cell whether it stays, on which side, and where."""
        config = self.config
        stays, labels, first = np.zeros(self.num_cells, dtype=bool), np.zeros(self.num_cells, dtype=np.int32), 0
        self.cells_per_gene, self.num_values = np.zeros(len(self.genes), dtype=np.int64), 0
        label_key = config.label_keys[0] if config.label_keys else None
        for number, obs, matrix in self._chunks("Checking"):
            check_values(matrix, str(self.paths[number]), obs.index, integer=config.values == "counts")
            if config.values == "counts" and matrix.nnz and matrix.data.max() > MAX_COUNT:
                raise ValueError(f"{self.paths[number]} has a count of {matrix.data.max():g}, more than {MAX_COUNT}.")
            matrix.eliminate_zeros()
            placed = place_genes(matrix, self.places[number], len(self.genes))
            kept = (np.diff(matrix.indptr) >= config.min_genes) & (np.diff(placed.indptr) > 0)
            if config.values == "counts":
                kept &= np.asarray(matrix.sum(axis=1)).ravel() >= config.min_counts
            stays[first : first + len(kept)] = kept
            if label_key is not None:
                codes = self.columns[label_key].to_arrow(obs[label_key]).to_numpy()
                labels[first : first + len(kept)] = codes
            placed = placed[kept]
            self.cells_per_gene += np.bincount(placed.indices, minlength=len(self.genes))
            self.num_values += placed.nnz
            first += len(kept)
        num_left = int(stays.sum())
        if num_left == 0:
            raise ValueError("No cell is left: lower --min_counts or --min_genes.")
        if num_left < len(stays):
            logger.warning(f"{len(stays) - num_left} of {len(stays)} cells have too few counts or genes: left out.")
        self.stays = stays
        is_test = np.zeros(num_left, dtype=bool)
        if config.test_fraction > 0:
            is_test = held_out(labels[stays], config.test_fraction, config.seed)
        # Where each cell goes: training cells first, both sides in random order.
        rng = np.random.default_rng([config.seed, num_left])
        self.position = np.empty(num_left, dtype=np.uint32)
        num_train = num_left - int(is_test.sum())
        self.position[~is_test] = rng.permutation(num_train)
        self.position[is_test] = num_train + rng.permutation(num_left - num_train)
        self._divide(num_train, num_left)

    def _divide(self, num_train: int, num_cells: int):
        """Which positions make one file: some whole row groups, of about as many values as can be in memory."""
        per_group = self.num_values / num_cells * ROW_GROUP_SIZE
        size = ROW_GROUP_SIZE * int(np.clip(VALUES_PER_FILE / max(per_group, 1), 1, 16))
        self.files: dict[str, dict[str, int]] = {}
        starts = []
        for split, first, last in zip(SPLITS, (0, num_train), (num_train, num_cells)):
            firsts = list(range(first, last, size))
            if firsts:
                self.files[split] = {
                    f"data/{split}-{i:05d}-of-{len(firsts):05d}.parquet": min(size, last - start)
                    for i, start in enumerate(firsts)
                }
            starts += firsts
        self.bucket_starts = np.array(starts)

    # ==================== Second pass ====================

    def scatter(self, folder: Path):
        """Each cell to its bucket; within a bucket in the order of the files still."""
        import pyarrow as pa

        tables, num_values, first, seen = [], 0, 0, 0
        for number, obs, matrix in self._chunks("Scattering"):
            kept = self.stays[first : first + len(obs)]
            first += len(obs)
            matrix = matrix[kept]
            matrix.eliminate_zeros()
            tables.append(self._table(number, obs[kept], matrix, self.position[seen : seen + matrix.shape[0]]))
            seen += matrix.shape[0]
            num_values += matrix.nnz
            if num_values >= VALUES_AT_ONCE:
                self._flush(pa.concat_tables(tables), folder)
                tables, num_values = [], 0
        if tables:
            self._flush(pa.concat_tables(tables), folder)

    def _table(self, number: int, obs: pd.DataFrame, matrix: sparse.csr_matrix, position: np.ndarray):
        import pyarrow as pa

        totals = np.asarray(matrix.sum(axis=1, dtype=np.float64)).ravel()  # over all genes of the file
        matrix = place_genes(matrix, self.places[number], len(self.genes))
        is_counts = self.config.values == "counts"
        values = matrix.data.astype(np.int32 if is_counts else np.float32)
        offsets = pa.array(matrix.indptr.astype(np.int32))
        columns = {
            "position": pa.array(position),
            "genes": pa.ListArray.from_arrays(offsets, pa.array(matrix.indices.astype(np.int32))),
            "expressions": pa.ListArray.from_arrays(offsets, pa.array(values)),
            "cell": pa.array(obs.index.astype(str), pa.string()),
        }
        if is_counts:
            columns["total_counts"] = pa.array(totals.astype(np.int64))
        columns |= {key: column.to_arrow(obs[key]) for key, column in self.columns.items()}
        return pa.table(columns)

    def _flush(self, table, folder: Path):
        """Adds cells to their buckets' files."""
        import pyarrow as pa

        bucket = np.searchsorted(self.bucket_starts, table["position"].to_numpy(), side="right") - 1
        order = np.argsort(bucket, kind="stable")
        bucket = bucket[order]
        firsts = np.flatnonzero(np.diff(bucket, prepend=-1))
        table = table.combine_chunks()
        for first, last in zip(firsts, [*firsts[1:], len(bucket)]):
            part = table.take(order[first:last])
            with Path(folder, str(bucket[first])).open("ab") as file, pa.ipc.new_stream(file, part.schema) as stream:
                stream.write_table(part)

    def _chunks(self, description: str) -> Iterator[tuple[int, pd.DataFrame, sparse.csr_matrix]]:
        """Number of the file, and `obs` and values of some of its cells."""
        with tqdm(total=self.num_cells, desc=description, unit=" cells", mininterval=1) as progress_bar:
            for number, (path, name) in enumerate(zip(self.paths, self.names)):
                with BackedSource(path, self.config.layer) as file:
                    obs = self._obs(file, name)
                    for start in range(0, len(obs), CHUNK_SIZE):
                        chunk = obs.iloc[start : start + CHUNK_SIZE]
                        yield number, chunk, file.read_rows(np.arange(start, start + len(chunk)))
                        progress_bar.update(len(chunk))

    # ==================== Writing ====================

    def write(self, buckets: Path, folder: Path) -> dict[str, Any]:
        """Each bucket in order as a parquet file, then genes, metadata and card."""
        import pyarrow.parquet as pq
        from datasets import Features, List, Value

        is_counts = self.config.values == "counts"
        features = {"genes": List(Value("int32")), "expressions": List(Value("int32" if is_counts else "float32"))}
        features |= {"cell": Value("string")} | ({"total_counts": Value("int64")} if is_counts else {})
        features |= {key: column.feature() for key, column in self.columns.items()}
        schema = Features(features).arrow_schema
        genes_sha256 = hash_of_genes(self.genes.tolist())
        schema = schema.with_metadata({**schema.metadata, GENES_KEY: genes_sha256.encode()})
        fingerprint = hashlib.sha256(genes_sha256.encode())
        names = [name for files in self.files.values() for name in files]
        for bucket, name in enumerate(tqdm(names, desc="Writing", unit=" files")):
            table = _read_bucket(buckets / str(bucket))
            table = table.take(np.argsort(table["position"].to_numpy())).select(schema.names).cast(schema)
            for key in ("genes", "expressions"):
                for chunk in table[key].chunks:
                    fingerprint.update(chunk.values.to_numpy())
            fingerprint.update("\n".join(table["cell"].to_pylist()).encode())
            # Labels and small counts are few different values; the genes of a cell are increasing numbers.
            with pq.ParquetWriter(
                folder / name,
                schema,
                compression="zstd",
                use_dictionary=["expressions.list.element", *self.columns],
                column_encoding={"genes.list.element": "DELTA_BINARY_PACKED"},
            ) as writer:
                writer.write_table(table, row_group_size=ROW_GROUP_SIZE)
            (buckets / str(bucket)).unlink()
            del table
        self._write_genes(folder)
        metadata = {
            "format_version": FORMAT_VERSION,
            "fingerprint": fingerprint.hexdigest(),
            "genes_sha256": genes_sha256,
            "num_genes": len(self.genes),
            "values": self.config.values,
            "row_group_size": ROW_GROUP_SIZE,
            "labels": {key: column.names for key, column in self.columns.items() if column.kind == "label"},
            "splits": self.files,
            "files": self.names,
            "num_cells_in_files": self.num_cells,
            "label_keys": self.config.label_keys,
            "min_counts": self.config.min_counts,
            "min_genes": self.config.min_genes,
            "test_fraction": self.config.test_fraction,
            "seed": self.config.seed,
        }
        (folder / METADATA).write_text(json.dumps(metadata, indent=1))
        write_card(folder, metadata)
        return metadata

    def _write_genes(self, folder: Path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        var = self.var.drop(columns=["gene", "num_cells"], errors="ignore").reset_index(drop=True)
        var = var.set_axis(var.columns.astype(str), axis=1)
        columns = {"gene": pa.array(self.genes, pa.string()), "num_cells": pa.array(self.cells_per_gene)}
        for key in var:
            try:
                columns[key] = pa.Array.from_pandas(var[key])
            except (pa.ArrowException, TypeError):
                logger.warning(f"The var column {key!r} has no type of parquet's, and is left out.")
        pq.write_table(pa.table(columns), folder / GENES)


def _read_bucket(path: Path):
    """All cells of a bucket: one stream of Arrow's after the other."""
    import pyarrow as pa

    tables = []
    with path.open("rb") as file:
        while file.peek(1):
            with pa.ipc.open_stream(file) as stream:
                tables.append(stream.read_all())
    return pa.concat_tables(tables).combine_chunks()


def _check_names(file: BackedSource):
    if len(file.obs) == 0 or len(file.var) == 0:
        raise ValueError(f"{file.path} is empty: {len(file.obs)} cells × {len(file.var)} genes.")
    for what, index in (("gene", file.var.index), ("cell", file.obs.index)):
        if not index.is_unique:
            name, names = index[index.duplicated()][0], {"gene": "var_names", "cell": "obs_names"}[what]
            raise ValueError(f"{file.path} has {what} {name!r} more than once: call `adata.{names}_make_unique()`.")
