"""Samples without end, each prepared when it is drawn: of an indexable source by their place, of a stream one after the other.

Placed(prepared, order)             place -> sample; one that cannot be used is replaced by the next of its lane
Draws(prepared, order, lanes, lane) the samples of one lane, as a node
Streamed(dataset, ...)              a source that is only iterated over, block by block, as a node
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from components.data.bad import BadSample, Note, Noted, as_it_is, attempt, name_of, reason
from components.data.draws.order import Order
from components.data.nodes import Node
from components.noise import sample_rng
from components.places import of_network, retried

AT_ONCE = 8
"""Samples that are handed to a worker together: fewer would be talk, more would come late."""

PATIENCE = 1000
"""So many samples that cannot be used, one after the other, end the run: there may be no other."""


class Prepared:
    """The samples of an indexable source, each as `prepare` makes it when it is asked for, or its `BadSample`.

    prepare: what is made of a sample when it is drawn
    """

    def __init__(self, samples: Any, prepare: Callable[[Any], Any] = as_it_is) -> None:
        if len(samples) == 0:
            raise ValueError("data: the source has no samples")
        self.samples = samples
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return attempt(lambda: self.samples[index], self.prepare, name_of(self.samples, index))

    def ahead(self, indices: Iterable[int]) -> None:
        """Says which samples will be asked for next; where workers prepare them, they begin."""

    def patience(self, dealt: bool) -> int:
        """Of two epochs in a row one is whole. A lane of several (`dealt`) has samples of each as they fall to it: that the
        only one that can be used is not among so many has a chance of exp(-32)."""
        return min((32 if dealt else 2) * len(self), PATIENCE)


def hopeless(count: int, first: BadSample) -> ValueError:
    return ValueError(f"{count} samples in a row cannot be used; the first is {first}")


class Placed:
    """The sample at a place of an order. Nothing is kept from one place to the next.

    One that cannot be used is replaced by the next of its lane that can, and told of (`Noted`); that one comes at its own place
    all the same, and its own place alone tells of a bad one.

    lanes: places between a sample and the next of its lane, where an order deals them to lanes
    """

    def __init__(self, prepared: Prepared, order: Order, lanes: int | None = None) -> None:
        self.prepared = prepared
        self.order = order
        self.lanes = lanes

    def __call__(self, place: int) -> Any:
        """Raises ValueError where so many in a row are bad that there may be no other."""
        first, patience = None, self.prepared.patience(self.lanes is not None)
        for k in range(patience):
            item = self.prepared[self.order(place + k * (self.lanes or 1))]
            if not isinstance(item, BadSample):
                return item if first is None else with_notes(item, [Note(first.name, first.why)])
            first = first or item
        assert first is not None  # patience is at least 2
        raise hopeless(patience, first)

    def ahead(self, places: Iterable[int]) -> None:
        """Says which places come next."""
        self.prepared.ahead(map(self.order, places))


def with_notes(item: Any, notes: Sequence[Note]) -> Any:
    """A sample, and what is told before what is told of it."""
    if not notes:
        return item
    return Noted(item.sample, [*notes, *item.notes]) if isinstance(item, Noted) else Noted(item, notes)


class Source(Node[Any]):
    """What nodes of samples share: a bad one is yielded as a `BadSample`, which a node behind it leaves out.

    Raises ValueError where so many in a row are bad that there may be no other.
    """

    patience: int = PATIENCE

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self._bad: list[BadSample] = []  # the first of those in a row, and their number
        self._in_a_row = 0

    def _seen(self, item: Any) -> Any:
        if not isinstance(item, BadSample):
            self._bad, self._in_a_row = [], 0
            return item
        self._bad = self._bad or [item]
        self._in_a_row += 1
        if self._in_a_row >= self.patience:
            raise hopeless(self._in_a_row, self._bad[0])
        return item


class Draws(Source):
    """The samples of a lane in an order: those at places lane, lane + lanes, lane + 2 lanes, ..., without end."""

    def __init__(self, prepared: Prepared, order: Order, lanes: int = 1, lane: int = 0, ahead: int = 8) -> None:
        super().__init__()
        self.prepared = prepared
        self.order = order
        self.lane: int = lane
        self.lanes: int = lanes
        self.lookahead = ahead
        self.patience: int = prepared.patience(lanes > 1)

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.draw: int = (initial_state or {}).get("draw", 0)

    def next(self) -> Any:
        place = self.lane + self.draw * self.lanes
        self.draw += 1
        self.prepared.ahead(self.order(place + k * self.lanes) for k in range(1, self.lookahead + 1))
        return self._seen(self.prepared[self.order(place)])

    def get_state(self) -> dict[str, Any]:
        return {"draw": self.draw}


class Passing(Node[Any]):
    """The samples of a node that can be used; each tells of those before it that cannot (`Noted`)."""

    def __init__(self, source: Node[Any]) -> None:
        super().__init__()
        self.source = source

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.source.reset(initial_state)

    def next(self) -> Any:
        notes = []
        while isinstance(item := next(self.source), BadSample):
            notes.append(Note(item.name, item.why))
        return with_notes(item, notes)

    def get_state(self) -> dict[str, Any]:
        return self.source.state_dict()


class Rows:
    """What a stream gives -> samples as they are prepared, or BadSamples."""

    def __init__(self, dataset: Any, prepare: Callable[[Any], Any]) -> None:
        self.made: Callable[[Any], Any] = getattr(dataset, "made", as_it_is)
        self.prepare = prepare

    def __getitem__(self, row: tuple[Any, str]) -> Any:
        """row: and what it is called, where nothing else says that"""
        return attempt(lambda: self.made(row[0]), self.prepare, row[1])


class Streamed(Source):
    """A Hugging Face `IterableDataset` without end, shuffled block by block.

    A block of samples is read and drawn from in random order. The state is the dataset's before the block and the place
    in it, so a resume goes on at the very next sample (the dataset's own shuffle buffer would be lost). Where the dataset gives
    its rows as they lie there (`rows`), they are decoded when they are drawn (`made`).

    prepare: what is made of a sample when it is drawn
    begin:   rows, each with its name -> the samples that are being prepared (`components.data.draws.workers`); None: by itself
    others:  what to read in place of a dataset that has no samples, the first of them that has some
    """

    def __init__(
        self,
        dataset: Any,
        seed: int,
        block_size: int = 1000,
        prepare: Callable[[Any], Any] = as_it_is,
        begin: Callable[[list[tuple[Any, str]]], Any] | None = None,
        others: Sequence[Callable[[], Any]] = (),
    ) -> None:
        super().__init__()
        self.others = others
        self.rows: Rows = Rows(dataset, prepare)
        self.begin = begin
        self.own: Any = dataset
        self.dataset: Any = dataset
        self.other: int = 0  # 1 is the first of the others
        self.seed = seed
        self.block_size = block_size

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        state = initial_state or {"block": 0, "place": 0, "before": None}
        self.block: int = state["block"]
        self.place: int = state["place"]
        self._before: dict[str, Any] | None = state["before"]
        self._take(state.get("other", 0))
        self.first: int = state.get("first", 0)  # of the block, in its epoch: what a sample is called that has no name
        self._samples: list[Any] = []  # none before the first draw

    def _take(self, other: int) -> None:
        """Reads from here on what it was given, or one of the others."""
        if other != self.other:
            self.other = other
            self.dataset = self.others[other - 1]() if other else self.own

    def _open(self, state: dict[str, Any] | None, first: int) -> None:
        """Goes on from a state of the dataset; None is its beginning, however far it was read before."""
        self._before, self.first = state, first
        self.dataset.load_state_dict(state)
        self._iterator = self.dataset.rows() if hasattr(self.dataset, "rows") else iter(self.dataset)

    def _read(self) -> list[Any]:
        """The next block. A connection that broke is made again, from where the block begins.

        Raises ValueError for whatever else it raises: nothing can be left out, for an iterator that raised is over.
        """
        samples: list[Any] = []
        before = self._before

        def read() -> list[Any]:
            samples.clear()
            samples.extend(itertools.islice(self._iterator, self.block_size))
            return samples

        def again(error: Exception) -> bool:
            if of_network(error):
                self._open(before, self.first)
                return True
            return False

        try:
            return retried("the stream", read, again)
        except Exception as error:
            raise ValueError(f"the stream ended at sample {self.first + len(samples)}: {reason(error)}") from error

    def _read_block(self) -> None:
        samples = self._read()
        if not samples:  # the next epoch
            self._open(None, 0)
            samples = self._read()
        while not samples and self.other < len(self.others):
            self._take(self.other + 1)
            self._open(None, 0)
            samples = self._read()
        if not samples:
            raise ValueError("the streamed dataset has no samples")
        order = sample_rng(self.seed, "order", self.block).permutation(len(samples)).tolist()
        self._samples = [(samples[i], f"sample {self.first + i}") for i in order]
        self._begun: dict[int, Any] = {}

    def next(self) -> Any:
        if not self._samples:
            self._open(self._before, self.first)
            self._read_block()
        if self.place >= len(self._samples):
            self._before, self.first = self.dataset.state_dict(), self.first + len(self._samples)
            self.block, self.place = self.block + 1, 0
            self._read_block()
        self.place += 1
        return self._seen(self._drawn(self.place - 1))

    def _drawn(self, place: int) -> Any:
        """The sample at a place of the block; where others prepare them, the next ones are begun."""
        if self.begin is None:
            return self.rows[self._samples[place]]
        for start in range(place // AT_ONCE * AT_ONCE, min(place + 2 * AT_ONCE, len(self._samples)), AT_ONCE):
            if start not in self._begun:
                self._begun[start] = self.begin(self._samples[start : start + AT_ONCE])
        return self._begun[place // AT_ONCE * AT_ONCE][place % AT_ONCE]

    def get_state(self) -> dict[str, Any]:
        state = {"block": self.block, "place": self.place, "before": self._before, "first": self.first}
        return state | {"other": self.other} if self.other else state
