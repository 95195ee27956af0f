"""`wbdit prepare`: AnnData files of any size become one shuffled parquet dataset, without a whole file in memory."""

import hashlib
import html
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from diffusers.utils import logging
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from scipy import sparse
from tqdm.auto import tqdm

from ..files import write_whole
from ..flags import pydantic_config
from .cells import CHUNK_SIZE, BackedSource, check_values, label_column, place_genes
from .prepared import RESERVED, ROW_GROUP_SIZE, make_features, make_table, write_file, write_tables_of_folder
from .split import held_out
from .write import check_free_space


logger = logging.get_logger(__name__)

MAX_LABELS = 10_000  # a column of strings with more values, or as many as half of the cells, is not of labels
CELLS_PER_FILE = 16 * ROW_GROUP_SIZE


@dataclass(config=pydantic_config, kw_only=True)
class PrepareConfig:
    """How AnnData files are prepared."""

    layer: str | None = None
    """Layer that holds the matrix. Default: X."""
    values: Literal["counts", "log"] = "counts"
    """Content of the matrix: integer counts, which are kept bit by bit, or log values, kept in float32."""
    label_keys: list[str] = Field(default_factory=list)
    """Columns of obs to treat as labels, the cell type first. The split is stratified by the first one. Categories
    and strings are labels anyway."""
    genes: Literal["intersection", "union"] = "intersection"
    """Genes of several files: those in all files, or those in any file."""
    file_key: str | None = None
    """Name of a new column of obs that holds the file of each cell."""
    min_counts: PositiveInt = 1
    """Minimum number of counts of a cell. Others are left out."""
    min_genes: PositiveInt = 1
    """Minimum number of expressed genes of a cell. Others are left out."""
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Fraction of cells that is held out, within each label. 0 for none."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the split and of the order."""


def prepare(sources: Sequence[str | Path], output: str | Path, config: PrepareConfig) -> dict[str, Any]:
    """
    Writes AnnData files as one shuffled dataset with a training and a held-out split. `train` reads it, and so does
    `datasets.load_dataset(folder)`. The files are read in chunks; a dataset on disk is shuffled by `datasets`.

    Args:
        sources (`list[str | Path]`): .h5ad or .zarr files. Cells of several files are named `name-file`.
        output (`str` or `Path`): New folder to write.
        config ([`PrepareConfig`]): Genes, cells and split.

    Returns:
        `dict`: the contents of the folder's `cells.json`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file can't be read, or holds a value that can't be modelled.
        OSError: If the folder exists, or the disk is full. Nothing is left of it.
    """
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    output, paths = Path(output), [Path(source) for source in sources]
    if output.exists():
        raise FileExistsError(f"{output} exists: remove it, or name another folder.")
    names = [path.name.removesuffix(".h5ad").removesuffix(".zarr") for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"Two files are called {max(names, key=names.count)!r}: rename one of them.")
    obs, genes, var = _read_names(paths, names, config)
    output.parent.mkdir(parents=True, exist_ok=True)
    check_free_space(output, sum(path.stat().st_size for path in paths if path.is_file()))
    features = make_features(obs, config.values == "counts")
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        # 1. One pass over the files: check, filter, and append to one file of Arrow
        arrow, kept, cells_per_gene = f"{temporary}/cells.arrow", [], np.zeros(len(genes), dtype=np.int64)
        with ArrowWriter(path=arrow, features=features) as writer:
            for is_kept, matrix, totals, chunk in _chunks(paths, obs, genes, config):
                kept.append(is_kept)
                cells_per_gene += np.bincount(matrix.indices, minlength=len(genes))
                if len(chunk):
                    writer.write_table(make_table(matrix, chunk, features, totals))
            if not np.concatenate(kept).any():
                raise ValueError("No cell is left: lower --min_counts or --min_genes.")
            writer.finalize()
        obs = obs[np.concatenate(kept)]
        if len(obs) < sum(map(len, kept)):
            logger.warning(f"{sum(map(len, kept)) - len(obs)} cells have too few counts or genes and are left out.")

        # 2. Split and shuffle, file by file
        dataset, splits = Dataset.from_file(arrow), _split_and_shuffle(obs, config)
        labels = {key: feature.names for key, feature in features.items() if hasattr(feature, "names")}
        metadata: dict[str, Any] = {
            "fingerprint": hashlib.sha256("\n".join([*genes, *obs.index]).encode()).hexdigest(),
            "values": config.values,
            "num_genes": len(genes),
            "labels": labels,
            "obs": list(obs),
            "layers": [],
            "obsm": [],
            "varm": {},
            "splits": {},
            "seed": config.seed,
        }

        def write(folder: Path):
            (folder / "data").mkdir(parents=True)
            for split, order in splits.items():
                files = metadata["splits"][split] = {}
                starts = range(0, len(order), CELLS_PER_FILE)
                for number, start in enumerate(tqdm(starts, desc=f"Writing {split}", unit=" files")):
                    shard = dataset.select(order[start : start + CELLS_PER_FILE]).with_format("arrow")
                    name = f"data/{split}-{number:05d}-of-{len(starts):05d}.parquet"
                    files[name] = write_file(folder / name, shard.iter(ROW_GROUP_SIZE), features)
            _write_card(folder, metadata, names)
            write_tables_of_folder(folder, var.assign(num_cells=cells_per_gene), metadata)

        write_whole(output, write)
    return metadata


