"""One configuration from Python, YAML files and flags."""

import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from wbdit_diffusers.cli import parse
from wbdit_diffusers.training import TrainingConfig, read_config
from wbdit_diffusers.training.config import CODEC_DEFAULTS, SHIPPED_CONFIGS, command_of, config_without_places


SHIPPED = sorted(Path(str(file)).stem for file in SHIPPED_CONFIGS.iterdir())

SAME = [  # in Python, and as flags
    ({}, ""),
    ({"learning_rate": 5e-4}, "--learning_rate 5e-4"),
    ({"num_genes": 0, "seed": 7}, "--num_genes 0 --seed 7"),
    ({"dataset": Path("cells.h5ad"), "layer": "raw"}, "--dataset cells.h5ad --layer raw"),
    ({"dataset": "hf://datasets/me/cells"}, "--dataset hf://datasets/me/cells"),
    ({"label_keys": ["cell_type", "phase"]}, "--label_keys cell_type phase"),
    ({"label_keys": []}, "--label_keys"),
    ({"use_ema": False, "compile": True}, "--no-use_ema --compile"),
    ({"codec": "expression", "standardize": False}, "--codec expression --no-standardize"),
    ({"max_train_minutes": 0.5, "block_type": "dit"}, "--max_train_minutes 0.5 --block_type dit"),
]
REFUSED = [
    ("learning_rates", 1, "unknown: did you mean|Unexpected"),
    ("learning_rate", math.nan, "finite number"),
    ("num_layers", 1.5, "valid integer"),
    ("num_genes", -1, "greater than or equal to 0"),
    ("codec", "vae", "'program' or 'expression'"),
]


def write_yaml(path: Path, values: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump({key: str(v) if isinstance(v, Path) else v for key, v in values.items()}))
    return str(path)


def from_flags(*flags: str) -> TrainingConfig:
    return parse("train", ["--output_dir", "out", *flags])[0]


@pytest.mark.parametrize("values, flags", SAME)
def test_python_yaml_and_flags_make_the_same_config(values, flags, tmp_path):
    expected = TrainingConfig(output_dir="out", **values)
    assert from_flags(*flags.split()) == expected
    assert from_flags("--config", write_yaml(tmp_path / "config.yaml", values)) == expected
    assert all(getattr(expected, name) == value for name, value in values.items())
    assert TrainingConfig(output_dir="out", label_keys="cell_type").label_keys == ["cell_type"]


@pytest.mark.parametrize("name, value, message", REFUSED)
def test_wrong_values_are_refused_with_the_name_of_the_flag(name, value, message, tmp_path):
    with pytest.raises(ValueError, match=rf"(?s){name}.*({message})"):
        TrainingConfig(output_dir="out", **{name: value})
    with pytest.raises(ValueError, match=f"--{name}.*({message})"):
        from_flags(f"--{name}", str(value))
    with pytest.raises(ValueError, match=f"{name}.*({message})"):
        from_flags("--config", write_yaml(tmp_path / "config.yaml", {name: value}))


def test_a_later_config_wins_and_flags_win_over_all(tmp_path):
    first = write_yaml(tmp_path / "first.yaml", {"seed": 1, "num_layers": 1, "learning_rate": 0.1})
    second = write_yaml(tmp_path / "second.yaml", {"seed": 2, "num_layers": 2})
    config = from_flags("--seed", "3", "--config", first, second)
    assert (config.learning_rate, config.num_layers, config.seed) == (0.1, 2, 3)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_load_by_name_and_by_path(name):
    values = read_config(name)
    assert values and values == read_config(SHIPPED_CONFIGS / f"{name}.yaml")
    assert from_flags("--config", name) == TrainingConfig(output_dir="out", **values)


def test_the_setting_of_the_paper(tmp_path):
    first = write_yaml(tmp_path / "first.yaml", {"dataset": "pbmc3k.h5ad", "label_keys": ["cell_type"]})
    config = from_flags("--config", first, "paper", "--values", "counts")
    assert config.dataset == Path("pbmc3k.h5ad")  # from the first file
    assert config.label_keys == [] and config.codec == "expression"  # from the second file
    assert config.values == "counts"  # from the command line
    shape = {"patch_size": 10, "num_layers": 3, "num_attention_heads": 8, "attention_head_dim": 96}
    assert {name: getattr(config, name) for name in shape} == shape
    assert (config.learning_rate, config.train_batch_size, config.num_inference_steps) == (1e-4, 16, 1000)
    assert config.prediction_type == "epsilon" and not config.use_ema


@pytest.mark.parametrize("text, message", [("- seed\n", "dictionary"), ("seed: [3\n", "while parsing")])
def test_a_config_file_without_flags(text, message, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"does not hold lines such as 'seed: 1': {message}"):
        read_config(tmp_path / "config.yaml")


def test_absent_and_empty_config_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"--config papers: no such file.*{', '.join(SHIPPED)}"):
        read_config("papers")
    (tmp_path / "config.yaml").write_text("# nothing\n")
    assert from_flags("--config", str(tmp_path / "config.yaml")) == TrainingConfig(output_dir="out")


@pytest.mark.parametrize("codec", ["program", "expression"])
def test_defaults_follow_the_codec(codec):
    config = TrainingConfig(output_dir="out", codec=codec)
    assert all(getattr(config, name) == defaults[codec] for name, defaults in CODEC_DEFAULTS.items())
    assert TrainingConfig(output_dir="out", codec=codec, num_layers=7).num_layers == 7


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--label_keys", "cell_type", "my phase", "--max_train_steps", "7", "--no-use_ema"],
        ["--codec", "expression", "--patch_size", "5", "--no-standardize", "--data_name", "PBMC's"],
    ],
)
def test_the_command_of_a_config_gives_the_config_again(flags):
    config = from_flags("--dataset", "/somewhere/cells.h5ad", "--output_dir", "/elsewhere/out", *flags)
    words = shlex.split(command_of(config))
    assert words[:6] == ["wbdit", "train", "--dataset", "cells.h5ad", "--output_dir", "out"]
    assert config_without_places(parse("train", words[2:])[0]) == config_without_places(config)
    assert len(words) == 6 + len(flags)
