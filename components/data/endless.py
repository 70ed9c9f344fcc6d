"""Samples without end, each prepared when it is drawn: an indexable source epoch by epoch, or a stream block by block."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from components.data.bad import BadSample, as_it_is, attempt, name_of, reason
from components.data.nodes import Node
from components.noise import sample_rng


class Source(Node[Any]):
    """What `Shuffled` and `Streamed` share: a sample is prepared when it is drawn, and a bad one is yielded as a `BadSample`.

    A node behind it leaves the bad one out, where it would have stood. Raises ValueError where so many in a row are bad that
    there may be no other: 1000, or two epochs.
    """

    patience: int = 1000

    def __init__(self, prepare: Callable[[Any], Any]) -> None:
        super().__init__()
        self.prepare = prepare

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
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
        self.samples = samples
        self.seed = seed
        self.patience: int = min(2 * len(samples), self.patience)  # of two epochs in a row one is whole

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.position: int = (initial_state or {}).get("position", 0)
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
        self.dataset = dataset
        self.seed = seed
        self.block_size = block_size

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        state = initial_state or {"block": 0, "place": 0, "before": None}
        self.block: int = state["block"]
        self.place: int = state["place"]
        self._before: dict[str, Any] | None = state["before"]
        self.first: int = state.get("first", 0)  # of the block, in its epoch: what a sample is called that has no name
        self._samples: list[Any] = []  # none before the first draw

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
        if not self._samples:
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