def _read_names(
    paths: list[Path], names: list[str], config: PrepareConfig
) -> tuple[pd.DataFrame, pd.Index, pd.DataFrame]:
    """`obs` of all cells, the genes of the dataset, and the gene table."""
    all_obs, all_var = [], []
    for path, name in zip(paths, names):
        with BackedSource(path, config.layer) as file:
            obs, var = file.obs, file.var
        for what, index, fix in (("cell", obs.index, "obs_names"), ("gene", var.index, "var_names")):
            if not index.is_unique:
                twice = index[index.duplicated()][0]
                raise ValueError(f"{path} has {what} {twice!r} more than once: call `adata.{fix}_make_unique()`.")
        obs = obs.drop(columns="total_counts", errors="ignore")  # is counted again
        reserved = [key for key in obs if key in RESERVED]
        if reserved or config.file_key in obs or config.file_key in RESERVED:
            key = reserved[0] if reserved else config.file_key
            raise ValueError(f"{path} has an obs column {key!r}, a name that is needed: rename it.")
        for key in config.label_keys:
            label_column(obs, key)
        obs = obs if len(paths) == 1 else obs.set_axis(obs.index.astype(str) + f"-{name}")
        all_obs.append(obs if config.file_key is None else obs.assign(**{config.file_key: name}))
        all_var.append(var.set_axis(var.index.astype(str)))
    obs = pd.concat(all_obs, join="inner")
    dropped = [str(key) for one in all_obs for key in one if key not in obs]
    if dropped:
        logger.warning(f"Columns of obs that not all files have are left out: {', '.join(dict.fromkeys(dropped))}.")
    obs = obs.set_axis(obs.columns.astype(str), axis=1)
    for key in obs:
        is_text = obs[key].dtype.kind not in "biuf"
        if key in config.label_keys or key == config.file_key or (is_text and _is_label(obs[key])):
            column = obs[key].astype("category").cat.remove_unused_categories()
            obs[key] = column.cat.rename_categories(column.cat.categories.astype(str))
    genes = all_var[0].index
    for var in all_var[1:]:
        is_union = config.genes == "union"
        genes = genes.append(var.index[~var.index.isin(genes)]) if is_union else genes[genes.isin(var.index)]
    if not len(genes):
        raise ValueError("No gene is in all files: use --genes union, or the same kind of gene name.")
    return obs, genes, all_var[0].reindex(genes).drop(columns="num_cells", errors="ignore")


