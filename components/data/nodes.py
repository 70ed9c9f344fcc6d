"""Nodes of the data pipeline, on `torchdata.nodes`: each has a state, so a run resumes at the very next sample.

    Shuffled | Streamed (endless.py)  ->  Packed (text)  ->  Mix  ->  MicroBatches  ->  masker  ->  prefetch

What a node yields is a function of (seed, position) alone: never of a rank, a worker or a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from components.data.bad import BadSample, Note, Noted
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


class Packed(Node[list[TokenSequence] | Noted]):
    """Rows of documents back to back: a document that does not fit goes on in the next row.

    A bad document is passed over, and those behind it move up; the row in which it would have begun tells of it (`Noted`).

    source:   yields the token ids of documents, end token included
    sequence: a span of ids -> its TokenSequence, `overhead` positions longer
    length:   positions of a row; what is left at its end (under `overhead + shortest`) stays empty
    """

    def __init__(
        self,
        source: Node[Any],
        sequence: Callable[[torch.Tensor], TokenSequence],
        length: int,
        overhead: int = 3,
        shortest: int = 8,
    ) -> None:
        super().__init__()
        if length < overhead + shortest:
            raise ValueError(f"data: rows of {length} positions are too short to pack text; at least {overhead + shortest}")
        self.source = source
        self.sequence = sequence
        self.length = length
        self.overhead = overhead
        self.shortest = shortest

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self._notes: list[Note] = []
        self.source.reset(None if initial_state is None else initial_state["before"])
        self._before = self.source.state_dict()
        self._document = torch.zeros(0, dtype=torch.long)
        self.offset: int = 0
        self._resumed: int = 0 if initial_state is None else initial_state["offset"]

    def _load(self) -> None:
        """Opens the next document that can be used, remembering the source's state before it."""
        while True:
            self._before = self.source.state_dict()
            document = next(self.source)
            if not isinstance(document, BadSample):
                break
            self._notes.append(Note(document.name, document.why))
            self._resumed = 0
        self._document, self.offset, self._resumed = document, self._resumed, 0

    def next(self) -> list[TokenSequence] | Noted:
        """The documents of one row, the last one cut where the row ends."""
        row: list[TokenSequence] = []
        room = self.length
        while room >= self.overhead + self.shortest:
            while self.offset >= len(self._document):
                self._load()
            span = self._document[self.offset : self.offset + room - self.overhead]
            row.append(self.sequence(span))
            self.offset += len(span)
            room -= len(span) + self.overhead
        notes, self._notes = self._notes, []
        return Noted(row, notes) if notes else row

    def get_state(self) -> dict[str, Any]:
        return {"before": self._before, "offset": self.offset or self._resumed}


@dataclass(frozen=True)
class Stream:
    """One source in the mix.

    weight: its rows among every sum-of-weights rows of the mix, exactly
    build:  (item of the node, the row's generator) -> the row's sequences: where tasks are chosen and prompts dropped
    length: positions of its rows, or None for those of the longest row of the batch
    pairs:  anti-masking: each of its rows comes twice, with documents of indices 2j and of 2j + 1
    """

    name: str
    node: Node[Any]
    weight: int
    build: Callable[[Any, np.random.Generator], list[TokenSequence]]
    length: int | None = None
    pairs: bool = False


@dataclass(frozen=True)
class Row:
    """A row of the mix: the stream it is from, its sequences and the global sample index of each, and what is told of samples.

    The row of a bad sample has no sequence: it takes its index and its place, and trains nothing.
    """

    stream: str
    sequences: list[TokenSequence]
    indices: list[int]
    notes: list[Note]


