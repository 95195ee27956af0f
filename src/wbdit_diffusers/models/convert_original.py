"""Checkpoints of the authors' code (arXiv 2411.06785) to the names of this package."""

from pathlib import Path

import torch


def convert_original_checkpoint(path: str | Path, num_attention_heads: int) -> tuple[dict, dict[str, torch.Tensor]]:
    """
    Reads a file of the authors' code.

    Args:
        path (`str` or `Path`): A `state_dict` saved by `torch.save`; read with `weights_only=True`.
        num_attention_heads (`int`): Cannot be read off the file.

    Returns:
        `tuple`: arguments of [`WhiteBoxDiTModel`], and its `state_dict` in float32.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If the file is no tensor checkpoint, or not one of the authors' two networks.
    """
    try:
        original = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors (torch.load with weights_only=True refused it). If you"
            " trust its origin, load it yourself and save its state_dict alone with"
            " `torch.save(model.state_dict(), path)`."
        ) from error
    if not isinstance(original, dict) or not all(torch.is_tensor(value) for value in original.values()):
        raise ValueError(f"{path} does not hold a state_dict (a flat dict of tensors): save `model.state_dict()`.")

    block_type = "dit" if "blocks.0.mlp.fc1.weight" in original else "white_box"
    try:
        dim, _, patch_size, _ = original["x_embedder.proj.weight"].shape
        num_patches = original["pos_embed"].shape[1]
        num_layers = 1 + max(int(key.split(".")[1]) for key in original if key.startswith("blocks."))
        converted = _rename_keys(original, block_type, num_layers)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is not a White-Box DiT or DiT checkpoint of the authors' code: {error} is missing or has another"
            f" form. Its first keys are {list(original)[:3]}."
        ) from error
    config = {
        "sample_size": num_patches * patch_size,
        "patch_size": patch_size,
        "num_layers": num_layers,
        "num_attention_heads": num_attention_heads,
        "attention_head_dim": dim // num_attention_heads,
        "block_type": block_type,
    }
    return config, {key: value.float() for key, value in converted.items()}


def _rename_keys(original: dict[str, torch.Tensor], block_type: str, num_layers: int) -> dict[str, torch.Tensor]:
    """The authors' keys to ours. Every key must be used: a leftover means a network that we do not have."""
    original = dict(original)
    converted = {
        "proj_in.weight": original.pop("x_embedder.proj.weight").flatten(1),  # (hidden, 1, patch, 1) convolution
        "pos_embed": original.pop("pos_embed"),
    }
    names = {
        "proj_in.bias": "x_embedder.proj.bias",
        "time_embedder.linear_1": "t_embedder.mlp.0",
        "time_embedder.linear_2": "t_embedder.mlp.2",
        "modulation_out": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    }
    for i in range(num_layers):
        names[f"blocks.{i}.modulation"] = f"blocks.{i}.adaLN_modulation.1"
        if block_type == "white_box":
            names[f"blocks.{i}.attn.to_w.weight"] = f"blocks.{i}.attn.qkv.weight"
            names[f"blocks.{i}.attn.to_out"] = f"blocks.{i}.attn.to_out.0"
            names[f"blocks.{i}.ff.dictionary"] = f"blocks.{i}.mlp.weight"
        else:
            names[f"blocks.{i}.attn.qkv"] = f"blocks.{i}.attn.qkv"
            names[f"blocks.{i}.attn.to_out"] = f"blocks.{i}.attn.proj"
            names[f"blocks.{i}.ff.fc1"] = f"blocks.{i}.mlp.fc1"
            names[f"blocks.{i}.ff.fc2"] = f"blocks.{i}.mlp.fc2"
    for ours, theirs in names.items():
        if theirs in original:
            converted[ours] = original.pop(theirs)
        else:
            converted[f"{ours}.weight"] = original.pop(f"{theirs}.weight")
            converted[f"{ours}.bias"] = original.pop(f"{theirs}.bias")
    if original:
        raise ValueError(f"unknown key {next(iter(original))!r}")
    return converted
