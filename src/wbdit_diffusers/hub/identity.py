"""What makes the parts of a pipeline one model: an id, computed of all of them and written into each."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline


FORMAT_VERSION = 1  # of the folder that a pipeline is saved to
MODEL_ID, FORMAT = "_model_id", "_format_version"  # Diffusers keeps such keys of a config, and passes them to nobody
NETWORKS = ("denoiser", "codec")


def model_id(components: Mapping[str, Any]) -> str:
    """
    A hash of all weights and tables, of names and of sizes: the same for the same model, wherever it was trained, and
    another one if a single bit differs. Numbers are taken as float32, in which half precision is exact.
    """
    digest = hashlib.sha256()
    for name in NETWORKS:
        tensors = components[name].state_dict()
        digest.update(name.encode())
        for key in sorted(tensors):
            _update(digest, key, tensors[key])
    processor = components["processor"]
    for key, tensor in sorted(processor.statistics().items()):
        _update(digest, key, tensor)
    config = {key: value for key, value in processor.config.items() if not key.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True).encode())
    return digest.hexdigest()


def _update(digest, key: str, tensor: torch.Tensor):
    values = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
    digest.update(f"{key} {tuple(values.shape)}".encode())
    digest.update(values.cpu().contiguous().numpy().tobytes())


def mark(pipeline: DiffusionPipeline):
    """Writes the model's id into the configuration of every part, and the format version into the pipeline's."""
    identity = model_id(pipeline.components)
    for part in (pipeline, *pipeline.components.values()):
        part.register_to_config(**{MODEL_ID: identity})
    pipeline.register_to_config(**{FORMAT: FORMAT_VERSION})


def check_identity(
    pipeline: DiffusionPipeline, index: Mapping[str, Any], where: str, given: set[str], check_weights: bool
):
    """
    Raises an `OSError` unless what was loaded is one model.

    Args:
        pipeline ([`ScRNAGenerationPipeline`]): As it was loaded.
        index (`dict`): Its model_index.json, of which Diffusers keeps no such keys.
        where (`str`): From where, for the message.
        given (`set[str]`): Parts that the caller passed instead of loading them: these may be of another model.
        check_weights (`bool`): Whether weights were loaded as they were saved, so that their hash must be the id.
    """
    identity = index[MODEL_ID]  # `check_format` has seen to it that there is one
    loaded = {name: part for name, part in pipeline.components.items() if part is not None and name not in given}
    other = [name for name, part in loaded.items() if part.config.get(MODEL_ID, identity) != identity]
    if other:
        raise OSError(
            f"The parts of {where} are not of one model: {', '.join(other)} was saved with another one. Copy or"
            " download the whole folder again, when nothing writes to it."
        )
    if check_weights and len(loaded) == len(pipeline.components) and model_id(loaded) != identity:
        raise OSError(
            f"{where} is damaged, or its parts are not of one model: the weights are not those that were saved. Copy"
            " or download the whole folder again."
        )


def check_format(index: Mapping[str, Any], where: str):
    """Raises an `OSError` on a format that this version can't read."""
    version = index.get(FORMAT)
    if version is None:
        raise OSError(
            f"{where} has no format version: it was written before wbdit_diffusers 0.2, whose cells this one would not"
            " make. Train it again, or load it with the version that wrote it."
        )
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise OSError(
            f"{where} was written by a newer wbdit_diffusers (format {version}; this one reads {FORMAT_VERSION}):"
            " upgrade the package."
        )
    if not isinstance(version, int) or version < 1:
        raise OSError(f"{where} has no format version that this wbdit_diffusers knows: {version!r}.")
    if not isinstance(index.get(MODEL_ID), str):
        raise OSError(f"The model_index.json of {where} is damaged, it names no id: copy or download it again.")
