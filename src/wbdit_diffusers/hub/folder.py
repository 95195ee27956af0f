"""A folder with a pipeline: looked at before anything is loaded, and written so that no half of one is left.

Diffusers' own errors don't say what to mend.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from .identity import check_format
from .remote_code import without_remote_code


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_REASON = 500  # characters of a foreign error
MAX_CONFIG_BYTES = 2**28  # the names of a million genes take a tenth of it


def check_folder(folder: Path, pipeline_class: type[DiffusionPipeline], parts: list[str]) -> dict[str, Any]:
    """
    Raises an `OSError`, before anything is loaded, if a folder is no pipeline of this class, or damaged.

    Args:
        folder (`Path`): The folder.
        pipeline_class (`type`): The pipeline's class.
        parts (`list[str]`): Names of the parts to be loaded from it.

    Returns:
        `dict`: its model_index.json.
    """
    name = pipeline_class.config_name
    if folder.is_file():
        raise OSError(f"{folder} is a file, not the folder of a pipeline: give the folder.")
    if not (folder / name).is_file():
        raise OSError(
            f"{folder} is no pipeline: it has no {name}. Give the --output_dir of a training, a folder written"
            " by `save_pretrained`, or a Hub id."
        )
    index = without_remote_code(read_config(folder / name))
    if index.get("_class_name") != pipeline_class.__name__:
        raise OSError(f"{folder} holds a {index.get('_class_name')}: load it with that class.")
    check_format(index, str(folder))
    for part in parts:
        if not isinstance(index.get(part), list) or len(index[part]) != 2:
            raise OSError(f"{folder / name} does not say what class {part!r} is of: copy or download it again.")
        _check_part(folder / part, is_scheduler=part == "scheduler")
    return index


def _check_part(folder: Path, is_scheduler: bool):
    config = folder / ("scheduler_config.json" if is_scheduler else "config.json")
    if not config.is_file():
        raise OSError(f"{config} is missing: copy or download the whole folder again.")
    read_config(config)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and not is_scheduler:
        pickles = [path.name for path in folder.iterdir() if path.suffix in PICKLES]
        what = f"{pickles[0]} is a pickle file, which can run any code" if pickles else "the weights are missing"
        raise OSError(f"{folder} has no .safetensors file: {what}. Give a folder written by `save_pretrained`.")
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise OSError(f"{path} is truncated or damaged ({error}): copy or download it again.") from error


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file that holds a dict. Raises an `OSError` that names it if it does not."""
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise OSError(f"{path} is too large to be a configuration: {path.stat().st_size:,} bytes.")
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise OSError(f"{path} is no JSON, cut off or damaged ({error}): copy or download it again.") from error
    if not isinstance(config, dict):
        raise OSError(f"{path} holds no configuration but a {type(config).__name__}: copy or download it again.")
    return config


def load_or_explain(load: Callable[[], Any], where: str) -> Any:
    """What `load` returns. Whatever goes wrong in it, an `OSError` of one line says so and names the model."""
    try:
        return load()
    except Exception as error:  # Diffusers raises of every kind on files that it did not write
        reason = " ".join(str(error).split())
        if len(reason) > MAX_REASON:
            reason = f"{reason[:MAX_REASON]}…"
        absent = "" if Path(where).exists() else f"There is no folder {where}, and as a Hub id "
        raise OSError(f"{absent}{where} cannot be loaded as a pipeline: {reason or type(error).__name__}") from error


def write_beside(folder: Path, last: str, write: Callable[[Path], None]):
    """
    Fills a folder so that whoever reads it, or finds it after a crash, sees the old model or the new one.

    Everything is written to a folder beside, and then renamed: as a whole if there is no such folder yet; else file by
    file, as it may hold more than the model, and the one that says what belongs together at the end. A reader who
    comes between these renames finds parts with different ids, see `check_identity`.

    Args:
        folder (`Path`): Where the files are to be.
        last (`str`): Name of the file that is renamed last.
        write (`Callable`): Writes them into the folder that it is given.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".partial", dir=folder.parent))
    try:
        beside.chmod(0o777 & ~_umask())  # mkdtemp's own is for its owner only
        write(beside)
        files = sorted((path for path in beside.rglob("*") if path.is_file()), key=lambda path: path.name == last)
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if not folder.exists():
            beside.rename(folder)
            return
        for path in files:
            target = folder / path.relative_to(beside)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
