"""What is asked of a modality beside its codes: a tokenizer answers what it can, and for the rest there is a default.

    num_tokens               length of its canvas, where it is fixed                          else any length
    may_end                  may a canvas end early, with the end token?                      else yes, without num_tokens
    suffix, read, write      its files: ".png", path -> raw, (raw, path) -> None              else words, as they are typed
    draw(raw)                how it looks: a picture                                          else it is not looked at
    play(raw)                how it sounds: (waveform in [-1, 1], samples a second)           else it is not heard
    partial(codes, known)    a half-made canvas as a picture                                  else its codes, a column a frame
    region(raw, where)       a part of it, to be generated anew                               else it cannot be edited

Nothing here knows a modality by its name.
"""

from __future__ import annotations

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
        """The part that `where` names. Raises ValueError where it names none: what it may be."""


def fixed_length(tokenizer: Tokenizer) -> int | None:
    """Tokens of every sample, where all have as many."""
    return getattr(tokenizer, "num_tokens", None)


def may_end(tokenizer: Tokenizer) -> bool:
    """Whether a canvas may end early: then it is filled up with the end token."""
    return bool(getattr(tokenizer, "may_end", fixed_length(tokenizer) is None))


def suffix(tokenizer: Tokenizer) -> str | None:
    """Of its files; None where a sample is words."""
    return tokenizer.suffix if isinstance(tokenizer, Filed) else None


def partial(tokenizer: Tokenizer, codes: Int[Tensor, " n"], known: Bool[Tensor, " n"]) -> Image.Image:
    """A half-made canvas: as the tokenizer draws it, else a column for each frame and a row for each codebook, grey by code.

    codes: arbitrary where they are not known
    """
    if hasattr(tokenizer, "partial"):
        return tokenizer.partial(codes, known)
    books = torch.tensor(tokenizer.codebooks)
    rows, frames = len(books), -(-len(codes) // len(books))
    grid = torch.full((frames * rows, 3), 255)
    grey = 20 + 200 * codes // books[torch.arange(len(codes)) % rows]
    grid[: len(codes)] = torch.where(known[:, None], grey[:, None], torch.tensor(MASKED))
    return Image.fromarray(grid.view(frames, rows, 3).transpose(0, 1).numpy().astype(np.uint8))