class Mix(Node[list[Row]]):
    """Rows of several streams in exact proportion, in an order that is a function of (seed, row).

    Yields one row, or where any stream wants pairs two: the same one twice, or two of a stream that wants none.
    """

    def __init__(self, streams: Sequence[Stream], seed: int) -> None:
        super().__init__()
        if not streams:
            raise ValueError("data: there is no stream to mix")
        for s in streams:
            if not isinstance(s.weight, int) or s.weight < 1:
                raise ValueError(f"data.{s.name}.weight must be a positive integer, got {s.weight!r}")
        self.streams: list[Stream] = list(streams)
        self.seed = seed
        self.copies: int = 1 + any(s.pairs for s in streams)
        divisor = math.gcd(*(s.weight for s in streams))
        self._window = np.repeat(np.arange(len(streams)), [s.weight // divisor for s in streams])

    @property
    def window(self) -> int:
        """Sequences after which the shares are exact: a batch of a multiple of it always has the same make-up."""
        return len(self._window) * self.copies

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        state = initial_state or {}
        self.row: int = state.get("row", 0)
        self.index: int = state.get("index", 0)
        for s in self.streams:
            s.node.reset(state["streams"][s.name] if state else None)

    def next(self) -> list[Row]:
        """The next row of the mix, or two."""
        window, place = divmod(self.row, len(self._window))
        stream = self.streams[sample_rng(self.seed, "mix", window).permutation(self._window)[place]]
        self.row += 1
        together = self.copies if stream.pairs else 1
        return [row for _ in range(self.copies // together) for row in self._draw(stream, together)]

    def _draw(self, stream: Stream, copies: int) -> list[Row]:
        """One row of a stream, `copies` times. Raises ValueError, naming the stream, for a sample that ends the run."""
        try:
            item = next(stream.node)
        except ValueError as error:
            raise ValueError(f"data.{stream.name}: {error}") from error
        sequences, places, notes = [], 1, []
        if isinstance(item, BadSample):
            notes = [Note(item.name, item.why)]
        else:
            sample, notes = (item.sample, item.notes) if isinstance(item, Noted) else (item, [])
            sequences = stream.build(sample, sample_rng(self.seed, "task", self.index))
            places = len(sequences)
        first = -(-self.index // copies) * copies  # 2j, so that 2j + 1 is the other of a pair
        self.index = first + copies * places
        notes = [replace(note, stream=stream.name) for note in notes]
        return [
            Row(stream.name, sequences, [first + copies * k + c for k in range(len(sequences))], notes) for c in range(copies)
        ]

    def get_state(self) -> dict[str, Any]:
        return {"row": self.row, "index": self.index, "streams": {s.name: s.node.state_dict() for s in self.streams}}


class MicroBatches(Node[list[tuple[str, Batch, list[Note]]]]):
    """The next sequences of the mix as micro-batches: each of one stream, at that stream's own length.

    batch_size: tokens of all rows before -> sequences of the next step (so it may change on the way); or one number
    micro_size: rows of a micro-batch at the most, on each rank
    rank, world_size: every rank reads the whole mix and keeps each world_size-th row of every micro-batch
    """

    def __init__(
        self,
        mix: Mix,
        batch_size: int | Callable[[int], int],
        micro_size: int,
        pad_id: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        self.mix = mix
        self.micro_size: int = micro_size * world_size
        self.pad_id = pad_id
        self.batch_size: Callable[[int], int] = batch_size if callable(batch_size) else lambda tokens: batch_size
        self.rank = rank
        self.world_size = world_size
        self._checked(self.batch_size(0))

    def _checked(self, size: int) -> int:
        if size % self.mix.copies:
            raise ValueError(f"the physical batch of {size} must be even: anti-masking makes pairs")
        return size

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        state = initial_state or {"mix": None, "tokens": 0}
        self.tokens: int = state["tokens"]
        self.mix.reset(state["mix"])

    def next(self) -> list[tuple[str, Batch, list[Note]]]:
        """The micro-batches of one optimizer step, stream by stream, each with its stream's name and the notes of its rows.

        The row of a bad sample is one of padding: every rank has as many micro-batches as if all samples were good, and as
        many rows in each.
        """
        size = self._checked(self.batch_size(self.tokens))
        rows, before = self._rows(size), []
        while not any(r.sequences for r in rows):  # nothing to train on: no step
            before += [note for r in rows for note in r.notes]
            rows = self._rows(size)
        self.tokens += sum(len(s) for r in rows for s in r.sequences)
        batches = []
        for stream in self.mix.streams:
            own = [r for r in rows if r.stream == stream.name]
            for part in np.array_split(np.arange(len(own)), math.ceil(len(own) / self.micro_size)) if own else ():
                kept = [own[i] for i in part[self.rank :: self.world_size]]
                if not kept:
                    raise ValueError(
                        f"data.{stream.name}: {len(part)} rows of a micro-batch cannot be shared by {self.world_size} ranks; "
                        "raise batch.physical or the stream's weight"
                    )
                batch = collate([r.sequences for r in kept], [r.indices for r in kept], self.pad_id, stream.length)
                batches.append((stream.name, batch, before + [note for r in kept for note in r.notes]))
                before = []
        return batches

    def _rows(self, size: int) -> list[Row]:
        rows: list[Row] = []
        while len(rows) < size:
            rows += next(self.mix)
        return rows

    def get_state(self) -> dict[str, Any]:
        return {"mix": self.mix.state_dict(), "tokens": self.tokens}
