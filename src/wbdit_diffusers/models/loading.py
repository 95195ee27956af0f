"""Models are read from safetensors, and only with every weight present and of the right shape."""

import reprlib
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin

from ..pretrained import locate


class SafetensorsModel(ModelMixin, ConfigMixin):
    """A [`ModelMixin`] that reads and writes safetensors only."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> Any:
        """As [`ModelMixin.from_pretrained`]. Raises an error also if weights are missing or unexpected."""
        if cls is SafetensorsModel:  # any model of this package, for `AutoModel`
            config = cls.load_config(pretrained_model_name_or_path, **kwargs)
            model_class = getattr(import_module(__package__), config["_class_name"])
            return model_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
        name, with_info = locate(pretrained_model_name_or_path), kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(name, **kwargs | {"use_safetensors": True, "output_loading_info": True})
        for problem in ("missing_keys", "unexpected_keys"):
            if info[problem]:
                where = Path(name, kwargs.get("subfolder") or "")
                names = f"{problem.replace('_', ' ')} {reprlib.repr(sorted(info[problem]))}"
                raise OSError(f"The weights in {where} don't match its config.json: {names}.")
        return (model, info) if with_info else model

    @wraps(ModelMixin.save_pretrained)  # pipelines read the signature to see which arguments it takes
    def save_pretrained(self, *args, **kwargs):
        super().save_pretrained(*args, **{**kwargs, "safe_serialization": True})
