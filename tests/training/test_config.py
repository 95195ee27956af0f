"""One configuration from Python, YAML files and flags."""

import dataclasses
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from wbdit_diffusers.training import TrainingConfig, config_from_args
from wbdit_diffusers.training.config import (
    CODEC_DEFAULTS,
    SHIPPED_CONFIGS,
    build_parser,
    command_of,
    config_without_places,
)


SHIPPED = sorted(Path(str(file)).stem for file in SHIPPED_CONFIGS.iterdir())
FIELDS = {field.name: field for field in dataclasses.fields(TrainingConfig)}

# What is asked for, as Python says it and as a command line does.
SAME = [
    ({}, []),
    ({"learning_rate": 5e-4}, ["--learning_rate", "5e-4"]),
    ({"num_genes": 0, "seed": 7}, ["--num_genes", "0", "--seed", "7"]),
    ({"dataset": Path("cells.h5ad"), "layer": "raw"}, ["--dataset", "cells.h5ad", "--layer", "raw"]),
    ({"label_keys": ["cell_type"]}, ["--label_keys", "cell_type"]),
    ({"label_keys": ["cell_type", "phase"]}, ["--label_keys", "cell_type", "phase"]),
    ({"label_keys": []}, ["--label_keys"]),
    ({"use_ema": False, "compile": True}, ["--no-use_ema", "--compile"]),
    ({"push_to_hub": True, "hub_model_id": "me/cells"}, ["--push_to_hub", "--hub_model_id", "me/cells"]),
    ({"codec": "expression", "standardize": False}, ["--codec", "expression", "--no-standardize"]),
    ({"codec": "expression", "model_library_size": False}, ["--codec", "expression", "--no-model_library_size"]),
    ({"max_programs": 24, "min_program_gain": 0.02}, ["--max_programs", "24", "--min_program_gain", "0.02"]),
    ({"max_train_minutes": 0.5, "block_type": "dit"}, ["--max_train_minutes", "0.5", "--block_type", "dit"]),
    ({"mixed_precision": "bf16"}, ["--mixed_precision", "bf16"]),
    ({"resume_from_checkpoint": "latest"}, ["--resume_from_checkpoint", "latest"]),
]

# A wrong value, and what the one line about it must say besides the flag's name.
REFUSED = [
    ("learning_rates", 1, "no flag of the training"),
    ("learning_rate", "fast", "valid number"),
    ("learning_rate", 0, "greater than 0"),
    ("learning_rate", -1e-3, "greater than 0"),
    ("learning_rate", math.nan, "finite number"),
    ("weight_decay", -1, "greater than or equal to 0"),
    ("num_layers", 0, "greater than 0"),
    ("num_layers", 1.5, "valid integer"),
    ("num_genes", -1, "greater than or equal to 0"),
    ("num_programs", 0, "greater than 0"),
    ("codec_time_fraction", 1, "less than 1"),
    ("codec_validation_fraction", 0, "greater than 0"),
    ("test_fraction", 0, "greater than 0"),
    ("test_fraction", 1, "less than 1"),
    ("condition_dropout", 1, "less than 1"),
    ("ema_decay", -0.1, "greater than or equal to 0"),
    ("max_train_steps", 0, "greater than 0"),
    ("max_train_minutes", 0, "greater than 0"),
    ("gradient_accumulation_steps", 0, "greater than 0"),
    ("checkpoints_total_limit", 0, "greater than 0"),
    ("seed", -1, "greater than or equal to 0"),
    ("values", "raw", "'counts' or 'log'"),
    ("codec", "vae", "'program' or 'expression'"),
    ("block_type", "unet", "'descent', 'white_box' or 'dit'"),
    ("prediction_type", "score", "'epsilon', 'v_prediction' or 'sample'"),
    ("mixed_precision", "fp8", "'no', 'fp16' or 'bf16'"),
]

