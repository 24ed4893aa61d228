"""Hook of mkdocs.yml: pages of the repository's root, and links between them, docs/ and the code.

Documents link each other as a reader of the repository sees them: README.md to docs/install.md, docs/data.md to
../conf/mappings. The site has one folder, and no code.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
ROOT_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^()\s]+)\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages of the root to those of docs/."""
    from mkdocs.structure.files import File

    for name in ROOT_PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Point links into the site. A file without a page becomes its path, which must exist. Raises ValueError for one
    that does not."""
    folder = ROOT if page.file.src_uri in ROOT_PAGES else ROOT / "docs"

    def inside(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        file = Path(os.path.normpath(folder / path))  # not resolve: a folder may be a link
        if not file.exists():
            raise ValueError(f"{page.file.src_uri}: {target} does not exist")
        if file.parent == ROOT and file.name in ROOT_PAGES:
            here = file.name
        elif file.is_relative_to(ROOT / "docs"):
            here = str(file.relative_to(ROOT / "docs"))
        else:
            shown = str(file.relative_to(ROOT))
            return text if shown in text else f"{text} (`{shown}`)"
        return f"{image}[{text}]({here}{'#' + anchor if anchor else ''})"

    return LINK.sub(inside, markdown)
