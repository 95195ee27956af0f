"""Uploaded files, which are checked before they are read: on a Space they come from strangers."""

from pathlib import Path

import anndata as ad
import h5py

from ..data.read import read_cells
from ..files import one_line


MAX_UNPACKED_BYTES = 2 * 2**30  # a compressed file may hold a thousand times its size


def read_upload(path: str | Path) -> ad.AnnData:
    """
    Reads an uploaded .h5ad file, or an .h5 file of 10x Genomics. Raises a `ValueError` if it can't be read, is too
    large once unpacked, or refers to other files of this machine. The message does not name the folder of the file.
    """
    path = Path(path)
    try:
        with h5py.File(path) as file:
            _check_contents(file)
        return read_cells(path)
    except (ValueError, OSError, RuntimeError, KeyError) as error:  # h5py raises all of them on damaged files
        reason = one_line(error).replace(f"{path.parent}/", "")
        raise ValueError(reason if path.name in reason else f"{path.name} can't be read: {reason}") from error


def label_columns(cells: ad.AnnData) -> list[str]:
    """Columns of `obs` that may be cell types: 2 to 100 names, none missing. Likely names come first."""
    columns = []
    for key, column in cells.obs.select_dtypes(["category", "object", "string"]).items():
        if not column.isna().any() and 2 <= column.nunique() <= min(100, cells.n_obs // 2):
            columns.append(str(key))
    return sorted(columns, key=lambda key: not any(word in key.lower() for word in ("type", "label", "annot")))


def _check_contents(file: h5py.File):
    """Raises a `ValueError` if the file refers to other files, or unpacks to more than the limit."""
    unpacked = 0

    # A value other than None ends the visit.
    def outside_link(name: str, link) -> str | None:
        return name if isinstance(link, h5py.ExternalLink) else None

    def outside_values(name: str, item) -> str | None:
        nonlocal unpacked
        if not isinstance(item, h5py.Dataset):
            return None
        unpacked += item.size * item.dtype.itemsize if item.size else 0
        return name if item.external or item.is_virtual else None

    outside = file.visititems_links(outside_link) or file.visititems(outside_values)
    if outside is not None:
        raise ValueError(f"{outside} is stored in another file. Write the cells again with AnnData's `write_h5ad`.")
    if unpacked > MAX_UNPACKED_BYTES:
        raise ValueError(f"it holds {unpacked / 2**30:.1f} GB once unpacked. Upload fewer cells.")
