"""Flags of a command from a dataclass: each field is a flag, and the docstring below it is its help."""

import argparse
import types
from collections.abc import Iterable
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ConfigDict, ValidationError
from pydantic_core import PydanticUndefined


Config = TypeVar("Config")
pydantic_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def add_flags(parser: Any, config_class: type, positional: Iterable[str] = (), leave_out: Iterable[str] = ()):
    """
    Adds one flag for each field of a pydantic dataclass. Flags that are not given are absent from the result, and
    types and ranges are checked by [`make_config`], so that Python, YAML and the command line refuse the same values.

    Args:
        parser (`argparse.ArgumentParser` or group): Gets the flags.
        config_class (`type`): A pydantic dataclass with `pydantic_config`.
        positional (`Iterable[str]`): Fields given without a flag.
        leave_out (`Iterable[str]`): Fields that are no flags.
    """
    for name, field in config_class.__pydantic_fields__.items():  # type: ignore[attr-defined]
        if name in leave_out:
            continue
        default = field.default if field.default_factory is None else field.default_factory()
        required = default is PydanticUndefined
        text = " ".join((field.description or "").split()).replace("%", "%%")
        if not required and default is not None and default != [] and default is not False:
            text += f" Default: {default:.3g}." if isinstance(default, float) else f" Default: {default}."
        kwargs: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if field.annotation is bool:
            kwargs["action"] = "store_true" if default is False else argparse.BooleanOptionalAction
        elif _is_list(field.annotation):
            kwargs["nargs"] = "+" if required else "*"
        choices = _literals(field.annotation)
        if choices:
            kwargs["metavar"] = "{" + ",".join(choices) + "}"
        if name in positional:
            kwargs["nargs"] = kwargs.get("nargs") if required else kwargs.get("nargs", "?")
            parser.add_argument(name, **{key: value for key, value in kwargs.items() if value is not None})
        else:
            parser.add_argument(f"--{name}", **kwargs)


def make_config(config_class: type[Config], values: dict[str, Any], positional: Iterable[str] = ()) -> Config:
    """
    A configuration from names and values of fields. Raises a `ValueError` of one line that names the flag.
    """
    try:
        return config_class(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]) if problem["loc"] else ""
        flag = name if name in positional else f"--{name}"
        if problem["type"] == "unexpected_keyword_argument":
            raise ValueError(f"{flag} is unknown: see --help.") from error
        if problem["type"] == "missing":
            raise ValueError(f"{flag} is required.") from error
        message = problem["msg"].removeprefix("Value error, ")
        raise ValueError(f"{flag} {problem['input']}: {message}." if name else message) from error


def _is_list(annotation: Any) -> bool:
    """Whether a flag takes several values."""
    if get_origin(annotation) in (list, tuple):
        return True
    if get_origin(annotation) in (Union, types.UnionType):
        return any(_is_list(one) for one in get_args(annotation))
    return False


def _literals(annotation: Any) -> list[str]:
    """The choices of a `Literal`, or of one in a union."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [literal for one in get_args(annotation) for literal in _literals(one)]
