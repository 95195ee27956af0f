"""Uploaded files, which are checked before they are read: on a Space they come from strangers."""

from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
from scipy import sparse

from ..data.read import read_cells
from ..files import one_line


MAX_UNPACKED_BYTES = 2 * 2**30  # a compressed file may hold a thousand times its size
STRING_BYTES = 100  # of a string in Python, without its characters
READ_BYTES = 2**28  # of strings at once


def read_upload(path: str | Path) -> ad.AnnData:
    """The cells of an .h5ad file or a 10x .h5 file. Raises a `ValueError` that does not name the file's folder."""
    path = Path(path)
    try:
        with h5py.File(path, rdcc_nbytes=MAX_UNPACKED_BYTES) as file:  # no chunk is unpacked twice
            _check_contents(file)
        cells = read_cells(path)
        for matrix in (cells.X, *cells.layers.values()):
            if sparse.issparse(matrix):
                matrix.check_format()  # slicing a damaged matrix can end the process
        return cells
    except (ValueError, OSError, RuntimeError, KeyError) as error:  # h5py raises all of them on damaged files
        reason = one_line(error).replace(f"{path.parent}/", "")
        raise ValueError(reason if path.name in reason else f"{path.name} can't be read: {reason}") from error


def label_columns(cells: ad.AnnData) -> list[str]:
    """Columns of `obs` that may be cell types: 2 to 100 names, none missing. Likely names come first."""
    obs = cells.obs.select_dtypes(["category", "object", "string"]).dropna(axis="columns")
    columns = [str(key) for key in obs if 2 <= obs[key].nunique() <= min(100, cells.n_obs // 2)]
    return sorted(columns, key=lambda key: not any(word in key.lower() for word in ("type", "label", "annot")))


def _check_contents(file: h5py.File):
    """Raises a `ValueError` if the file has links or odd values, or unpacks to more than the limit."""
    links: dict[str, Any] = {}
    items: dict[str, Any] = {}
    file.visititems_links(links.__setitem__)
    file.visititems(items.__setitem__)  # each item under one of its names
    arrays = {name: item for name, item in items.items() if isinstance(item, h5py.Dataset)}
    linked = [name for name, link in links.items() if name not in items or not isinstance(link, h5py.HardLink)]
    linked += [name for name, array in arrays.items() if array.external or array.is_virtual]
    if linked:
        raise ValueError(f"{linked[0]} is a link. Write the cells again with AnnData's `write_h5ad`.")
    sizes, texts = [], []
    for name, array in arrays.items():
        fields = {key: array.dtype[key] for key in array.dtype.names or ()} or {None: array.dtype}
        for key, dtype in fields.items():
            is_text = h5py.check_string_dtype(dtype) is not None
            if dtype.hasobject and (not is_text or array.ndim > 1):
                raise ValueError(f"{name} holds neither numbers nor a list of names. Remove it.")
            if dtype.hasobject and array.size:
                texts.append((array, array if key is None else array.fields(key)))
            sizes.append((array.size or 0) * (dtype.itemsize + STRING_BYTES * is_text))
    # Many strings of a file may be one. A string is at most as long as the file.
    step = max(1, READ_BYTES // file.id.get_filesize())
    parts = ((text, array.ndim, start) for array, text in texts for start in range(0, array.size, step))
    lengths = (sum(map(len, text[start : start + step] if ndim else [text[()]])) for text, ndim, start in parts)
    if any(unpacked > MAX_UNPACKED_BYTES for unpacked in accumulate(chain([sum(sizes)], lengths))):
        raise ValueError(f"it holds more than {MAX_UNPACKED_BYTES / 2**30:.0f} GB once unpacked. Upload fewer cells.")
