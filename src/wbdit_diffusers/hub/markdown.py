"""Names and values of a user's data, as Markdown that shows them and nothing else."""

import json
import re
from collections.abc import Iterable
from typing import Any


def as_code(text: str) -> str:
    """A string as Python has it in quotes: whatever is in it, it ends where it ends, on one line."""
    return json.dumps(text, ensure_ascii=False).replace("`", "\\u0060")  # three of which would end the block of code


def as_code_span(code: str) -> str:
    """Code within a line of Markdown; `as_code` has left no backtick in it."""
    return f"`{code}`"


def as_text(value: Any) -> str:
    """Anything as one line of plain Markdown, in a table or out of one: nothing in it is markup, HTML or a link."""
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|#~!$]|__)", r"\\\1", text)
    return re.sub(r"(https?|www)([:.])", r"\1\\\2", text)


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [list(titles)]
    lines += [["---"] * len(lines[0]), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
