"""What is asked of a modality beside its codes: a tokenizer answers what it can, and for the rest there is a default.

    num_tokens               length of its canvas, where it is fixed                          else any length
    may_end                  may a canvas end early, with the end token?                      else yes, without num_tokens
    suffix, read, write      its files: ".png", path -> raw, (raw, path) -> None              else words, as they are typed
    draw(raw)                how it looks: a picture                                          else it is not looked at
    play(raw)                how it sounds: (waveform in [-1, 1], samples a second)           else it is not heard
    partial(codes, known)    a half-made canvas as a picture                                  else its codes, a column a frame
    region(raw, where)       a part of it ("half": its second half), to be generated anew     else it cannot be edited

Nothing here knows a modality by its name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from components.tokenizers import Tokenizer

MASKED = (120, 170, 215)
"""The colour of what is still masked, in red, green, blue."""
HALF = "half"
"""The second half of a sample: the region that every tokenizer which can be edited knows."""


class Region(NamedTuple):
    """A part of a sample. raw: the sample with it blanked; codes: those to generate anew; open_end: and all that may follow."""

    raw: Any
    codes: Bool[Tensor, " n"]
    open_end: bool = False


@runtime_checkable
class Filed(Protocol):
    """A modality whose samples are files."""

    suffix: str

    def read(self, path: Path) -> Any: ...
    def write(self, raw: Any, path: Path) -> None: ...


@runtime_checkable
class Drawn(Protocol):
    """A modality that is looked at."""

    def draw(self, raw: Any) -> Image.Image: ...


@runtime_checkable
class Played(Protocol):
    """A modality that is heard."""

    def play(self, raw: Any) -> tuple[Float[np.ndarray, " samples"], int]: ...


@runtime_checkable
class Edited(Protocol):
    """A modality of which a part can be generated anew."""

    def region(self, raw: Any, where: str) -> Region:
        """The part that `where` names. Raises ValueError where it names none: what it may be.

        The first line of its own docstring says the same, on a page where it is typed.
        """
        ...


def check_answers(tokenizer: Tokenizer) -> None:
    """Raises ValueError for an answer that is none: no codebooks, a length under 1, a suffix that would lead elsewhere."""
    books: Any = tokenizer.codebooks
    length, may = getattr(tokenizer, "num_tokens", None), getattr(tokenizer, "may_end", True)
    if not isinstance(books, (tuple, list)) or not books or not all(isinstance(b, (int, np.integer)) and b > 0 for b in books):
        raise ValueError(f"codebooks of {_path(tokenizer)} must be a tuple of sizes of at least 1, got {books!r}")
    if length is not None and not (isinstance(length, (int, np.integer)) and length > 0):
        raise ValueError(f"num_tokens of {_path(tokenizer)} must be a whole number of at least 1, got {length!r}")
    if not isinstance(may, bool):
        raise ValueError(f"may_end of {_path(tokenizer)} must be True or False, got {may!r}")
    suffix(tokenizer)


def fixed_length(tokenizer: Tokenizer) -> int | None:
    """Tokens of every sample, where all have as many."""
    return getattr(tokenizer, "num_tokens", None)


def may_end(tokenizer: Tokenizer) -> bool:
    """Whether a canvas may end early: then it is filled up with the end token."""
    return bool(getattr(tokenizer, "may_end", fixed_length(tokenizer) is None))


def suffix(tokenizer: Tokenizer) -> str | None:
    """Of its files; None where a sample is words. Raises ValueError for one whose files cannot be read or written."""
    own: Any = getattr(tokenizer, "suffix", None)
    if own is not None and not (isinstance(own, str) and re.fullmatch(r"(\.\w+)+", own)):
        raise ValueError(f"suffix of {_path(tokenizer)} must be like '.png', got {own!r}")
    if own is not None and not isinstance(tokenizer, Filed):
        lacks = " and ".join(name for name in ("read", "write") if not hasattr(tokenizer, name))
        raise ValueError(f"{_path(tokenizer)} has files (suffix = {own!r}), and lacks {lacks}")
    return own


def is_words(tokenizer: Tokenizer) -> bool:
    """Whether a sample is words: it is in no file, and neither looked at nor heard."""
    return not isinstance(tokenizer, (Filed, Drawn, Played))


def _path(tokenizer: Any) -> str:
    return f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"


def region(tokenizer: Tokenizer, raw: Any, where: str, modality: str) -> Region:
    """The part that `where` names. Raises ValueError where there is none, or the tokenizer (of `modality`) has no region."""
    if not isinstance(tokenizer, Edited):
        raise ValueError(f"{modality} cannot be edited: {_path(tokenizer)} has no region")
    return tokenizer.region(raw, where)


def second_half(tokenizer: Tokenizer, raw: Any) -> Region:
    """The second half of a sample; of one that cannot be edited, that of its frames of codes."""
    if isinstance(tokenizer, Edited):
        return tokenizer.region(raw, HALF)
    codes, books = tokenizer.encode(raw), len(tokenizer.codebooks)
    frame = torch.arange(len(codes)) // books
    return Region(raw, frame >= len(codes) // books // 2, open_end=may_end(tokenizer))


def partial(tokenizer: Tokenizer, codes: Int[Tensor, " n"], known: Bool[Tensor, " n"]) -> Image.Image:
    """A half-made canvas: as the tokenizer draws it, else a column for each frame and two rows for each codebook, grey by code.

    codes: arbitrary where they are not known
    """
    drawn = getattr(tokenizer, "partial", None)
    if drawn is not None:
        return drawn(codes, known)
    books = torch.tensor(tokenizer.codebooks)
    rows, frames = len(books), -(-len(codes) // len(books))
    grid = torch.full((frames * rows, 3), 255)
    grey = 20 + 200 * codes // books[torch.arange(len(codes)) % rows]
    grid[: len(codes)] = torch.where(known[:, None], grey[:, None], torch.tensor(MASKED))
    cells = grid.view(frames, rows, 3).transpose(0, 1).repeat_interleave(2, dim=0)
    return Image.fromarray(cells.numpy().astype(np.uint8))
