"""Modules of a repository with which Diffusers, given `trust_remote_code=True`, finds the classes of our package."""

import json
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline


PACKAGE = __package__.split(".")[0]
# Diffusers looks up the classes of components before it imports the pipeline's module, and with it our package. So the
# folder of each component needs a module too.
PIPELINE_MODULE, COMPONENT_MODULE = "pipeline", "wbdit"
FILES = [f"{PIPELINE_MODULE}.py", f"*/{COMPONENT_MODULE}.py"]
IMPORT = '"""Diffusers finds our classes in the package wbdit_diffusers."""\n\nfrom wbdit_diffusers import {}\n'
# One text for all components: Diffusers keeps one module of this name for a repository.
COMPONENTS = IMPORT.format("*") + "from wbdit_diffusers.models.loading import SafetensorsModel as AutoModel\n"


def write_remote_code(pipeline: DiffusionPipeline, folder: Path):
    """Adds the modules to a saved pipeline. For a user's subclass they name its nearest base class in our package."""
    path = folder / pipeline.config_name
    index = json.loads(path.read_text())
    ours = next(one for one in type(pipeline).__mro__ if one.__module__.split(".")[0] == PACKAGE).__name__
    index["_class_name"] = [PIPELINE_MODULE, ours]
    index["auto_map"] = {"AutoModel": f"{COMPONENT_MODULE}.AutoModel"}
    (folder / f"{PIPELINE_MODULE}.py").write_text(IMPORT.format(ours))
    for name, value in index.items():
        if isinstance(value, list) and value[0] == PACKAGE:
            value[0] = COMPONENT_MODULE
            (folder / name / f"{COMPONENT_MODULE}.py").write_text(COMPONENTS)
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
    return {**index, **ours, "_class_name": index["_class_name"][-1]}
