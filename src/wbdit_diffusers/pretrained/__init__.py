"""Pipelines that come with the package, so that cells can be made without training and without network."""

from pathlib import Path


FOLDER = Path(__file__).parent
# 700 PBMCs that come with Scanpy; made by training/make_pretrained.py
PBMC = "pbmc68k_reduced"


def locate(name_or_path: str | Path) -> str:
    """The folder of a pipeline that comes with the package; any other name, and a folder of that name, as it is."""
    name = str(name_or_path)
    return str(FOLDER / name) if name == PBMC and not Path(name).exists() else name
