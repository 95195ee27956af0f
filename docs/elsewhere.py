"""Pages of the site that live elsewhere in the repository, and links between files as links between pages.

Links in our Markdown are right in a clone. On the site, one to a file that is a page here becomes a link to the page,
and one to any other file, such as source code, names the file.
"""

import os
import re
import shutil
from pathlib import Path


DOCS = Path(__file__).parent
ROOT = DOCS.parent
# File in the repository -> page. The folders of these pages are written by each build, and belong to no commit.
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


def bring_pages():
    """Writes the pages that live elsewhere, with their figures."""
    for origin, page in PAGES.items():
        text = FRONT_MATTER.sub("", (ROOT / origin).read_text())  # a model card's metadata is for the Hub
        text = mend(text, origin) + (NOTEBOOK_CONTENTS if page == "notebook/index.md" else "")
        _write(DOCS / page, text)
    for figure in (ROOT / "lab").glob("*/*.png"):
        target = DOCS / "notebook" / figure.relative_to(ROOT / "lab")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(figure, target)


def _write(path: Path, text: str):
    """Leaves a file alone that has this text, so that its page is not built again."""
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def mend(text: str, origin: str) -> str:
    """The text of a file for the site, with links that hold there; `origin` is the file's path in the repository."""

    def mend_link(match: re.Match) -> str:
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
            # Where a file is named, a page has a title.
            return f"{mark}[{'' if label.endswith('.md') else label}](/{page}{anchor})"
        if not (ROOT / path).exists():
            return match[0]  # left to the build, which fails on it
        return f"{label}" if path.strip("/") in label else f"{label} (`{path}`)"

    return LINK.sub(mend_link, text).replace(" ± ", "\u00a0±\u00a0")  # one number, not three lines of a table


def mend_page_source(app, docname: str, source: list[str]):
    """[`mend`] for pages that live here, as they are read."""
    if not docname.startswith(("project/", "notebook/")):
        source[0] = mend(source[0], f"docs/{docname}.md")