# Flags that contradict each other: the field that is named, and why.
CONTRADICTIONS = [
    ({"codec": "expression", "num_programs": 8}, "--num_programs has no effect with --codec expression"),
    ({"codec": "expression", "kl_weight": 1.0}, "--kl_weight has no effect with --codec expression"),
    ({"codec": "expression", "mixture_share": 0.5}, "--mixture_share has no effect with --codec expression"),
    ({"standardize": False}, "--standardize has no effect with --codec program"),
    ({"codec": "program", "model_library_size": False}, "--model_library_size has no effect with --codec program"),
]


def write_yaml(path: Path, values: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump({key: str(v) if isinstance(v, Path) else v for key, v in values.items()}))
    return str(path)


def refusal(capsys, *flags: str) -> str:
    """The one line with which the program ends, with exit code 2."""
    with pytest.raises(SystemExit) as exit_:
        config_from_args([*flags, "--output_dir", "out"], prog="wbdit train")
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    errors = [line for line in output.err.splitlines() if not line.startswith("usage:")]
    assert len(errors) == 1 and errors[0].startswith("wbdit train: error: "), output.err
    return errors[0]


@pytest.mark.parametrize("values, flags", SAME)
def test_python_yaml_and_flags_make_the_same_config(values, flags, tmp_path):
    expected = TrainingConfig(output_dir="out", **values)
    assert config_from_args([*flags, "--output_dir", "out"]) == expected
    path = write_yaml(tmp_path / "config.yaml", {**values, "output_dir": "out"})
    assert config_from_args(["--config", path]) == expected
    assert all(getattr(expected, name) == value for name, value in values.items())


@pytest.mark.parametrize("name, value, message", REFUSED)
def test_wrong_values_are_refused_with_the_flag_s_name(name, value, message, tmp_path, capsys):
    line = refusal(capsys, "--config", write_yaml(tmp_path / "config.yaml", {name: value}))
    assert name in line and message in line
    with pytest.raises(ValueError, match=name):
        TrainingConfig(output_dir="out", **{name: value})
    if name in FIELDS:
        line = refusal(capsys, f"--{name}", str(value))
        assert f"--{name}" in line and message in line


def test_unknown_flags_are_refused(capsys):
    assert "unrecognized arguments: --learning_rates" in refusal(capsys, "--learning_rates", "1")
    assert "unrecognized arguments: --learning" in refusal(capsys, "--learning", "1")  # no abbreviations


@pytest.mark.parametrize("values, message", CONTRADICTIONS)
def test_a_flag_of_the_other_codec_is_an_error(values, message, tmp_path, capsys):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(output_dir="out", **values)
    assert message in refusal(capsys, "--config", write_yaml(tmp_path / "config.yaml", values))


