"""Docstrings as Markdown: ours are plain text, whose columns and indented lines a browser would run together.

An indented block, columns (two blanks or more inside a line), and lines that each open a setting keep their line ends.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

NAMED = re.compile(r"^([A-Za-z_][\w.*]*(?:, [A-Za-z_][\w.*]*)*):\s+(?=\S)")
"""The start of a setting's line: `tokens:  what they are`, `sampler, guidance_scale: None takes ...`."""


def markdown(text: str) -> str:
    """A docstring as Markdown, paragraph by paragraph."""
    return "\n\n".join(_paragraph(part) for part in re.split(r"\n\s*\n", text.strip("\n")) if part.strip())


def _paragraph(part: str) -> str:
    lines = part.split("\n")
    if all(line.startswith("    ") for line in lines):
        return _fenced([line.removeprefix("    ") for line in lines])
    if _is_code(lines):
        return _fenced(lines)
    settings = [_settings(line) for line in lines]
    if any(settings):
        return _with_settings(lines, settings)
    if len(lines) > 1 and sum(bool(re.search(r"\S {2,}\S", line)) for line in lines) * 2 >= len(lines):
        return _fenced(lines)
    return _text(" ".join(line.strip() for line in lines))


def _is_code(lines: list[str]) -> bool:
    """Whether a paragraph is Python, as no sentence of English is."""
    try:
        tree = ast.parse("\n".join(lines))
    except SyntaxError:
        return False
    return any(isinstance(node, ast.Call) for node in ast.walk(tree))


def _settings(line: str) -> list[str]:
    """The settings that a line opens, two of them where it has columns; none where it goes on."""
    if not NAMED.match(line) or line.startswith(("Raises", "http")):
        return []
    parts = re.split(r";? {2,}(?=[A-Za-z_][\w.*]*(?:, [\w.*]+)*: )", line)
    return parts if all(NAMED.match(p) for p in parts) else [line]


def _with_settings(lines: list[str], settings: list[list[str]]) -> str:
    """A paragraph of settings as a list; what stands before the first is a sentence."""
    before: list[str] = []
    items: list[str] = []
    after: list[str] = []
    for line, opened in zip(lines, settings, strict=True):
        if opened:
            items += opened
        elif items and line.startswith(" "):
            items[-1] += " " + line.strip()
        elif items:
            after.append(line)
        else:
            before.append(line)
    said = [_text(" ".join(before))] if before else []
    made = []
    for item in items:
        match = NAMED.match(item)
        assert match is not None
        names = ", ".join(f"`{name}`" for name in match[1].split(", "))
        made.append(f"- {names}: {_text(item[match.end() :].strip())}")
    return "\n\n".join([*said, "\n".join(made), *([_text(" ".join(after))] if after else [])])


def _text(line: str) -> str:
    """A line outside code: what Markdown or HTML would take for markup is escaped."""
    pieces = re.split(r"(`[^`]*`)", line)
    return "".join(p if p.startswith("`") else re.sub(r"([*_<\[\]|])", r"\\\1", p) for p in pieces)


def _fenced(lines: list[str]) -> str:
    language = "python" if any(re.search(r"^(from|import) |\)\.\w+|^\w+(, \w+)* = \w+[.(]", line) for line in lines) else "text"
    return "\n".join([f"```{language}", *lines, "```"])


class Plain(griffe.Extension):
    """Makes every docstring Markdown; what a dataclass holds is in its signature, and not listed again below."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        self._shorten(pkg)

    def _shorten(self, owner: griffe.Module | griffe.Class) -> None:
        for name, member in list(owner.members.items()):
            if member.is_alias:
                continue
            if isinstance(member, (griffe.Module, griffe.Class)):
                self._shorten(member)
            elif "dataclass" in owner.labels and member.is_attribute and member.docstring is None:
                del owner.members[name]
