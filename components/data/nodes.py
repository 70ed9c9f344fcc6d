"""Nodes of the data pipeline, on `torchdata.nodes`: each has a state, so a run resumes at the very next sample.

    Shuffled | Streamed  ->  Packed (text)  ->  Mix  ->  MicroBatches  ->  masker  ->  prefetch

What a node yields is a function of (seed, position) alone: never of a rank, a worker or a micro-batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchdata.nodes import BaseNode

from components.noise import sample_rng
from components.sequences import TokenSequence, collate
from components.types import Batch


class Shuffled(BaseNode):
    """An indexable source without end: epoch after epoch, each in an order of its own."""

    def __init__(self, samples: Sequence[Any], seed: int) -> None:
        super().__init__()
        if len(samples) == 0:
            raise ValueError("data: the source has no samples")
        self.samples, self.seed = samples, seed

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
        return self.samples[int(self._order[place])]

    def get_state(self) -> dict[str, Any]:
        return {"position": self.position}


class Streamed(BaseNode):
    """A Hugging Face `IterableDataset` without end, shuffled block by block.

    A block of samples is read and drawn from in random order. The state is the dataset's before the block and the place
    in it, so a resume goes on at the very next sample (the dataset's own shuffle buffer would be lost).
    """

    def __init__(self, dataset: Any, seed: int, block_size: int = 1000) -> None:
        super().__init__()
        self.dataset, self.seed, self.block_size = dataset, seed, block_size

    def reset(self, initial_state: dict | None = None) -> None:
        super().reset(initial_state)
        state = initial_state or {"block": 0, "place": 0, "before": None}
        self._open(state["before"])
        self.block = state["block"] - 1
        self._read_block()
        self.place = state["place"]

    def _open(self, state: dict[str, Any] | None) -> None:
        """Goes on from a state of the dataset; None is its beginning, however far it was read before."""
        self._before = state
        self.dataset.load_state_dict(state)
        self._iterator = iter(self.dataset)

    def _read_block(self) -> None:
        samples = list(itertools.islice(self._iterator, self.block_size))
        if not samples:  # the next epoch
            self._open(None)
            samples = list(itertools.islice(self._iterator, self.block_size))
        if not samples:
            raise ValueError("data: the streamed dataset has no samples")
        self.block += 1
        order = sample_rng(self.seed, "order", self.block).permutation(len(samples))
        self._samples, self.place = [samples[i] for i in order], 0

    def next(self) -> Any:
        if self.place >= len(self._samples):
            self._before = self.dataset.state_dict()
            self._read_block()
        self.place += 1
        return self._samples[self.place - 1]

    def get_state(self) -> dict[str, Any]:
        return {"block": self.block, "place": self.place, "before": self._before}


class Packed(BaseNode):
    """Rows of documents back to back: a document that does not fit goes on in the next row.

    ids:      the token ids of a sample, end token included
    sequence: a span of ids -> its TokenSequence, `overhead` positions longer
    length:   positions of a row; what is left at its end (under `overhead + shortest`) stays empty
    """

    def __init__(
        self,
        source: BaseNode,
        ids: Callable[[Any], torch.Tensor],
        sequence: Callable[[torch.Tensor], TokenSequence],
        length: int,
        overhead: int = 3,
        shortest: int = 8,
    ) -> None:
        super().__init__()
        if length < overhead + shortest:
            raise ValueError(f"data: rows of {length} positions are too short to pack text; at least {overhead + shortest}")
        self.source, self.ids, self.sequence = source, ids, sequence
        self.length, self.overhead, self.shortest = length, overhead, shortest

    def reset(self, initial_state: dict | None = None) -> None:
        super().reset(initial_state)
        if initial_state is None:
            self.source.reset(None)
            self._load()
        else:
            self.source.reset(initial_state["before"])
            self._load()
            self.offset = initial_state["offset"]

    def _load(self) -> None:
        """Opens the next document, remembering the source's state before it."""
        self._before = self.source.state_dict()
        self._document = self.ids(next(self.source))
        self.offset = 0

    def next(self) -> list[TokenSequence]:
        """The documents of one row, the last one cut where the row ends."""
        row: list[TokenSequence] = []
        room = self.length
        while room >= self.overhead + self.shortest:
            if self.offset >= len(self._document):
                self._load()
            span = self._document[self.offset : self.offset + room - self.overhead]
            row.append(self.sequence(span))
            self.offset += len(span)
            room -= len(span) + self.overhead
        return row

    def get_state(self) -> dict[str, Any]:
        return {"before": self._before, "offset": self.offset}


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
    """A row of the mix: the stream it is from, its sequences and the global sample index of each."""

    stream: str
    sequences: list[TokenSequence]
    indices: list[int]


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
        """One row of a stream, `copies` times."""
        sequences = stream.build(next(stream.node), sample_rng(self.seed, "task", self.index))
        first = -(-self.index // copies) * copies  # 2j, so that 2j + 1 is the other of a pair
        self.index = first + copies * len(sequences)
        return [Row(stream.name, sequences, [first + copies * k + c for k in range(len(sequences))]) for c in range(copies)]

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

    def next(self) -> list[tuple[str, Batch]]:
        """The micro-batches of one optimizer step, stream by stream, each with its stream's name."""
        rows: list[Row] = []
        size = self._checked(self.batch_size(self.tokens))
        while len(rows) < size:
            rows += next(self.mix)
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
                batches.append((stream.name, batch))
        return batches

    def get_state(self) -> dict[str, Any]:
        return {"mix": self.mix.state_dict(), "tokens": self.tokens}
