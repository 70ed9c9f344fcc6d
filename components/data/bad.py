"""A sample that cannot be used: named, left out and counted, while all others keep their index, their order and their mask.

An indexable source raises a `BadSample` where it is drawn; one that is iterated over yields it in the sample's place, for a
generator that raises is over.
"""

from __future__ import annotations


class BadSample(ValueError):
    """name: what the user can look up (a file, a file and its line, a source and an index); why: what is wrong, in short"""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name, why)  # both are arguments, so that it survives being pickled
        self.name, self.why = name, why

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"
