"""A sequence of samples, each read when it is drawn: by its index, or a list of them by a slice."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

from components.data.bad import BadSample, OnCorrupt, refused

T = TypeVar("T")


class Indexed(Sequence[Any], Generic[T]):  # not Sequence[T], of which a checker at run time would draw one
    """What a subclass reads, by index. A sample that cannot be used is its BadSample, or Refused where `on_corrupt` says so.

    called: what is refused, in a word
    """

    on_corrupt: OnCorrupt = "skip"
    called: str = "sample"

    @abstractmethod
    def read(self, index: int, /) -> T:
        """The sample at an index. Raises BadSample, and IndexError behind the last."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        """Raises BadSample, or Refused."""
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        try:
            return self.read(index)
        except BadSample as bad:
            if self.on_corrupt == "refuse":
                raise refused(bad, self.called) from bad
            raise

    def __iter__(self) -> Iterator[T]:
        return map(self.__getitem__, range(len(self)))