def _is_label(column: pd.Series) -> bool:
    """Whether a column of strings holds labels, not names."""
    return column.nunique() <= min(MAX_LABELS, max(len(column) // 2, 2))


def _chunks(
    paths: list[Path], obs: pd.DataFrame, genes: pd.Index, config: PrepareConfig
) -> Iterator[tuple[np.ndarray, sparse.csr_matrix, np.ndarray | None, pd.DataFrame]]:
    """Of some cells at a time: mask of those kept, their values, total counts and `obs`."""
    is_counts, first = config.values == "counts", 0
    with tqdm(total=len(obs), desc="Reading", unit=" cells", mininterval=1) as progress_bar:
        for path in paths:
            with BackedSource(path, config.layer) as file:
                places = genes.get_indexer(file.var.index.astype(str))
                for start in range(0, len(file.obs), CHUNK_SIZE):
                    matrix = file.read_rows(np.arange(start, min(start + CHUNK_SIZE, len(file.obs))))
                    chunk = obs.iloc[first : first + matrix.shape[0]]
                    first += matrix.shape[0]
                    check_values(matrix, file.name, chunk.index, integer=is_counts)
                    matrix = sparse.csr_matrix(matrix)
                    matrix.eliminate_zeros()
                    placed = place_genes(matrix, places, len(genes))
                    totals = np.asarray(matrix.sum(axis=1, dtype=np.float64)).ravel()  # over all genes of the file
                    is_kept = (np.diff(matrix.indptr) >= config.min_genes) & (np.diff(placed.indptr) > 0)
                    if is_counts:
                        is_kept &= totals >= config.min_counts
                    yield is_kept, placed[is_kept], totals[is_kept] if is_counts else None, chunk[is_kept]
                    progress_bar.update(len(chunk))


def _split_and_shuffle(obs: pd.DataFrame, config: PrepareConfig) -> dict[str, np.ndarray]:
    """The cells of each split in random order."""
    codes = np.zeros(len(obs), dtype=np.int64)
    if config.label_keys:
        codes = obs[config.label_keys[0]].cat.codes.to_numpy().astype(np.int64)
    is_test = held_out(codes, config.test_fraction, config.seed) if config.test_fraction else np.zeros(len(obs), bool)
    rng = np.random.default_rng([config.seed, len(obs)])
    splits = {"train": rng.permutation(np.flatnonzero(~is_test)), "test": rng.permutation(np.flatnonzero(is_test))}
    return {split: order for split, order in splits.items() if len(order)}


def _write_card(folder: Path, metadata: dict[str, Any], names: list[str]):
    """Writes README.md, whose head names the file of each split for the Hub and for `datasets`."""
    from huggingface_hub import DatasetCard, DatasetCardData

    def code(text: str) -> str:
        """A name as code, without markup."""
        return "`" + html.escape(" ".join(text.replace("`", "'").split())) + "`"

    sizes = {split: sum(map(sum, files.values())) for split, files in metadata["splits"].items()}
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in sizes]
    data = DatasetCardData(
        tags=["single-cell", "scRNA-seq", "wbdit_diffusers"],
        configs=[
            {"config_name": "cells", "default": True, "data_files": files},
            {"config_name": "genes", "data_files": "genes.parquet"},
        ],
    )
    holds = "integer counts" if metadata["values"] == "counts" else "log values"
    rows = "\n".join(f"| {split} | {number:,} |" for split, number in sizes.items())
    labels = "\n".join(
        f"- {code(key)}: {', '.join(map(code, values[:30]))}{', …' if len(values) > 30 else ''}"
        for key, values in metadata["labels"].items()
    )
    text = f"""---
{data.to_yaml()}
---

# Single cells

{sum(sizes.values()):,} cells × {metadata["num_genes"]:,} genes with {holds}, shuffled.
From {", ".join(map(code, names))}.
The test split was drawn at random within each label. `wbdit prepare` wrote this dataset.

| split | cells |
|---|---|
{rows}

Each row is a cell. `genes` are row numbers of `genes.parquet`, and `expressions` are the values of these genes. All
other genes are zero. `cell` is the cell's name, and `total_counts` its counts over all genes of its file.

{labels}

```python
from datasets import load_dataset
from wbdit_diffusers.data import read_cells

cells = load_dataset("THIS_FOLDER", "cells", split="train")  # rows
adata = read_cells("THIS_FOLDER", split="train")  # an AnnData in memory
```
"""
    DatasetCard(text, ignore_metadata_errors=True).save(folder / "README.md")
