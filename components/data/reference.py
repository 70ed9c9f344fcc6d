"""English text that is on every machine with Python: the language reference inside CPython (`pydoc_data.topics`, 0.7 MB)."""

from __future__ import annotations

import re
from typing import Any, Literal

PASSAGE = 1500  # characters: a passage is paragraphs in a row, about a page
TEST_TENTH = 9


def language_reference(split: Literal["train", "test"]) -> list[dict[str, Any]]:
    """Samples `{"text": passage}`. Paragraphs that the topics repeat are kept once, so no test text was seen in training."""
    from pydoc_data.topics import topics

    if split not in ("train", "test"):
        raise ValueError(f"language_reference: split {split!r} is not one of train, test")
    paragraphs = dict.fromkeys(p for name in sorted(topics) for p in _paragraphs(topics[name]))
    passages, current = [], ""
    for paragraph in paragraphs:
        current += paragraph + "\n"
        if len(current) >= PASSAGE:
            passages.append(current)
            current = ""
    return [{"text": p} for i, p in enumerate(passages) if (i % 10 == TEST_TENTH) == (split == "test")]


def _paragraphs(text: str) -> list[str]:
    """Paragraphs as running text: the manual's underlines, hard line breaks and indentation are layout."""
    text = re.sub(r"\n[*=~^\-\" ]{3,}\n", "\n", text)
    found = (re.sub(r"\s+", " ", p).strip() for p in re.split(r"\n\s*\n", text))
    return [p for p in found if p]
