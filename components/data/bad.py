"""A sample that cannot be used: named, left out and counted, while all others keep their index, their order and their mask.

An indexable source raises a `BadSample` where it is drawn; one that is iterated over yields it in the sample's place, for a
generator that raises is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, SupportsIndex


class BadSample(ValueError):
    """name: what the user can look up (a file, a file and its line, a source and an index); why: what is wrong, in short"""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name, why)  # both are arguments, so that it survives being pickled
        self.name, self.why = name, why

    def __str__(self) -> str:
        return " ".join(f"{self.name}: {self.why}".split())  # one line, whatever a file is called


def drawn(source: Any, order: Iterable[SupportsIndex] | None = None) -> Iterator[Any]:
    """The samples of a source, each bad one as its `BadSample`; in its own order, or at these indices."""
    if not hasattr(source, "__len__"):
        yield from source
        return
    for index in range(len(source)) if order is None else order:
        try:
            sample = source[int(index)]
        except BadSample as bad:
            sample = bad
        yield sample


def usable(source: Any, order: Iterable[SupportsIndex] | None = None) -> Iterator[Any]:
    """The samples of a source that can be used; how many were left out on the way is printed at the end."""
    left_out: list[BadSample] = []
    try:
        for sample in drawn(source, order):
            if isinstance(sample, BadSample):
                left_out.append(sample)
            else:
                yield sample
    finally:
        if left_out:
            print(f"left out {len(left_out)} bad samples, the first is {left_out[0]}")
