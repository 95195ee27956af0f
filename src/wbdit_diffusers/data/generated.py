"""Reads the folder of parquet files that `wbdit generate` writes: the way back to an AnnData."""

from itertools import takewhile
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse


GENES = "genes.parquet"
COLUMNS = ("cell", "genes", "expressions")  # all others are labels and numbers of a cell, or lists: layers and obsm


def is_generated(path: str | Path) -> bool:
    """Whether a folder holds generated cells as parquet files."""
    folder = Path(path)
    return (folder / GENES).is_file() and any(folder.glob("cells-*.parquet"))


def read_generated(folder: str | Path) -> ad.AnnData:
    """
    Reads generated cells into memory.

    Args:
        folder (`str` or `Path`): What `write_cells`, and so `wbdit generate`, wrote as parquet.

    Returns:
        `AnnData`: with labels as categories, layers, `obsm`, and the loadings of programs in `varm`; without `uns`,
        which parquet files don't hold.

    Raises:
        ValueError: If a file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import ClassLabel, Features

    folder = Path(folder)
    try:
        table = pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("cells-*.parquet"))])
        genes = pq.read_table(folder / GENES).to_pandas().set_index("gene").rename_axis(None)
        features = Features.from_arrow_schema(table.schema)
        lists = [name for name in table.column_names if pa.types.is_list(table.schema.field(name).type)]
        obs = pd.DataFrame(index=pd.Index(table["cell"].to_pylist()))
        for key in table.column_names:
            if key in COLUMNS or key in lists:
                continue
            values = table[key].to_numpy()
            names = features[key].names if isinstance(features[key], ClassLabel) else None
            obs[key] = values if names is None else pd.Categorical.from_codes(values, names)
        indices = table["genes"].combine_chunks()
        indptr = indices.offsets.to_numpy()
        values = {name: table[name].combine_chunks() for name in lists if name != "genes"}

        def matrix(name: str) -> sparse.csr_matrix:
            matrix = sparse.csr_matrix(
                (values[name].flatten().to_numpy(), indices.flatten().to_numpy(), indptr - indptr[0]),
                shape=(len(table), len(genes)),
            )
            matrix.check_format()  # that it names no gene which there is not
            return matrix

        # Layers stand before the labels and have a value for each of the cell's genes; after them stands `obsm`.
        before = takewhile(lambda name: name in values, table.column_names[len(COLUMNS) :])
        layers = [name for name in before if np.array_equal(np.diff(values[name].offsets.to_numpy()), np.diff(indptr))]
        layers.append("expressions")
        cells = ad.AnnData(matrix("expressions"), obs=obs, var=genes[[]])
        for name in layers[:-1]:
            cells.layers[name] = matrix(name)
        for name in values:
            if name not in layers:
                cells.obsm[name] = values[name].flatten().to_numpy().reshape(len(table), -1)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{folder} is damaged: {' '.join(str(error).split())[:300]}") from error
    loadings = pd.Index([name.rpartition("_")[0] for name in genes])
    for name in loadings.unique():
        cells.varm[name] = genes.loc[:, loadings == name].to_numpy()
    return cells
