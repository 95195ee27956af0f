"""Labels, gene names and texts of a user as Markdown, in which they can't be markup."""

import json
import re
from typing import Any


def as_code(text: str) -> str:
    """A Python string literal in one line, without backticks, which could end the code."""
    return json.dumps(text, ensure_ascii=False).replace("`", "\\u0060")


def as_text(value: Any) -> str:
    """One line of plain Markdown, which may be a cell of a table."""
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|#~!$]|__)", r"\\\1", text)
    return re.sub(r"(https?|www)([:.])", r"\1\\\2", text)
