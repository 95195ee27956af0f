"""What a repository needs to be loaded by Diffusers where our package is installed but not imported."""

import json
from pathlib import Path
from typing import Any

from diffusers import __version__ as diffusers_version
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..version import __version__


REMOTE = Path(__file__).parent / "remote"
PIPELINE_MODULE, BLOCK_MODULE, BLOCKS = "pipeline", "block", "ScRNABlocks"
REQUIREMENTS = {"wbdit_diffusers": f">={__version__}"}
FILES = [f"{PIPELINE_MODULE}.py", f"{BLOCK_MODULE}.py", "modular_config.json", "modular_model_index.json"]


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
        (folder / f"{module}.py").write_text((REMOTE / f"{module}.py").read_text())
    index_path = folder / pipeline.config_name
    index = json.loads(index_path.read_text())
    _write(index_path, index | {"_class_name": [PIPELINE_MODULE, type(pipeline).__name__]})

    blocks = {"auto_map": {"ModularPipelineBlocks": f"{BLOCK_MODULE}.{BLOCKS}"}, "requirements": REQUIREMENTS}
    _write(folder / "modular_config.json", _header(BLOCKS) | blocks)
    components = {}
    for name in pipeline.components:
        where = {"pretrained_model_name_or_path": repo_id, "subfolder": name, "variant": None, "revision": None}
        components[name] = [None, None, {"type_hint": index[name], **where}]
    settings = {"_blocks_class_name": BLOCKS, "num_inference_steps": index["num_inference_steps"]}
    _write(folder / "modular_model_index.json", _header("ModularPipeline") | settings | components)


def class_name_of(index: dict[str, Any]) -> str | None:
    """The pipeline's class in a model_index.json, whether or not that names a module of the repository with it."""
    name: Any = index.get("_class_name")
    return name[-1] if isinstance(name, list) and name else name


def _header(class_name: str) -> dict[str, str]:
    return {"_class_name": class_name, "_diffusers_version": diffusers_version}


def _write(path: Path, config: dict[str, Any]):
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
