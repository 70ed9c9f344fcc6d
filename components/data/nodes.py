"""Nodes of the data pipeline, on `torchdata.nodes`: each has a state, so a run resumes at the very next sample.

    Placed | Draws | Streamed (endless.py)  ->  Packed (packing.py)  ->  MicroBatches  ->  masker  ->  prefetch

Rows are planned, then made: which rows of which stream are in a step is a closed form of the mix, and a rank makes its own
alone. What a row holds is a function of (seed, stream, row): never of a rank, a worker or a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from components.data.bad import Note, Noted, Refused
from components.noise import sample_rng
from components.sequences import TokenSequence, collate
from components.types import Batch

T_co = TypeVar("T_co", covariant=True)

if TYPE_CHECKING:  # torchdata says none of this to a type checker, for which a node of its own would yield anything

    class Node(Iterator[T_co]):
        """A node is an iterator with a state. A subclass has `reset`, `next` and `get_state`; who uses it calls `reset`, the
        built-in next() and `state_dict`."""

        def reset(self, initial_state: dict[str, Any] | None = None) -> None: ...
        def next(self) -> T_co: ...
        def get_state(self) -> dict[str, Any]: ...
        def state_dict(self) -> dict[str, Any]: ...
        def __next__(self) -> T_co: ...

else:
    from torchdata.nodes import BaseNode

    Node = BaseNode

IN_A_ROW = 40
"""Bits of a noise index that count the rows of a stream; above them stands a document's place in its row."""


@dataclass(frozen=True)
class Lanes:
    """Rows that come one after the other: row r is the next of lane r mod `lanes`. A rank opens its own lanes alone.

    The number belongs to the settings of a run, and not to the machines that it happens to have: a lane's rows are the same
    whoever makes them. Lanes change hands where a run goes on with another number of ranks.

    open: lane -> its rows without end; items that cannot be used are passed over
    """

    lanes: int
    open: Callable[[int], Node[Any]]


@dataclass(frozen=True)
class Stream:
    """One source in the mix.

    rows:   row -> its item (`Placed`), or the lanes that rows come from; where it has `lanes`, those are dealt to ranks
    weight: its rows among every sum-of-weights rows of the mix, exactly
    build:  (item, the row's generator) -> the row's sequences: where tasks are chosen and prompts dropped
    length: positions of its rows, or None for those of the longest row of the batch
    pairs:  anti-masking: each of its rows comes twice, with documents of indices 2j and of 2j + 1
    seed:   of the tasks of its rows
    positions: of a row, on the average
    """

    name: str
    rows: Callable[[int], Any] | Lanes
    weight: int
    build: Callable[[Any, np.random.Generator], list[TokenSequence]]
    length: int | None = None
    pairs: bool = False
    seed: int = 0
    positions: float = 0.0

    @property
    def lanes(self) -> int | None:
        """How many lanes its rows are of; None where every row stands alone."""
        return getattr(self.rows, "lanes", None)

    def own(self, rows: range, rank: int, world_size: int) -> list[int]:
        """Those of these consecutive rows that a rank makes: of every world_size-th lane."""
        count = self.lanes or world_size
        lanes = range(rank, count, world_size)
        return sorted(r for lane in lanes for r in range(rows.start + (lane - rows.start) % count, rows.stop, count))

    def most(self, rows: range, world_size: int) -> int:
        """Of these consecutive rows, as many as the rank makes that makes most."""
        count = self.lanes or world_size
        lanes = np.arange(count)
        each, more = divmod(len(rows), count)
        return int(np.bincount(lanes % world_size, each + ((lanes - rows.start) % count < more), minlength=world_size).max())


@dataclass(frozen=True)
class Row:
    """A row of a batch: its sequences, the noise index of each, and what is told. Without sequences it is padding."""

    sequences: list[TokenSequence] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


