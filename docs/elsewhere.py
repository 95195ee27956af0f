"""Copies pages from elsewhere in the repository to the site, and turns links between files into links between pages.

The links in our Markdown are valid in a clone. On the site, a link to a file with a page becomes a link to that page.
A link to any other file, such as source code, becomes the name of the file.
"""

import os
import re
import shutil
from pathlib import Path


DOCS = Path(__file__).parent
ROOT = DOCS.parent
# File in the repository -> page. Each build writes the folders of these pages, and Git ignores them.
PAGES = {
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "training/README.md": "project/training.md",
    "model_card.md": "project/model_card.md",
    "lab/README.md": "notebook/index.md",
}
PAGES |= {f"lab/{file.name}": f"notebook/{file.name}" for file in (ROOT / "lab").glob("*.md") if file.stem != "README"}
FOLDERS = {"docs": "index.md", "lab": "notebook/index.md"}
NOTEBOOK_CONTENTS = "\n```{toctree}\n:hidden:\n:glob:\n\n*\n```\n"

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)((?:#[^)\s]*)?)\)")
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def copy_pages():
    """Writes the pages that live elsewhere, with their figures."""
    for origin, page in PAGES.items():
        text = FRONT_MATTER.sub("", (ROOT / origin).read_text())  # a model card's metadata is for the Hub
        text = fix_links(text, origin) + (NOTEBOOK_CONTENTS if page == "notebook/index.md" else "")
        _write(DOCS / page, text)
    for figure in (ROOT / "lab").glob("*/*.png"):
        target = DOCS / "notebook" / figure.relative_to(ROOT / "lab")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(figure, target)


def _write(path: Path, text: str):
    """Writes a file if its text has changed. An unchanged file keeps its date, so its page is not built again."""
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def fix_links(text: str, origin: str) -> str:
    """Returns the text of a file with links that are valid on the site. `origin` is its path in the repository."""

    def fix_link(match: re.Match) -> str:
        mark, label, target, anchor = match.groups()
        if ":" in target:  # an address
            return match[0]
        path = os.path.normpath(os.path.join(os.path.dirname(origin), target))
        page = PAGES.get(path) or FOLDERS.get(path)
        if page is None and mark and path.startswith("lab/"):
            page = "notebook/" + path.removeprefix("lab/")
        if page is None and path.startswith("docs/") and (ROOT / path).is_file():
            page = path.removeprefix("docs/")
        if page is not None:
            # An empty label shows the title of the page instead of the name of the file.
            return f"{mark}[{'' if label.endswith('.md') else label}](/{page}{anchor})"
        if not (ROOT / path).exists():
            return match[0]  # the build fails on it
        return f"{label}" if path.strip("/") in label else f"{label} (`{path}`)"

    return LINK.sub(fix_link, text).replace(" ± ", "\u00a0±\u00a0")  # keeps a number on one line of a table


def fix_page_links(app, docname: str, source: list[str]):
    """Applies [`fix_links`] to the pages of docs/ as they are read."""
    if not docname.startswith(("project/", "notebook/")):
        source[0] = fix_links(source[0], f"docs/{docname}.md")
