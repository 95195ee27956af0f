"""Columns of `obs` as columns of parquet: labels as numbers with names, as `datasets` has them."""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd


MAX_LABELS = 10_000  # more different strings than these, or than half of the cells, are names and no labels


@dataclass
class Column:
    """
    A column that all files have.

    Args:
        kind (`str`): `"label"`, `"string"`, `"int64"`, `"float64"` or `"bool"`.
        names (`list[str]`): Of a label column.
    """

    kind: str
    names: list[str] = field(default_factory=list)

    def to_arrow(self, values: pd.Series):
        """Values of some cells, missing ones as null."""
        import pyarrow as pa

        if self.kind == "label":
            codes = pd.Index(self.names).get_indexer(_as_strings(values))
            return pa.array(codes, pa.int64(), mask=np.asarray(values.isna()))
        if self.kind == "string":
            return pa.array(_as_strings(values), pa.string(), mask=np.asarray(values.isna()))
        return pa.Array.from_pandas(values, type={"bool": pa.bool_()}.get(self.kind) or getattr(pa, self.kind)())

    def feature(self):
        """What `datasets` calls it."""
        from datasets import ClassLabel, Value

        return ClassLabel(names=self.names) if self.kind == "label" else Value(self.kind)


def merge_columns(columns: dict[str, Column] | None, obs: pd.DataFrame, label_keys: list[str]) -> dict[str, Column]:
    """
    The columns that one more file has in common with those before.

    Args:
        columns (`dict[str, Column]`, *optional*): Those of the files before; `None` for the first.
        obs (`pd.DataFrame`): Of the file.
        label_keys (`list[str]`): Columns that are labels whatever they hold.
    """
    merged = {}
    for key in obs if columns is None else [key for key in columns if key in obs]:
        found = _column(obs[key], is_label=key in label_keys)
        before = found if columns is None else columns[key]
        kinds = {found.kind, before.kind}
        if "label" in kinds and kinds <= {"label", "bool", "int64", "float64"}:
            found = _column(obs[key], is_label=True)  # of numbers in another file
            merged[key] = Column("label", list(dict.fromkeys([*before.names, *found.names])))
        elif len(kinds) == 1:
            merged[key] = found
        else:
            merged[key] = Column("float64" if kinds == {"int64", "float64"} else "string")
    return merged


def _column(values: pd.Series, is_label: bool) -> Column:
    dtype = values.dtype
    if not is_label and pd.api.types.is_bool_dtype(dtype) and not isinstance(dtype, pd.CategoricalDtype):
        return Column("bool")
    if not is_label and pd.api.types.is_numeric_dtype(dtype):
        return Column("float64" if pd.api.types.is_float_dtype(dtype) else "int64")
    if isinstance(dtype, pd.CategoricalDtype):
        names = values.cat.remove_unused_categories().cat.categories.astype(str).tolist()
    else:
        names = sorted(set(_as_strings(values[values.notna()])))
    if not is_label and len(names) > min(MAX_LABELS, max(len(values) // 2, 2)):
        return Column("string")
    return Column("label", names)


def _as_strings(values: pd.Series) -> np.ndarray:
    if isinstance(values.dtype, pd.CategoricalDtype):
        names = np.append(values.cat.categories.astype(str).to_numpy(dtype=object), "")
        return names[values.cat.codes.to_numpy()]
    return values.astype(str).to_numpy(dtype=object)
