"""Models are loaded whole or not at all, and no configuration builds more than a machine can hold."""

import reprlib
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin


MAX_PARAMETERS = 10**10  # of one component: a hundred times more than any model of cells has
MAX_LAYERS = 1000
MAX_SIZE = 10**7  # of any one dimension
MAY_BE_INFINITE = ("log_library_size_range",)  # of log values, which have no library size


class CheckedModel(ModelMixin):
    """A [`ModelMixin`] that is only loaded from safetensors, with every weight there, fitting and finite."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> Any:
        """
        Loads a model from a folder or a Hub id; see [`ModelMixin.from_pretrained`] for the arguments.

        Raises:
            OSError: If the weights are missing, not those of the configuration, or not finite.
            ValueError: If the configuration describes no such model.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError(
                "`use_safetensors=False` would load a pickle file, which can run any code: save it as safetensors."
            )
        with_info = kwargs.pop("output_loading_info", False)
        kwargs["use_safetensors"] = True
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        where = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(problem):
                raise OSError(
                    f"The weights in {where} are not those of its config.json: {problem.replace('_', ' ')}"
                    f" {reprlib.repr(sorted(map(str, info[problem])))}. Copy or download the model again."
                )
        check_finite(model, str(where))
        return (model, info) if with_info else model


def check_finite(model: torch.nn.Module, where: str):
    """Raises an `OSError` that names the first weight that holds NaN or infinite values."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        wrong = tensor.isnan() if name in MAY_BE_INFINITE else ~tensor.isfinite()
        if wrong.any():
            raise OSError(
                f"The weights in {where} are damaged: {name} holds {int(wrong.sum())} NaN or infinite values. Copy or"
                " download the model again, or train it anew."
            )


def check_integer(name: str, value: Any, smallest: int = 1, largest: int = MAX_SIZE) -> int:
    """Raises a `ValueError` that names the value, unless it is a whole number within the bounds."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not smallest <= int(value) <= largest:
        raise ValueError(f"`{name}` is a whole number from {smallest:,} to {largest:,}, not {reprlib.repr(value)}.")
    return int(value)


def check_number(name: str, value: Any, smallest: float, largest: float) -> float:
    """Raises a `ValueError` that names the value, unless it is a number within the bounds; NaN is not."""
    if isinstance(value, bool) or not isinstance(value, Real) or not smallest <= float(value) <= largest:
        raise ValueError(f"`{name}` is a number from {smallest:g} to {largest:g}, not {reprlib.repr(value)}.")
    return float(value)


def check_sizes(sizes: Any) -> tuple[int, ...]:
    """Checks `condition_sizes`: a list of whole numbers."""
    if not isinstance(sizes, (tuple, list)):
        raise ValueError(f"`condition_sizes` is a list of whole numbers, not {reprlib.repr(sizes)}.")
    return tuple(check_integer("condition_sizes", size) for size in sizes)


def check_num_parameters(model: str, num_parameters: int):
    """Raises a `ValueError` if a model is larger than any that this package can mean: before it is built."""
    if num_parameters > MAX_PARAMETERS:
        raise ValueError(
            f"This {model} would have {num_parameters:.1e} parameters, more than {MAX_PARAMETERS:.0e}: check its"
            " sizes."
        )


def check_transformer(
    sample_size: int,
    patch_size: int,
    num_layers: int,
    num_attention_heads: int,
    attention_head_dim: int,
    condition_sizes: tuple[int, ...],
    block_type: str,
):
    """Raises a `ValueError` on sizes of which no [`WhiteBoxDiTModel`] can be built."""
    check_integer("sample_size", sample_size)
    check_integer("patch_size", patch_size)
    check_integer("num_layers", num_layers, largest=MAX_LAYERS)
    dim = check_integer("num_attention_heads", num_attention_heads) * check_integer(
        "attention_head_dim", attention_head_dim
    )
    if dim % 4:
        raise ValueError(
            f"The hidden size num_attention_heads * attention_head_dim = {dim} must be a multiple of 4, because"
            " the position embedding is made of pairs of sines and cosines."
        )
    if block_type not in ("white_box", "descent", "dit"):
        raise ValueError(f"`block_type` is 'white_box', 'descent' or 'dit', not {block_type!r}.")
    num_patches = -(-sample_size // patch_size)
    per_token = num_patches * dim * (1 + 2 * patch_size if block_type == "descent" else 1)
    num_parameters = num_layers * 3 * dim**2 + per_token + dim * (sum(check_sizes(condition_sizes)) + patch_size)
    check_num_parameters("WhiteBoxDiTModel", num_parameters)
