"""The page of the commands, made from their parsers."""

import argparse
import inspect
import re
from unittest import mock

from wbdit_diffusers import cli


PAGE = "command_line"
LITERAL = re.compile(r"(`[^`]+`)")


class _Found(Exception):
    """Carries the parser of a command to [`parser_of`]."""


class _Parser(cli.FlagParser):
    def parse(self, argv):
        raise _Found(self)


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser that a command builds."""
    with mock.patch.object(cli, "FlagParser", _Parser):
        try:
            cli.parse(name, [])
        except _Found as found:
            return found.args[0]
    raise AssertionError(f"wbdit {name} has no parser")


def commands() -> str:
    """One section for each command. Two names of one command share a section."""
    names: dict = {}
    for name, (run, _) in cli.COMMANDS.items():
        names.setdefault(run, []).append(name)
    return "\n".join(_section(*aliases, text=inspect.getdoc(run) or "") for run, aliases in names.items())


def _section(name: str, *aliases: str, text: str) -> str:
    parser = parser_of(name)
    prose, _, examples = text.partition("\n\n    ")
    same = "".join(f" `wbdit {alias}` is the same command." for alias in aliases)
    usage = parser.format_usage().removeprefix("usage: ").strip()
    examples = inspect.cleandoc("    " + examples)
    lines = [f"## wbdit {name}", "", f"{prose}{same}", "", "```bash", *(usage, "", examples), "```", ""]
    lines += [f":::{{program}} wbdit {name}", ":::", ""]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help and action.dest != "help"]
        if actions and group.title not in ("options", "positional arguments"):
            lines += [f"### {group.title}", ""]
        for action in actions:
            lines += [f"::::{{option}} {_flag(action)}", "", _escape(action.help.replace("%%", "%")), "::::", ""]
    return "\n".join(lines)


def _flag(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"<{action.dest}>"
    value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    return ", ".join(f"{flag}{value}{' ...' if action.nargs in ('+', '*') else ''}" for flag in action.option_strings)


def _escape(text: str) -> str:
    """Markdown of a help text: `code` stays code, and nothing else is markup."""
    parts = LITERAL.split(text)
    return "".join(part if LITERAL.fullmatch(part) else re.sub(r"([*_<>{}\[\]])", r"\\\1", part) for part in parts)


def add_commands(app, docname: str, source: list[str]):
    """Appends the commands to their page as it is read."""
    if docname == PAGE:
        source[0] += "\n" + commands()


def always_outdated(app, env, added, changed, removed) -> list[str]:
    """The page depends on the parsers, which Sphinx does not watch."""
    return [PAGE] if PAGE in env.found_docs else []
