"""Converts docstrings in the style of Diffusers (Markdown with `Args:`) to reStructuredText for Sphinx."""

import re


# [`name`], or ``code`` that is already reStructuredText, or `code`
MARKED = re.compile(r"\[`(?P<short>~?)(?P<name>[\w.]+)`\]|``[^`]+``|`(?P<code>[^`\n]+)`")
FENCE = re.compile(r"^(\s*)```(\w*)\s*$")


def to_rst(app, what, name, obj, options, lines: list[str]):
    """Rewrites the lines of a docstring in place."""
    rst, fence = [], None
    for line in lines:
        match = FENCE.match(line)
        if match and fence is None:
            fence = match[1]
            rst += [f"{fence}.. code-block:: python", ""]
        elif match:
            fence = None
            rst.append("")
        elif fence is not None:
            rst.append(f"    {line}")
        else:
            rst.append(inline(line))
    if what in ("attribute", "property") and rst and ":" in rst[0]:
        rst[0] = f": {rst[0]}"  # napoleon would read the text before a colon as the type
    lines[:] = rst


def inline(line: str) -> str:
    """Turns `code` into ``code``, and [`name`] into a cross-reference, which is shown as code if it has no target."""

    def mark(match: re.Match) -> str:
        if match["name"]:
            shown = match["name"].rpartition(".")[2] if match["short"] else match["name"]
            text = f":py:obj:`{shown} <.{match['name']}>`"
        elif match["code"]:
            text = f"``{match['code']}``"
        else:
            return match[0]
        # In `Cell`s, the letter after the mark would otherwise hide its end.
        return text + ("\\ " if line[match.end() : match.end() + 1].isalnum() else "")

    return MARKED.sub(mark, line)
