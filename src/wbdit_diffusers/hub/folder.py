"""A folder from which a pipeline is to be loaded, looked at first: Diffusers' own errors don't say what to mend."""

import json
from pathlib import Path

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from safetensors import SafetensorError, safe_open


def check_folder(folder: Path, pipeline_class: type[DiffusionPipeline]):
    """Raises, before anything is loaded, if the folder is no such pipeline or a weight file is cut off."""
    index = folder / pipeline_class.config_name
    if not index.is_file():
        raise OSError(
            f"{folder} is no pipeline: it has no {index.name}. Give the --output_dir of a training, a folder written"
            " by `save_pretrained`, or a Hub id."
        )
    class_name = json.loads(index.read_text()).get("_class_name")
    if class_name != pipeline_class.__name__:
        raise OSError(f"{folder} holds a {class_name}: load it with that class.")
    for path in sorted(folder.glob("*/*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise OSError(f"{path} is truncated or damaged ({error}): copy or download it again.") from error
