"""`wbdit prepare`: AnnData files of any size become one shuffled parquet dataset, without a whole file in memory."""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from diffusers.utils import logging
from huggingface_hub import DatasetCard, DatasetCardData
from tqdm.auto import tqdm

from ..configs import PrepareConfig
from ..files import write_whole
from ..markdown import as_text
from ..progress import bar_options
from .cells import (
    CHUNK_SIZE,
    BackedSource,
    check_unique,
    check_values,
    hash_rows,
    label_column,
    place_genes,
    sorted_csr,
)
from .prepared import ROW_GROUP_SIZE, make_features, make_table, read_metadata, write_file, write_metadata
from .split import held_out


logger = logging.get_logger(__name__)

MAX_LABELS = 10_000  # a column of strings with more values, or as many as half of the cells, is not of labels
CELLS_PER_FILE = 16 * ROW_GROUP_SIZE


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """
    Writes AnnData files as one shuffled dataset with a training and a held-out split. `train` reads it, and so does
    `datasets.load_dataset(folder)`. No file is in memory as a whole. Cells of several files are named `name-file`.
    Returns the contents of the folder's `cells.json`.
    """
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    output, paths = config.output_dir, config.files
    if output.exists():
        raise FileExistsError(f"{output} exists: remove it, or name another folder.")
    if config.round_counts and config.values == "log":
        raise ValueError("--round_counts is for counts: leave it out with --values log.")
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"Two files are called {max(names, key=names.count)!r}: rename one of them.")
    obs, var = _read_names(paths, config)
    features = make_features(ad.AnnData(obs=obs), config.values)
    output.parent.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(output.parent).free, sum(path.stat().st_size for path in paths)
    if free < needed:
        raise OSError(f"{output.parent} has {free / 1e9:.1f} GB free, but {output} needs {needed / 1e9:.1f} GB.")
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        # 1. One pass over the files: check, filter, and append to one file of Arrow
        arrow, parts, copies = f"{temporary}/cells.arrow", [], []
        cells_per_gene = np.zeros(len(var), dtype=np.int64)
        with ArrowWriter(path=arrow, features=features) as writer:
            for cells in _chunks(paths, obs, var, config):
                parts.append(cells.obs)
                copies.append(hash_rows(cells.X))
                cells_per_gene += cells.X.getnnz(axis=0)
                if cells.n_obs:
                    writer.write_table(make_table(cells, features))
            cells = ad.AnnData(obs=pd.concat(parts), var=var.assign(num_cells=cells_per_gene))
            writer.finalize()
        if cells.n_obs < len(obs):
            logger.warning(f"{len(obs) - cells.n_obs} cells have too few counts or genes and are left out.")

        # 2. Split and shuffle, file by file
        dataset, is_test = Dataset.from_file(arrow), np.zeros(cells.n_obs, dtype=bool)
        if config.test_fraction:
            label = [cells.obs[key].cat.codes.to_numpy(np.int64) for key in config.label_keys[:1]]
            codes = label[0] if label else np.zeros(cells.n_obs, dtype=np.int64)
            is_test = held_out(codes, config.test_fraction, config.seed, np.concatenate(copies))
        rng = np.random.default_rng([config.seed, cells.n_obs])

        def write(folder: Path):
            (folder / "data").mkdir(parents=True)
            splits: dict[str, dict[str, list[int]]] = {}
            for split, mask in {"train": ~is_test, "test": is_test}.items():
                if not mask.any():
                    continue
                order = rng.permutation(np.flatnonzero(mask))
                starts, splits[split] = range(0, len(order), CELLS_PER_FILE), {}
                for number, start in enumerate(tqdm(starts, **bar_options(desc=f"Writing {split}", unit=" files"))):
                    shard = dataset.select(order[start : start + CELLS_PER_FILE]).with_format("arrow")
                    name = f"data/{split}-{number:05d}-of-{len(starts):05d}.parquet"
                    splits[split][name] = write_file(folder / name, shard.iter(ROW_GROUP_SIZE), features)
            fingerprint = hashlib.sha256("\n".join([*cells.var_names, *cells.obs_names]).encode()).hexdigest()
            more = {"fingerprint": fingerprint, "seed": config.seed}
            _write_card(folder, write_metadata(folder, cells, config.values, features, splits, **more), names)

        write_whole(output, write)
    return read_metadata(output)


