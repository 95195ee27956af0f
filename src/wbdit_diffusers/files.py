"""Writes files whole or not at all, and puts errors in one line."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


MAX_ERROR_LENGTH = 500  # characters of another library's error


def write_whole(path: Path, write: Callable[..., Any]):
    """
    Lets `write` write a file or folder under a temporary name, and renames it once it is complete. A file that exists
    is replaced, a folder is not. Raises an `OSError` if `path` can't be written. What was there stays.
    """
    partial = partial_path(path)
    remove(partial)  # of a run that was killed
    try:
        write(partial)
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):  # zarr's threads may still write there
            remove(partial)
        if type(error).__name__ == "SafetensorError" or type(error) is RuntimeError:  # a full disk
            raise OSError(f"{path} could not be written: {one_line(error)}") from error
        raise


def partial_path(path: Path) -> Path:
    """The temporary name of a file or folder that is not complete yet."""
    return path.with_name(f".{path.name}.partial")


def remove(path: Path):
    """Removes a file or folder that this run made, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def one_line(error: BaseException) -> str:
    """The message of an error, which may have many lines or none, in one."""
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_ERROR_LENGTH else f"{text[:MAX_ERROR_LENGTH]}…"
