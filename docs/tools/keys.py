"""The table of a recipe's keys, from its config: every key with its default and its comment.

python docs/tools/keys.py      writes the tables anew into the pages that have one, between the lines `<!-- keys: RECIPE -->`
"""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[1]
CONFIGS = DOCS.parent / "recipes" / "configs"
TABLE = re.compile(r"(<!-- keys: (\w+) -->\n).*?(<!-- end -->)", re.S)


def keys(config: str) -> list[tuple[str, str, str, str]]:
    """Of a config's text: heading, key, default and comment of every key; a comment before a key that has none is a heading."""
    found, heading = [], ""
    for block in re.split(r"\n\s*\n", config.strip())[1:]:  # the first is the header
        for line in block.splitlines():
            if line.startswith("#"):
                heading = line.lstrip("# ")
                continue
            match = re.fullmatch(r"(\w+): (.*?)(?:\s+# (.*))?", line)
            assert match is not None, f"a key, its default and its comment: {line}"
            found.append((heading, match[1], match[2], match[3] or ""))
        heading = ""
    return found


def table(recipe: str) -> str:
    """The keys of a recipe as Markdown tables, one below each heading."""
    lines: list[str] = []
    before: str | None = None
    for heading, key, default, comment in keys((CONFIGS / f"{recipe}.yaml").read_text()):
        if heading != before:
            lines += ["", *filter(None, [heading]), *HEAD]
            before = heading
        said = comment.replace("<", "&lt;").replace("|", "&#124;")
        lines.append(f"| `{key}` | {'**required**' if default == '???' else f'`{default}`'} | {said} |")
    return "\n".join(lines).strip("\n") + "\n"


HEAD = ["", "| key | default | |", "| --- | --- | --- |"]


def renewed(page: str) -> str:
    """The text of a page with its tables as they are now."""
    return TABLE.sub(lambda m: f"{m[1]}\n{table(m[2])}\n{m[3]}", page)


if __name__ == "__main__":
    for page in DOCS.rglob("*.md"):
        text = page.read_text()
        if renewed(text) != text:
            page.write_text(renewed(text))
            print(page)
