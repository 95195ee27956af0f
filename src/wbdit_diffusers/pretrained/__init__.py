"""Pipelines that come with the package, so that cells can be made without training and without network."""

import difflib
import re
from pathlib import Path


FOLDER = Path(__file__).parent
# 700 PBMCs that come with Scanpy; made by benchmarks/make_pretrained.py
PBMC = "pbmc68k_reduced"


def locate(name_or_path: str | Path) -> str:
    """Returns an existing path or a Hub id as it is, and the folder of a pipeline that comes with the package."""
    name = str(name_or_path)
    if Path(name).exists():
        return name
    if name == PBMC:
        return str(FOLDER / name)
    parent = Path(name).parent
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not parent.is_dir():
        return name
    siblings = [path.name for path in parent.iterdir()] if parent.is_dir() else []
    known = [str(parent / one) for one in siblings] + [PBMC]
    close = difflib.get_close_matches(str(Path(name)), known, n=3)
    hint = f"Did you mean {' or '.join(close)}?" if close else "A Hub id has the form user/name."
    raise FileNotFoundError(f"There is no folder or file {name}. {hint}")