def test_output_dir_is_required(capsys):
    with pytest.raises(SystemExit) as exit_:
        config_from_args(["--dataset", "cells.h5ad"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("error: --output_dir is required.")
    with pytest.raises(ValueError, match="output_dir"):
        TrainingConfig()


# ==================== YAML files ====================


def test_a_later_config_wins_and_flags_win_over_all(tmp_path):
    first = write_yaml(tmp_path / "first.yaml", {"seed": 1, "num_layers": 1, "learning_rate": 0.1})
    second = write_yaml(tmp_path / "second.yaml", {"seed": 2, "num_layers": 2})
    config = config_from_args(["--config", first, second, "--seed", "3", "--output_dir", "out"])
    assert (config.learning_rate, config.num_layers, config.seed) == (0.1, 2, 3)
    config = config_from_args(["--seed", "3", "--config", second, first, "--output_dir", "out"])
    assert (config.learning_rate, config.num_layers, config.seed) == (0.1, 1, 3)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_load_by_name_and_by_path(name):
    by_name = config_from_args(["--config", name, "--output_dir", "out"])
    assert by_name == config_from_args(["--config", str(SHIPPED_CONFIGS / f"{name}.yaml"), "--output_dir", "out"])
    written = yaml.safe_load((SHIPPED_CONFIGS / f"{name}.yaml").read_text())
    assert written
    for field, value in written.items():
        got = getattr(by_name, field)
        assert (str(got) if isinstance(got, Path) else got) == value


def test_a_dataset_s_config_and_the_paper_s_behind_it():
    flags = ["--config", "pbmc3k", "paper", "--values", "counts", "--output_dir", "out"]
    config = config_from_args(flags)
    assert config.dataset == Path("pbmc3k.h5ad")  # the first file's
    assert config.label_keys == [] and config.codec == "expression"  # the second's
    assert config.values == "counts"  # the command line's


def test_the_paper_s_setting():
    config = config_from_args(["--config", "paper", "--output_dir", "out"])
    shape = {"patch_size": 10, "num_layers": 3, "num_attention_heads": 8, "attention_head_dim": 96}
    assert {name: getattr(config, name) for name in shape} == shape
    assert (config.learning_rate, config.train_batch_size, config.num_inference_steps) == (1e-4, 16, 1000)
    assert config.prediction_type == "epsilon" and config.values == "log" and not config.use_ema


def test_label_keys_as_a_string_is_one_key(tmp_path):
    (tmp_path / "config.yaml").write_text("label_keys: cell_type\noutput_dir: out\n")
    assert config_from_args(["--config", str(tmp_path / "config.yaml")]).label_keys == ["cell_type"]
    assert TrainingConfig(output_dir="out", label_keys="cell_type").label_keys == ["cell_type"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("- seed\n- 3\n", "does not hold fields and values"),
        ("seed: [3\n", "is no YAML"),
        ("seed: 3\nlearning_rates: 1\nsteps: 2\n", "sets learning_rates, steps, which is no flag of the training"),
    ],
)
def test_a_config_file_that_holds_no_flags(text, message, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(text)
    assert message in refusal(capsys, "--config", str(tmp_path / "config.yaml"))


def test_an_absent_config_names_the_shipped_ones(capsys):
    line = refusal(capsys, "--config", "papers")
    assert "--config papers: there is no such file" in line and all(name in line for name in SHIPPED)


def test_an_empty_config_file_changes_nothing(tmp_path):
    (tmp_path / "config.yaml").write_text("# nothing\n")
    config = config_from_args(["--config", str(tmp_path / "config.yaml"), "--output_dir", "out"])
    assert config == TrainingConfig(output_dir="out")


# ==================== Defaults and help ====================


@pytest.mark.parametrize(
    "values, codec",
    [({}, "program"), ({"values": "log"}, "program"), ({"codec": "expression"}, "expression")],
)
def test_defaults_follow_the_codec(values, codec):
    config = TrainingConfig(output_dir="out", **values)
    assert config.codec == codec
    assert {name: getattr(config, name) for name in CODEC_DEFAULTS[codec]} == CODEC_DEFAULTS[codec]


def test_a_given_value_is_kept_from_the_codec_s_defaults():
    config = TrainingConfig(output_dir="out", codec="expression", num_layers=7)
    assert config.num_layers == 7 and config.patch_size == CODEC_DEFAULTS["expression"]["patch_size"]


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as exit_:
        config_from_args(["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    helps = {action.dest: action.help for action in build_parser()._actions}
    for name in FIELDS:
        assert re.search(rf"--{name}[, ]", text), name
        sentence = helps[name].replace("%%", "%").split(" Default:")[0]
        assert sentence[0].isupper() and sentence.endswith(".") and len(sentence.split()) >= 3, name


def test_help_says_the_defaults():
    helps = {action.dest: action.help for action in build_parser()._actions}
    assert helps["learning_rate"].endswith("Default: 0.002.")
    assert helps["num_genes"].endswith("Default: 2000.")
    assert helps["num_layers"].endswith("Default: 4 with --codec program, 3 with --codec expression.")


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--label_keys", "cell_type", "my phase", "--max_train_steps", "7", "--no-use_ema"],
        ["--codec", "expression", "--patch_size", "5", "--no-standardize", "--data_name", "PBMC's"],
    ],
)
def test_the_command_of_a_config_gives_the_config_again(flags):
    config = config_from_args(["--dataset", "/somewhere/cells.h5ad", "--output_dir", "/elsewhere/out", *flags])
    command = command_of(config)
    assert command.startswith("wbdit train --dataset cells.h5ad --output_dir out") and "where" not in command
    again = config_from_args(shlex.split(command)[2:])
    assert config_without_places(again) == config_without_places(config)
    assert len(shlex.split(command)) == 6 + len(flags)