class Mix:
    """Rows of several streams in exact proportion, in an order that is a function of (seed, row of the mix).

    Where any stream wants pairs, each row of the mix is two of the batch: the same one twice, or two of a stream that wants
    none.
    """

    def __init__(self, streams: Sequence[Stream], seed: int) -> None:
        if not streams:
            raise ValueError("data: there is no stream to mix")
        for s in streams:
            if not isinstance(s.weight, int) or s.weight < 1:
                raise ValueError(f"data.{s.name}.weight must be a positive integer, got {s.weight!r}")
        self.streams: list[Stream] = list(streams)
        self.seed = seed
        self.copies: int = 1 + any(s.pairs for s in streams)
        divisor = math.gcd(*(s.weight for s in streams))
        self._weights = [s.weight // divisor for s in streams]
        self._window = np.repeat(np.arange(len(streams)), self._weights)

    @property
    def window(self) -> int:
        """Sequences after which the shares are exact: a batch of a multiple of it always has the same make-up."""
        return len(self._window) * self.copies

    def before(self, row: int) -> list[int]:
        """Rows of each stream among the first `row` of the mix (a pair counts once, as it does in the mix)."""
        window, place = divmod(row, len(self._window))
        begun = sample_rng(self.seed, "mix", window).permutation(self._window)[:place]
        own = np.bincount(begun, minlength=len(self.streams)).tolist()
        return [
            (window * weight + more) * (1 if s.pairs else self.copies)
            for s, weight, more in zip(self.streams, self._weights, own, strict=True)
        ]

    def between(self, first: int, last: int) -> list[range]:
        """The rows of each stream that rows first to last - 1 of the mix are of."""
        return [range(a, b) for a, b in zip(self.before(first), self.before(last), strict=True)]


class MicroBatches(Node[list[tuple[str, Batch, list[Note]]]]):
    """The next sequences of the mix as micro-batches: each of one stream, at that stream's own length.

    batch_size: rows of the batch before -> sequences of the next step (so it may change on the way); or one number
    micro_size: rows of a micro-batch at the most, on each rank
    ahead:      steps whose samples are announced to workers, if there are any
    rank, world_size: a rank makes its own rows. It may have fewer than another, or none, and then has rows of padding: every
                rank has as many micro-batches, and as many rows in each

    Its state has the lanes of this rank; those of all ranks together (`gathered`) are the state of the whole.
    """

    def __init__(
        self,
        mix: Mix,
        batch_size: int | Callable[[int], int],
        micro_size: int,
        pad_id: int,
        rank: int = 0,
        world_size: int = 1,
        ahead: int = 1,
    ) -> None:
        super().__init__()
        self.mix = mix
        self.micro_size = micro_size
        self.pad_id = pad_id
        self.batch_size: Callable[[int], int] = batch_size if callable(batch_size) else lambda rows: batch_size
        self.rank = rank
        self.world_size = world_size
        self.ahead = ahead
        self._checked(self.batch_size(0))
        for s in mix.streams:
            if s.lanes is not None and s.lanes < world_size:
                raise ValueError(
                    f"data.{s.name} has {s.lanes} lanes, fewer than the {world_size} processes that share them: take fewer "
                    "processes, or, in a run that has not begun, more `lanes`, and of a stream as many files (`num_shards`)"
                )

    def _checked(self, size: int) -> int:
        if size % self.mix.copies:
            raise ValueError(f"the physical batch of {size} must be even: anti-masking makes pairs")
        return size

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Raises Refused for the state of a stream that was in another number of lanes: row r then means another row."""
        super().reset(initial_state)
        state = initial_state or {"row": 0, "lanes": {}}
        for s in self.mix.streams:
            if (before := state.get("dealt", {}).get(s.name, s.lanes)) != s.lanes:
                raise Refused(
                    f"data.{s.name} is in {s.lanes or 'no'} lanes, and was in {before} when it was saved: files have come "
                    "or gone; put them back, or begin another run"
                )
        self.row: int = state["row"]
        self.lanes: dict[str, dict[int, Node[Any]]] = {s.name: {} for s in self.mix.streams if isinstance(s.rows, Lanes)}
        self._saved = {name: state["lanes"].get(name, {}) for name in self.lanes}

    def next(self) -> list[tuple[str, Batch, list[Note]]]:
        """The micro-batches of one optimizer step, stream by stream, each with its stream's name and the notes of its rows.

        Raises ValueError, naming the stream, for a sample that ends the run.
        """
        last = self.row + self._checked(self.batch_size(self.row * self.mix.copies)) // self.mix.copies
        planned = self.mix.between(self.row, last)
        self._announce(last + (last - self.row) * self.ahead)
        self.row = last
        batches = []
        for stream, rows in zip(self.mix.streams, planned, strict=True):
            own = [row for r in stream.own(rows, self.rank, self.world_size) for row in self._made(stream, r)]
            slots = stream.most(rows, self.world_size) * (1 + stream.pairs)
            own += [Row()] * (slots - len(own))
            for part in np.array_split(np.arange(slots), math.ceil(slots / self.micro_size)) if slots else ():
                kept = [own[i] for i in part]
                batch = collate([r.sequences for r in kept], [r.indices for r in kept], self.pad_id, stream.length)
                batches.append((stream.name, batch, [note for r in kept for note in r.notes]))
        return batches

    def _announce(self, until: int) -> None:
        """Says which rows come up to a row of the mix, to those whose samples may be prepared meanwhile."""
        for stream, rows in zip(self.mix.streams, self.mix.between(self.row, until), strict=True):
            if announce := getattr(stream.rows, "ahead", None):
                try:
                    announce(stream.own(rows, self.rank, self.world_size))
                except ValueError as error:  # whoever prepares them has ended
                    raise ValueError(f"data.{stream.name}: {error}") from error

    def _made(self, stream: Stream, row: int) -> list[Row]:
        """A row of a stream; of one that wants pairs, twice."""
        try:
            item = next(self._lane(stream, stream.rows, row)) if isinstance(stream.rows, Lanes) else stream.rows(row)
        except ValueError as error:
            raise ValueError(f"data.{stream.name}: {error}") from error
        sample, notes = (item.sample, list(item.notes)) if isinstance(item, Noted) else (item, [])
        sequences = stream.build(sample, sample_rng(stream.seed, "task", row))
        notes = [replace(note, stream=stream.name) for note in notes]
        copies = 1 + stream.pairs
        return [
            Row(sequences, [(place << IN_A_ROW | row) * copies + c for place in range(len(sequences))], notes)
            for c in range(copies)
        ]

    def _lane(self, stream: Stream, lanes: Lanes, row: int) -> Node[Any]:
        """The lane that a row is the next of, opened where it was left."""
        opened, lane = self.lanes[stream.name], row % lanes.lanes
        if lane not in opened:
            opened[lane] = lanes.open(lane)
            opened[lane].reset(self._saved[stream.name].get(str(lane)))
        return opened[lane]

    def get_state(self) -> dict[str, Any]:
        lanes = {}
        for name, opened in self.lanes.items():
            own = {lane: state for lane, state in self._saved[name].items() if int(lane) % self.world_size == self.rank}
            lanes[name] = own | {str(lane): node.state_dict() for lane, node in opened.items()}
        return {"row": self.row, "lanes": lanes, "dealt": {s.name: s.lanes for s in self.mix.streams if s.lanes}}


def gathered(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of the whole, from those of all ranks after one step: each has the lanes of its own."""
    lanes: dict[str, dict[str, Any]] = {}
    for state in states:
        for name, own in state["lanes"].items():
            lanes.setdefault(name, {}).update(own)
    return {**states[0], "lanes": lanes}
