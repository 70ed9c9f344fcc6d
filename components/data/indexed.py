"""Samples that are read when they are drawn: by their index, or one after the other; those of another dataset among them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

from components.data.bad import BadSample, OnCorrupt, Refused, name_of, refused
from components.files import in_one_line

T = TypeVar("T")


class Indexed(Sequence[Any], Generic[T]):  # not Sequence[T], of which a checker at run time would draw one
    """What a subclass reads, by index; a slice is a list. A sample that cannot be used is its BadSample, or Refused where
    `on_corrupt` says so.

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


class Mapped(Indexed[dict[str, Any]]):
    """An indexable dataset with a function (row, name of the row) -> sample applied when one is drawn.

    name:  of the dataset, for what is said about a row
    count: only the first so many rows; None is all
    """

    def __init__(
        self,
        dataset: Any,
        convert: Callable[[Any, str], dict[str, Any]],
        name: str,
        on_corrupt: OnCorrupt = "skip",
        count: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.convert = convert
        self.name = name
        self.on_corrupt: OnCorrupt = on_corrupt
        self._length = len(dataset) if count is None else min(count, len(dataset))

    def __len__(self) -> int:
        return self._length

    def name_of(self, index: int) -> str:
        return name_of(self.dataset, index) if hasattr(self.dataset, "name_of") else f"{self.name}, sample {index}"

    def read(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name}: sample {index} of {len(self)}")
        index %= len(self)
        return self.convert(self.dataset[index], self.name_of(index))


class Iterated:
    """The same of a dataset that is only iterated over, with its state; a row that cannot be used comes as its `BadSample`."""

    def __init__(
        self,
        dataset: Any,
        convert: Callable[[Any, str], dict[str, Any]],
        name: str,
        on_corrupt: OnCorrupt = "skip",
        count: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.convert = convert
        self.name = name
        self.on_corrupt: OnCorrupt = on_corrupt
        self.count = count
        self._begun = self._row = 0

    def rows(self) -> Iterator[tuple[Any, str]]:
        """The rows as they lie there, and what each is called. Raises Refused where the dataset cannot be read on."""
        self._row, rows = self._begun, iter(self.dataset)
        while self.count is None or self._row < self.count:
            name = f"{self.name}, sample {self._row}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # of a reader of many formats: its generator is over
                raise Refused(f"{name} and what follows cannot be read: {in_one_line(error)}") from error
            self._row += 1
            yield row, name

    def made(self, row: tuple[Any, str]) -> dict[str, Any] | BadSample:
        """The sample of a row. Raises Refused for a bad one."""
        try:
            sample = row[0] if isinstance(row[0], BadSample) else self.convert(*row)
        except BadSample as bad:
            sample = bad
        if isinstance(sample, BadSample) and self.on_corrupt == "refuse":
            raise refused(sample)
        return sample

    def __iter__(self) -> Iterator[dict[str, Any] | BadSample]:
        """Raises Refused where a bad row is, or the dataset cannot be read on."""
        return map(self.made, self.rows())

    @property
    def num_shards(self) -> int:
        """Into how many parts it can be cut, each read without the others."""
        return getattr(self.dataset, "num_shards", 1) if self.count is None else 1

    def shard(self, num_shards: int, index: int) -> Iterated:
        """One of so many parts."""
        own = self.dataset.shard(num_shards=num_shards, index=index)
        return Iterated(own, self.convert, f"{self.name}, part {index} of {num_shards}", self.on_corrupt)

    def state_dict(self) -> dict[str, Any]:
        return {"row": self._row, "dataset": self.dataset.state_dict()}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """None is the beginning."""
        self._begun = self._row = 0 if state is None else state["row"]
        self.dataset.load_state_dict(None if state is None else state["dataset"])
