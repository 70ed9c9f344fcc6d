"""A sample that cannot be used: named, left out and counted, while all others keep their index, their order and their mask.

An indexable source raises a `BadSample` where it is drawn; one that is iterated over yields it in the sample's place, for a
generator that raises is over. Where a sample is drawn (`attempt`), any other exception becomes one too.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, SupportsIndex

from components.files import Unreachable, in_one_line

MACHINE = {errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ESTALE}
"""Errors that say nothing about a sample: too many files are open, a disk or a share is gone."""


class BadSample(ValueError):
    """name: what the user can look up (a file, a file and its line, a source and an index); why: what is wrong, in short"""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name, why)  # both are arguments, so that it survives being pickled
        self.name: str = name
        self.why: str = why

    def __str__(self) -> str:
        return in_one_line(f"{self.name}: {self.why}")  # whatever a file is called


class Refused(ValueError):
    """A sample that ends the run: a setting says so, which is named, or the machine is at fault. `attempt` adds its name, and a
    command that it ends says it in one line."""


OnCorrupt = Literal["skip", "refuse"]
"""What a source does with a sample that cannot be used: it leaves it out, or ends the run by its name."""


def checked_policy(on_corrupt: str) -> OnCorrupt:
    """Raises ValueError for what is neither."""
    if on_corrupt == "skip" or on_corrupt == "refuse":
        return on_corrupt
    raise ValueError(f"on_corrupt {on_corrupt!r} is not one of skip, refuse")


def refused(bad: BadSample, what: str = "sample") -> Refused:
    """The error that a bad sample is where it may not be left out."""
    return Refused(f"corrupt {what} {bad} (on_corrupt: skip leaves such {what}s out)")


@dataclass(frozen=True)
class Note:
    """What is told of a sample: it was left out, or `cut` to fit and trained all the same."""

    name: str
    why: str
    cut: bool = False
    stream: str = ""


@dataclass(frozen=True)
class Noted:
    """A sample, and what is told of it or of those that were left out before it."""

    sample: Any
    notes: Sequence[Note]


def attempt(draw: Callable[[], Any], prepare: Callable[[Any], Any], name: str) -> Any:
    """What `prepare` makes of the sample that `draw` gives, or a BadSample in its place: no sample ends a run by an exception.

    name: of the sample, where nothing else gives it one

    Raises Refused, with the sample's name, where `prepare` does or the machine is at fault and not the sample.
    """
    sample = _tried(draw, name)
    if isinstance(sample, BadSample):
        return BadSample(sample.name or name, sample.why)
    made = _tried(lambda: prepare(sample), name)
    if isinstance(made, BadSample):
        return BadSample(name, made.why)  # a tokenizer does not know what it is given
    if isinstance(made, Noted):
        return Noted(made.sample, [replace(note, name=note.name or name) for note in made.notes])
    return made


def _tried(make: Callable[[], Any], name: str) -> Any:
    """What it makes, or what was wrong, to be said anew: an exception that was raised holds on to all that it was raised in."""
    try:
        return make()
    except Refused as error:
        raise Refused(f"{name}: {error}") from error
    except BadSample as error:
        return error
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except SystemExit as error:  # it would end the thread that makes batches, and the run would wait for ever
        raise Refused(f"{name}: {reason(error)}") from error
    except BaseException as error:  # a decoder's, a tokenizer's (a panic in Rust is no Exception), the user's own source's
        if isinstance(error, Unreachable):
            raise Refused(in_one_line(error)) from error
        if isinstance(error, OSError) and error.errno in MACHINE:
            raise Refused(f"{name}: {reason(error)}") from error
        return BadSample(name, reason(error))


def reason(error: BaseException) -> str:
    """An exception in one line; its type is said where that is not the plain one of a wrong value."""
    said = in_one_line(error)
    return said if said and type(error) is ValueError else f"{type(error).__name__}: {said}".removesuffix(": ")


def name_of(source: Any, index: int) -> str:
    """What a source calls its sample (`source.name_of(index)`), else its index: also where it cannot say that."""
    try:
        return str(source.name_of(index)) if hasattr(source, "name_of") else f"sample {index}"
    except Exception:  # the user's own: a name alone ends no run
        return f"sample {index}"


def as_it_is(sample: Any) -> Any:
    """Prepares nothing."""
    return sample


def drawn(source: Any, order: Iterable[SupportsIndex] | None = None) -> Iterator[Any]:
    """The samples of a source, each bad one as its `BadSample`; in its own order, or at these indices."""
    if not hasattr(source, "__len__"):
        yield from source
        return
    for index in range(len(source)) if order is None else order:
        yield attempt(lambda i=int(index): source[i], as_it_is, name_of(source, int(index)))


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
