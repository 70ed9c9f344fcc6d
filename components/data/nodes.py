"""Nodes of the data pipeline, on `torchdata.nodes`: each has a state, so a run resumes at the very next sample.

    Shuffled | Streamed  ->  Packed (text)  ->  Mix  ->  MicroBatches  ->  masker  ->  prefetch

What a node yields is a function of (seed, position) alone: never of a rank, a worker or a micro-batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torchdata.nodes import BaseNode

from components.data.bad import BadSample, Note, Noted, as_it_is, attempt, name_of, reason
from components.noise import sample_rng
from components.sequences import TokenSequence, collate
from components.types import Batch


class Source(BaseNode):
    """What `Shuffled` and `Streamed` share: a sample is prepared when it is drawn, and a bad one is yielded as a `BadSample`.

    A node behind it leaves the bad one out, where it would have stood. Raises ValueError where so many in a row are bad that
    there may be no other: 1000, or two epochs.
    """

    patience = 1000

    def __init__(self, prepare: Callable[[Any], Any]) -> None:
        super().__init__()
        self.prepare = prepare

    def reset(self, initial_state: dict | None = None) -> None:
        super().reset(initial_state)
        self._bad: list[BadSample] = []  # the first of those in a row, and their number
        self._in_a_row = 0

    def _drawn(self, draw: Callable[[], Any], name: str) -> Any:
        item = attempt(draw, self.prepare, name)
        if not isinstance(item, BadSample):
            self._bad, self._in_a_row = [], 0
            return item
        self._bad = self._bad or [item]
        self._in_a_row += 1
        if self._in_a_row >= self.patience:
            raise ValueError(f"{self._in_a_row} samples in a row cannot be used; the first is {self._bad[0]}")
        return item


class Shuffled(Source):
    """An indexable source without end: epoch after epoch, each in an order of its own.

    prepare: what is made of a sample when it is drawn
    """

    def __init__(self, samples: Sequence[Any], seed: int, prepare: Callable[[Any], Any] = as_it_is) -> None:
        super().__init__(prepare)
        if len(samples) == 0:
            raise ValueError("data: the source has no samples")
        self.samples, self.seed = samples, seed
        self.patience = min(2 * len(samples), self.patience)  # of two epochs in a row one is whole

    def reset(self, initial_state: dict | None = None) -> None:
        super().reset(initial_state)
        self.position = (initial_state or {}).get("position", 0)
        self._epoch = -1

    def next(self) -> Any:
        epoch, place = divmod(self.position, len(self.samples))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = sample_rng(self.seed, "order", epoch).permutation(len(self.samples))
        self.position += 1
        index = int(self._order[place])
        return self._drawn(lambda: self.samples[index], name_of(self.samples, index))

    def get_state(self) -> dict[str, Any]:
        return {"position": self.position}


class Streamed(Source):
    """A Hugging Face `IterableDataset` without end, shuffled block by block.

    A block of samples is read and drawn from in random order. The state is the dataset's before the block and the place
    in it, so a resume goes on at the very next sample (the dataset's own shuffle buffer would be lost).
    """

    def __init__(self, dataset: Any, seed: int, block_size: int = 1000, prepare: Callable[[Any], Any] = as_it_is) -> None:
        super().__init__(prepare)
        self.dataset, self.seed, self.block_size = dataset, seed, block_size

    def reset(self, initial_state: dict | None = None) -> None:
        super().reset(initial_state)
        state = initial_state or {"block": 0, "place": 0, "before": None}
        self.block, self.place, self._before = state["block"], state["place"], state["before"]
        self.first = state.get("first", 0)  # of the block, in its epoch: what a sample is called that has no name
        self._samples: list[Any] | None = None

    def _open(self, state: dict[str, Any] | None, first: int) -> None:
        """Goes on from a state of the dataset; None is its beginning, however far it was read before."""
        self._before, self.first = state, first
        self.dataset.load_state_dict(state)
        self._iterator = iter(self.dataset)

    def _read(self) -> list[Any]:
        samples: list[Any] = []
        try:
            samples.extend(itertools.islice(self._iterator, self.block_size))
        except Exception as error:  # nothing can be left out: an iterator that raised is over
            raise ValueError(f"the stream ended at sample {self.first + len(samples)}: {reason(error)}") from error
        return samples

    def _read_block(self) -> None:
        samples = self._read()
        if not samples:  # the next epoch
            self._open(None, 0)
            samples = self._read()
        if not samples:
            raise ValueError("the streamed dataset has no samples")
        self._order = sample_rng(self.seed, "order", self.block).permutation(len(samples))
        self._samples = samples

    def next(self) -> Any:
        if self._samples is None:
            self._open(self._before, self.first)
            self._read_block()
        if self.place >= len(self._samples):
            self._before, self.first = self.dataset.state_dict(), self.first + len(self._samples)
            self.block, self.place = self.block + 1, 0
            self._read_block()
        index = int(self._order[self.place])
        self.place += 1
        return self._drawn(lambda: self._samples[index], f"sample {self.first + index}")

    def get_state(self) -> dict[str, Any]:
        return {"block": self.block, "place": self.place, "before": self._before, "first": self.first}


class Packed(BaseNode):
    """Rows of documents back to back: a document that does not fit goes on in the next row.

    A bad document is passed over, and those behind it move up; the row in which it would have begun tells of it (`Noted`).

    source:   yields the token ids of documents, end token included
    sequence: a span of ids -> its TokenSequence, `overhead` positions longer
    length:   positions of a row; what is left at its end (under `overhead + shortest`) stays empty
    """

    def __init__(
        self,
        source: BaseNode,
        sequence: Callable[[torch.Tensor], TokenSequence],
        length: int,
        overhead: int = 3,
        shortest: int = 8,
    ) -> None:
        super().__init__()
        if length < overhead + shortest:
            raise ValueError(f"data: rows of {length} positions are too short to pack text; at least {overhead + shortest}")
        self.source, self.sequence = source, sequence
        self.length, self.overhead, self.shortest = length, overhead, shortest

    def reset(self, initial_state: dict | None = None) -> None:
        super().reset(initial_state)
        self._notes: list[Note] = []
        self.source.reset(None if initial_state is None else initial_state["before"])
        self._before = self.source.state_dict()
        self._document = torch.zeros(0, dtype=torch.long)
        self.offset, self._resumed = 0, 0 if initial_state is None else initial_state["offset"]

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
    node: BaseNode
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


class Mix(BaseNode):
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
        self.streams, self.seed, self.copies = list(streams), seed, 1 + any(s.pairs for s in streams)
        divisor = math.gcd(*(s.weight for s in streams))
        self._window = np.repeat(np.arange(len(streams)), [s.weight // divisor for s in streams])

    @property
    def window(self) -> int:
        """Sequences after which the shares are exact: a batch of a multiple of it always has the same make-up."""
        return len(self._window) * self.copies

    def reset(self, initial_state: dict | None = None) -> None:
        super().reset(initial_state)
        state = initial_state or {}
        self.row, self.index = state.get("row", 0), state.get("index", 0)
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


class MicroBatches(BaseNode):
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
        self.mix, self.micro_size, self.pad_id = mix, micro_size * world_size, pad_id
        self.batch_size = batch_size if callable(batch_size) else lambda tokens: batch_size
        self.rank, self.world_size = rank, world_size
        self._checked(self.batch_size(0))

    def _checked(self, size: int) -> int:
        if size % self.mix.copies:
            raise ValueError(f"the physical batch of {size} must be even: anti-masking makes pairs")
        return size

    def reset(self, initial_state: dict | None = None) -> None:
        super().reset(initial_state)
        state = initial_state or {"mix": None, "tokens": 0}
        self.tokens = state["tokens"]
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
