"""Modules with which `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` finds our package."""

import json
import shutil
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline


PACKAGE = __package__.split(".")[0]
REMOTE = Path(__file__).parent / "remote"
# Diffusers looks up the classes of components before it imports the pipeline's module, and with it our package. So the
# folder of each component needs a module too.
PIPELINE_MODULE, COMPONENT_MODULE = "pipeline", "wbdit"
FILES = [f"{PIPELINE_MODULE}.py", f"*/{COMPONENT_MODULE}.py"]


def write_remote_code(pipeline: DiffusionPipeline, folder: Path):
    """Adds the modules to the folder of a saved pipeline, and names them in its model_index.json."""
    path = folder / pipeline.config_name
    index = json.loads(path.read_text())
    index["_class_name"] = [PIPELINE_MODULE, type(pipeline).__name__]
    shutil.copyfile(REMOTE / f"{PIPELINE_MODULE}.py", folder / f"{PIPELINE_MODULE}.py")
    for name, value in index.items():
        if isinstance(value, list) and value[0] == PACKAGE:
            value[0] = COMPONENT_MODULE
            shutil.copyfile(REMOTE / f"{COMPONENT_MODULE}.py", folder / name / f"{COMPONENT_MODULE}.py")
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def without_remote_code(index: dict[str, Any]) -> dict[str, Any]:
    """A model_index.json that names the classes of our package, whether or not it names remote modules."""
    if not isinstance(index.get("_class_name"), list):
        return index
    ours = {
        name: [PACKAGE, value[1]]
        for name, value in index.items()
        if isinstance(value, list) and value[0] == COMPONENT_MODULE
    }
    return index | ours | {"_class_name": index["_class_name"][-1]}
