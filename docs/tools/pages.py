"""Hooks of the site: pages that lie elsewhere in the repository, and links to what is no page."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ADOPTED = {
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changes.md",
}
"""Files of the repository that are pages of the site, at their addresses there."""

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that lie elsewhere."""
    from mkdocs.structure.files import File

    for source, page in ADOPTED.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Links lead to pages of the site, or, where a file of the repository is none, name it."""
    own = next(
        (source for source, name in ADOPTED.items() if name == page.file.src_uri),
        f"docs/{page.file.src_uri}",
    )

    def resolved(match: re.Match[str]) -> str:
        image, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        meant = posixpath.normpath(posixpath.join(posixpath.dirname(own), target))
        address = ADOPTED.get(meant) or (meant.removeprefix("docs/") if meant.startswith("docs/") else None)
        if address is None or (ROOT / meant).is_dir():
            return text if text.startswith("`") else f"`{meant}`"
        here = posixpath.dirname(page.file.src_uri)
        return f"{image}[{text}]({posixpath.relpath(address, here or '.')}{anchor})"

    pieces = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)  # code stays as it is
    return "".join(piece if piece.startswith("```") else LINK.sub(resolved, piece) for piece in pieces)
