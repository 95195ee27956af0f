"""The smallest training that takes every step of a large one, and what it wrote."""

import csv
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from wbdit_diffusers.training import TrainingConfig


DENOISER = {
    **{"num_genes": 100, "patch_size": 20, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8},
    **{"train_batch_size": 64, "lr_warmup_steps": 2, "num_inference_steps": 3, "mixed_precision": "no"},
}
PROGRAM_CODEC = {
    **{"codec_max_steps": 100, "codec_batch_size": 32, "num_programs": 8, "codec_hidden_size": 16},
    **{"decoder_steps": 20},
}


def tiny_config(output_dir: Path, **changes: Any) -> TrainingConfig:
    """A tiny training; without stage one if `codec="expression"`."""
    codec = {} if changes.get("codec") == "expression" else PROGRAM_CODEC
    return TrainingConfig(output_dir=output_dir, **{**DENOISER, **codec, **changes})


def weights(folder: Path, component: str = "denoiser") -> dict[str, torch.Tensor]:
    return load_file(folder / component / "diffusion_pytorch_model.safetensors")


def assert_same_weights(folder: Path, other: Path):
    """Bit for bit, of both networks."""
    for component in ("codec", "denoiser"):
        got, expected = weights(folder, component), weights(other, component)
        assert got.keys() == expected.keys()
        for name in expected:
            assert torch.equal(got[name], expected[name]), f"{component} {name}"


def read_log(folder: Path) -> list[dict[str, str]]:
    with (folder / "training_log.csv").open() as file:
        return list(csv.DictReader(file))


def column(folder: Path, name: str) -> list[float]:
    return [float(row[name]) for row in read_log(folder)]


def rows_without_time(folder: Path) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_log(folder)]


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