def _read_names(paths: list[Path], config: PrepareConfig) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`obs` of all cells, and `var` of the genes of the dataset."""
    all_obs, all_var = [], []
    for path in paths:
        with BackedSource(path, config.layer) as file:
            obs, var = file.obs, file.var
        obs = obs.drop(columns="total_counts", errors="ignore")  # is counted again
        check_unique(obs.index, "cell", f" in {path}")
        check_unique(var.index, "gene", f" in {path}")
        for key in config.label_keys:
            label_column(obs, key)
        if config.file_key is not None:
            obs.insert(obs.shape[1], config.file_key, path.stem)
        all_obs.append(obs if len(paths) == 1 else obs.set_axis(obs.index.astype(str) + f"-{path.stem}"))
        all_var.append(var.set_axis(var.index.astype(str)))
    obs = pd.concat(all_obs, join="inner")
    dropped = [str(key) for one in all_obs for key in one if key not in obs]
    if dropped:
        logger.warning(f"Columns of obs that not all files have are left out: {', '.join(dict.fromkeys(dropped))}.")
    obs = obs.set_axis(obs.columns.astype(str), axis=1)
    for key, column in obs.items():
        is_text = column.dtype.kind not in "biuf"
        is_label = column.nunique() <= min(MAX_LABELS, max(len(column) // 2, 2))
        if key in config.label_keys or key == config.file_key or (is_text and is_label):
            column = column.astype("category").cat.remove_unused_categories()
            obs[key] = column.cat.rename_categories(column.cat.categories.astype(str))
    if config.values == "counts":
        obs["total_counts"] = 0  # until the values are read
    genes = all_var[0].index
    for var in all_var[1:]:
        genes = (genes.union if config.genes == "union" else genes.intersection)(var.index, sort=False)
    fewest = min(map(len, all_var))
    if len(genes) < fewest / 2:
        fix = "use --genes union, or the same kind of gene name"
        raise ValueError(f"Only {len(genes)} of {fewest} genes are in all files: {fix}.")
    return obs, all_var[0].reindex(genes)


def _chunks(paths: list[Path], obs: pd.DataFrame, var: pd.DataFrame, config: PrepareConfig) -> Iterator[ad.AnnData]:
    """The cells that are kept, some at a time."""
    first = 0
    with tqdm(**bar_options(total=len(obs), desc="Reading", unit=" cells", mininterval=1)) as progress_bar:
        for path in paths:
            with BackedSource(path, config.layer, config.round_counts) as file:
                places = var.index.get_indexer(file.var.index.astype(str))
                for start in range(0, len(file.obs), CHUNK_SIZE):
                    matrix = sorted_csr(file.read_rows(np.arange(start, min(start + CHUNK_SIZE, len(file.obs)))))
                    chunk = obs.iloc[first : first + matrix.shape[0]]
                    first += matrix.shape[0]
                    check_values(matrix, file.name, chunk.index, integer=config.values == "counts")
                    placed = place_genes(matrix, places, len(var))
                    is_kept = (np.diff(matrix.indptr) >= config.min_genes) & (np.diff(placed.indptr) > 0)
                    if config.values == "counts":
                        totals = np.asarray(matrix.sum(axis=1, dtype=np.float64)).ravel()  # over all genes of the file
                        is_kept &= totals >= config.min_counts
                        chunk = chunk.assign(total_counts=totals.astype(np.int64))
                    yield ad.AnnData(placed[is_kept], obs=chunk[is_kept], var=var[[]])
                    progress_bar.update(len(chunk))


def _write_card(folder: Path, metadata: dict[str, Any], names: list[str]):
    """Writes README.md, whose head names the files of each split for the Hub and for `datasets`."""
    sizes = {split: sum(map(sum, files.values())) for split, files in metadata["splits"].items()}
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in sizes]
    configs = [{"config_name": "cells", "default": True, "data_files": files}]
    configs.append({"config_name": "genes", "data_files": "genes.parquet"})
    card = DatasetCard.from_template(
        DatasetCardData(tags=["single-cell", "scRNA-seq", "wbdit_diffusers"], configs=configs),
        template_path=Path(__file__).parent / "card_template.md",
        num_cells=f"{sum(sizes.values()):,}",
        splits=", ".join(f"{number:,} in {split}" for split, number in sizes.items()),
        num_genes=f"{metadata['num_genes']:,}",
        values=metadata["values"],
        names=", ".join(map(as_text, names)),
    )
    card.save(folder / "README.md")
