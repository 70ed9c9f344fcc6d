"""Samples held out of a source that comes in one piece: which ones depends on their names alone.

So the two parts are the same at every start, on every machine and in whatever order files are found, and a file that is added
moves at most a few others. All samples of one name (captions of one image) are on one side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

Split = Literal["train", "validation"]


def part(names: Sequence[str], split: Split | None, held_out: float) -> list[int]:
    """The places of a split's samples among these names; None is all of them.

    held_out: share of the names that are for validation, at least one

    Raises ValueError for a split that is none, a share outside (0, 1), and where one name is all there is.
    """
    if split is None:
        return [*range(len(names))]
    if split not in ("train", "validation"):
        raise ValueError(f"split {split!r} is not one of train, validation, null")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be a share between 0 and 1, got {held_out}")
    distinct = sorted(set(names), key=_drawn)
    if len(distinct) < 2:
        raise ValueError("one sample alone cannot be split into train and validation")
    validation = set(distinct[: min(max(1, round(held_out * len(distinct))), len(distinct) - 1)])
    return [i for i, name in enumerate(names) if (name in validation) == (split == "validation")]


def _drawn(name: str) -> bytes:
    """A number of a name, as good as drawn."""
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
