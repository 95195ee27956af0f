"""
Labels of cells, as names and as integer codes.

A *label key* is a column of `obs` that conditions the cells, the cell type first. Its *categories* are the labels of
the training cells. *Conditions* are the labels that a caller asks for, by label key. *Class labels* are the codes that
the denoiser sees: one column for each label key, -1 where no label is asked for.
"""

import difflib
import reprlib

import numpy as np
import pandas as pd

from ..data.cells import label_column


NUM_NAMED = 20  # labels in a message at most, the closest first


def read_labels(obs: pd.DataFrame, label_key: str) -> tuple[list[str], np.ndarray]:
    """
    The labels of cells: their names in the order of the column's categories (sorted, if it has none), and the position
    of each cell's label among them. Raises a `ValueError` if the column or a label is missing.
    """
    column = label_column(obs, label_key).astype("category").cat.remove_unused_categories()
    of_category, names = pd.factorize(column.cat.categories.astype(str).to_numpy(dtype=object))
    return names.tolist(), of_category[column.cat.codes.to_numpy()]


def encode(labels: str | list[str] | np.ndarray, label_key: str, categories: list[str]) -> np.ndarray:
    """The code of each label. Raises a `ValueError` that suggests the closest category for an unknown label."""
    known = pd.Index(categories)
    given = np.atleast_1d(np.asarray(labels))
    labels = given.astype(str)
    codes = known.get_indexer(labels)
    if given.dtype.kind in "iuf" and (codes < 0).any():  # 2.0 is "2"
        numbers = dict(zip(pd.to_numeric(categories, errors="coerce"), range(len(categories))))
        codes = np.array([numbers.get(value, -1) for value in given.tolist()])
    if (codes < 0).any():
        unknown = str(labels[codes < 0][0])
        close = difflib.get_close_matches(unknown, known, n=NUM_NAMED, cutoff=0.5)
        names = [*close, *(name for name in known if name not in close)]
        more = f" and {len(names) - NUM_NAMED} others" if len(names) > NUM_NAMED else ""
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"{reprlib.repr(unknown)} is not a {label_key} of this model, which knows"
            f" {', '.join(names[:NUM_NAMED])}{more}.{hint}"
        )
    return codes.astype(np.int64)
