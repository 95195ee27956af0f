"""Flags of a command from a dataclass: each field is a flag, and the docstring below it is its help."""

import argparse
import difflib
import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import ConfigDict, Field, ValidationError


Config = TypeVar("Config")
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # NumPy's generators take 32-bit seeds
pydantic_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class FlagParser(argparse.ArgumentParser):
    """A parser that raises a `ValueError` for a mistake, and suggests the flag that was probably meant."""

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        values, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].partition("=")[0]
            self.error(f"{flag} is unknown{did_you_mean(flag, self._option_string_actions)}")
        return vars(values)

    def error(self, message: str):
        raise ValueError(message)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.75)
    return f": did you mean {close[0]}?" if close else ": see --help."


def add_flags(parser: argparse.ArgumentParser, config_class: Any, positional: Sequence[str], common: Sequence[str]):
    """Adds a flag for each field of a pydantic dataclass: required, `common`, then those of each base class."""
    owners = {name: owner for owner in reversed(config_class.__mro__) for name in inspect.get_annotations(owner)}
    fields = {name: owners[name].__pydantic_fields__[name] for name in config_class.__pydantic_fields__}
    groups: dict[type, Any] = {config_class: parser}
    rank = {name: place for place, name in enumerate(common)}
    for name in sorted(fields, key=lambda name: (not fields[name].is_required(), rank.get(name, len(rank)))):
        is_required = fields[name].is_required()
        flag = name if is_required and name in positional else f"--{name}"
        if is_required:
            parser.usage = f"{parser.usage} {name if flag == name else f'{flag} {name.upper()}'}"
        owner = config_class if is_required or name in common else owners[name]
        if owner not in groups:
            groups[owner] = parser.add_argument_group(owner.__doc__.rstrip("."))
        groups[owner].add_argument(flag, default=argparse.SUPPRESS, **_describe(fields[name]))


def make_config(config_class: type[Config], values: dict[str, Any], positional: Iterable[str] = ()) -> Config:
    """A configuration from names and values of fields. Raises a `ValueError` of one line that names the flag."""
    try:
        return config_class(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        message = problem["msg"].removeprefix("Value error, ")
        if problem["loc"]:
            name = str(problem["loc"][0])
            flag = name if name in positional else f"--{name}"
            is_missing = problem["type"] == "missing"
            message = f"{flag} is required." if is_missing else f"{flag} {problem['input']}: {message}."
            choices = re.findall("'(.*?)'", problem.get("ctx", {}).get("expected", ""))  # of a Literal
            if close := difflib.get_close_matches(str(problem["input"]), choices, n=1):
                message += f" Did you mean {close[0]}?"
        raise ValueError(message) from error


def _describe(field: Any) -> dict[str, Any]:
    """The arguments of `add_argument` for a field."""
    text, kinds = " ".join((field.description or "").split()), _kinds(field.annotation)
    if isinstance(field.default, str | int | float | Path) and field.default is not False:
        text += f" Default: {f'{field.default:.3g}' if isinstance(field.default, float) else field.default}."
    described: dict[str, Any] = {"help": text.replace("%", "%%")}
    if kinds == [bool]:
        described["action"] = "store_true" if field.default is False else argparse.BooleanOptionalAction
    elif list in kinds or dict in kinds:
        described["nargs"] = "+" if field.is_required() else "*"
        described |= {"action": _Pairs, "metavar": "KEY=NAME"} if dict in kinds else {}
    elif int in kinds:
        described["type"] = lambda word: str(int(float(word))) if re.fullmatch(r"\d+e\d\d?", word) else word  # 1e6
    elif choices := [kind for kind in kinds if isinstance(kind, str)]:
        described["metavar"] = "{" + ",".join(choices) + "}"
    return described


def _kinds(annotation: Any) -> list[Any]:
    """The types and literals of an annotation, through unions and `Annotated`."""
    parts = () if get_origin(annotation) in (list, dict) else get_args(annotation)
    return [kind for part in parts for kind in _kinds(part)] if parts else [get_origin(annotation) or annotation]


class _Pairs(argparse.Action):
    """Collects KEY=NAME words in a dict."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None):
        if not all("=" in word for word in values):
            parser.error(f"{option_string} {' '.join(values)}: write KEY=NAME.")
        setattr(namespace, self.dest, dict(word.split("=", 1) for word in values))
