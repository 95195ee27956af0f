"""Checksums of published files for which we know none: noted when a file comes, and held to ever after."""

import hashlib
import json
from pathlib import Path

from diffusers.utils import logging


logger = logging.get_logger(__name__)

RECORD = "sha256.json"


def check_recorded(folder: Path, name: str, address: str):
    """
    Compares a file with the SHA-256 that was noted when it first came. The first time, notes it and says that nobody
    has compared it with anything.

    Raises:
        ValueError: If the file is another one than it was.
    """
    with (folder / name).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    path = folder / RECORD
    recorded = json.loads(path.read_text()) if path.is_file() else {}
    if name not in recorded:
        logger.warning(
            f"We know no checksum of {name}, and {address} may change what it serves: its SHA-256 is {sha256}, noted"
            f" in {path}. Compare it with a copy that you trust."
        )
        path.write_text(json.dumps(recorded | {name: sha256}, indent=1))
    elif recorded[name] != sha256:
        raise ValueError(
            f"{folder / name} is not the file that came first: its SHA-256 is {sha256}, not {recorded[name]} as noted"
            f" in {path}. Remove both if you trust the new one."
        )
