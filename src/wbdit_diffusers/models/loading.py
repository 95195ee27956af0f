"""Models are read from safetensors, and only with every weight present, of the right shape and finite."""

import reprlib
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin

from ..files import one_line
from ..pretrained import locate


MAY_BE_INFINITE = ("log_library_size_range", "composed_errors")  # for log values; if nothing could be left out


class SafetensorsModel(ModelMixin, ConfigMixin):
    """A [`ModelMixin`] that reads and writes safetensors only."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> Any:
        """
        Loads a model as [`ModelMixin.from_pretrained`]. Raises an `OSError` if weights are missing, don't fit the
        configuration, or hold NaN or infinite values.
        """
        if cls is SafetensorsModel:  # any model of this package, for `AutoModel`
            config = cls.load_config(pretrained_model_name_or_path, **kwargs)
            model_class = getattr(import_module(__package__), config["_class_name"])
            return model_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
        name = locate(pretrained_model_name_or_path)
        where = Path(name, kwargs.get("subfolder") or "")
        with_info = kwargs.pop("output_loading_info", False)
        kwargs |= {"use_safetensors": True, "output_loading_info": True}
        dtype, default_dtype = kwargs.get("dtype", kwargs.get("torch_dtype")), torch.get_default_dtype()
        try:
            model, info = super().from_pretrained(name, **kwargs)
        except (RuntimeError, TypeError, ValueError) as error:
            raise OSError(f"{where} can't be loaded as a {cls.__name__}: {one_line(error)}") from error
        finally:
            torch.set_default_dtype(default_dtype)  # Diffusers leaves it changed after an error
        for problem in ("missing_keys", "unexpected_keys"):
            if info[problem]:
                names = f"{problem.replace('_', ' ')} {reprlib.repr(sorted(info[problem]))}"
                raise OSError(f"The weights in {where} don't match its config.json: {names}.")
        check_finite(model, where)
        if isinstance(dtype, torch.dtype) and model.dtype != dtype:
            model.to(dtype)  # Diffusers does not with low_cpu_mem_usage=False
        return (model, info) if with_info else model

    @wraps(ModelMixin.save_pretrained)  # pipelines read the signature to see which arguments it takes
    def save_pretrained(self, *args, **kwargs):
        super().save_pretrained(*args, **{**kwargs, "safe_serialization": True})


def check_finite(model: torch.nn.Module, where: Path):
    """Raises an `OSError` that names the first weight with NaN or infinite values."""
    for name, tensor in model.state_dict().items():
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        wrong = tensor.isnan() if name in MAY_BE_INFINITE else ~tensor.isfinite()
        if wrong.any():
            raise OSError(f"{where} is damaged: {name} holds {int(wrong.sum())} NaN or infinite values.")
