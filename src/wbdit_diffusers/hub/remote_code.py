"""What a repository needs to be loaded by Diffusers where our package is installed but not imported."""

import json
import shutil
from pathlib import Path
from typing import Any

from diffusers import __version__ as diffusers_version
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..version import __version__


REMOTE = Path(__file__).parent / "remote"
PACKAGE = __package__.split(".")[0]
PIPELINE_MODULE, BLOCK_MODULE, BLOCKS = "pipeline", "block", "ScRNABlocks"
# Diffusers looks for the classes of components before it imports the pipeline's module, and so our package: it must
# find a module of this name in each component's folder.
COMPONENT_MODULE = "wbdit"
REQUIREMENTS = {PACKAGE: f">={__version__}"}
FILES = [f"{PIPELINE_MODULE}.py", f"{BLOCK_MODULE}.py", f"*/{COMPONENT_MODULE}.py"]
FILES += ["modular_config.json", "modular_model_index.json"]


def write_remote_code(pipeline: DiffusionPipeline, folder: Path, repo_id: str):
    """
    Makes a folder with a saved pipeline one that `DiffusionPipeline.from_pretrained` and
    `ModularPipeline.from_pretrained` load with `trust_remote_code=True`.

    Args:
        pipeline ([`ScRNAGenerationPipeline`]): As it was saved to the folder.
        folder (`Path`): Where its model_index.json is.
        repo_id (`str`): The repository from which the blocks load their components.
    """
    for module in (PIPELINE_MODULE, BLOCK_MODULE):
        shutil.copyfile(REMOTE / f"{module}.py", folder / f"{module}.py")
    index_path = folder / pipeline.config_name
    index = json.loads(index_path.read_text())

    blocks = {"auto_map": {"ModularPipelineBlocks": f"{BLOCK_MODULE}.{BLOCKS}"}, "requirements": REQUIREMENTS}
    _write(folder / "modular_config.json", _header(BLOCKS) | blocks)
    components = {}
    for name in pipeline.components:
        where = {"pretrained_model_name_or_path": repo_id, "subfolder": name, "variant": None, "revision": None}
        components[name] = [None, None, {"type_hint": index[name], **where}]
    settings = {"_blocks_class_name": BLOCKS, "num_inference_steps": index["num_inference_steps"]}
    _write(folder / "modular_model_index.json", _header("ModularPipeline") | settings | components)

    index["_class_name"] = [PIPELINE_MODULE, type(pipeline).__name__]
    for name in pipeline.components:
        if index[name][0] == PACKAGE:
            index[name][0] = COMPONENT_MODULE
            shutil.copyfile(REMOTE / f"{COMPONENT_MODULE}.py", folder / name / f"{COMPONENT_MODULE}.py")
    _write(index_path, index)


def without_remote_code(index: Any) -> Any:
    """A model_index.json in which the classes are those of our package, whether or not it names remote modules."""
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), list) or not index["_class_name"]:
        return index
    ours = {
        name: [PACKAGE, value[1]]
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value[0] == COMPONENT_MODULE
    }
    return index | ours | {"_class_name": index["_class_name"][-1]}


def _header(class_name: str) -> dict[str, str]:
    return {"_class_name": class_name, "_diffusers_version": diffusers_version}


def _write(path: Path, config: dict[str, Any]):
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
