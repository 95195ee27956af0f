"""Files that strangers upload: looked at before they are read."""

from pathlib import Path

import anndata as ad
import h5py

from ..data.read import read_cells


MAX_MEGABYTES = 100
MAX_UNPACKED_BYTES = 2 * 2**30  # a compressed file may hold a thousand times its size
SIGNATURE = b"\x89HDF\r\n\x1a\n"


def read_upload(path: str | Path) -> ad.AnnData:
    """
    Reads an uploaded .h5ad file, or an .h5 file of 10x Genomics. Nothing in it is run or unpickled, and nothing
    outside it is read.

    Raises:
        ValueError: If it is too large, is no such file, or points to other files. Without the folder it lies in.
    """
    path = Path(path)
    try:
        _check_file(path)
        _check_contents(path)
        cells = read_cells(path)
    except (ValueError, OSError) as error:
        raise ValueError(str(error).replace(str(path), path.name)) from error
    if cells.n_obs == 0 or cells.n_vars == 0:
        raise ValueError(f"{path.name} is empty: {cells.n_obs} cells × {cells.n_vars} genes.")
    if not cells.obs_names.is_unique:
        cells.obs_names_make_unique()
    return cells


def label_columns(cells: ad.AnnData) -> list[str]:
    """Columns of `obs` that can be types: 2 to 100 names, none missing; those that are called so first."""
    columns = []
    for key, column in cells.obs.items():
        is_text = column.dtype == "category" or column.dtype == object or column.dtype == "string"
        if is_text and not column.isna().any() and 2 <= column.nunique() <= min(100, cells.n_obs // 2):
            columns.append(str(key))
    return sorted(columns, key=lambda key: not any(word in key.lower() for word in ("type", "label", "annot")))


def _check_file(path: Path):
    if path.stat().st_size > MAX_MEGABYTES * 2**20:
        megabytes = path.stat().st_size / 2**20
        raise ValueError(
            f"{path} has {megabytes:.0f} MB, and this page takes {MAX_MEGABYTES}: upload fewer cells, or work with"
            " `wbdit` on the command line."
        )
    with path.open("rb") as file:
        if file.read(len(SIGNATURE)) != SIGNATURE:
            raise ValueError(f"{path} is no .h5ad file: write one with AnnData's `write_h5ad`.")


def _check_contents(path: Path):
    """HDF5 can point to other files of this machine, and unpack to more than it holds."""
    unpacked = 0

    # What these return, but for None, ends the visit.
    def outside_link(name: str, link) -> str | None:
        return name if isinstance(link, h5py.ExternalLink) else None

    def outside_values(name: str, item) -> str | None:
        nonlocal unpacked
        if not isinstance(item, h5py.Dataset):
            return None
        unpacked += item.size * item.dtype.itemsize if item.size else 0
        return name if item.external or item.is_virtual else None

    try:
        with h5py.File(path) as file:
            outside = file.visititems_links(outside_link) or file.visititems(outside_values)
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: upload it again.") from error
    if outside is not None:
        raise ValueError(f"{path} keeps {outside} in another file: write it anew with AnnData's `write_h5ad`.")
    if unpacked > MAX_UNPACKED_BYTES:
        raise ValueError(f"{path} holds {unpacked / 2**30:.1f} GB once unpacked: upload fewer cells.")
