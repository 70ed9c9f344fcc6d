"""Documents back to back: the rows of a lane of running text.

Packed(source, ...)                     in their order: a document that does not fit goes on in the next row
Packed(source, ..., best_fit=128)       so many at a time, each in the row where it leaves the least room, whole if it can be
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from components.data.bad import BadSample, Note, Noted
from components.data.draws.endless import PATIENCE, hopeless
from components.data.nodes import Node
from components.sequences import TokenSequence


@runtime_checkable
class Document(Protocol):
    """The ids of a text, end token included: a tensor, or what reads a span when it is asked for one."""

    def __len__(self) -> int: ...
    def __getitem__(self, span: slice, /) -> Tensor: ...


class Packed(Node[list[TokenSequence] | Noted]):
    """Rows of documents.

    A bad document is passed over, and those behind it move up; the row in which it would have begun tells of it (`Noted`).

    source:   yields documents
    sequence: a span of ids -> its TokenSequence, `overhead` positions longer
    length:   positions of a row; what is left at its end (under `overhead + shortest`) stays empty
    best_fit: documents that are packed together (best-fit decreasing: 2404.10830); 0 is in their order. A resume reads as
              many again
    """

    def __init__(
        self,
        source: Node[Any],
        sequence: Callable[[Tensor], TokenSequence],
        length: int,
        overhead: int = 3,
        shortest: int = 8,
        best_fit: int = 0,
    ) -> None:
        super().__init__()
        if length < overhead + shortest:
            raise ValueError(f"data: rows of {length} positions are too short to pack text; at least {overhead + shortest}")
        self.source = source
        self.sequence = sequence
        self.length = length
        self.overhead = overhead
        self.shortest = shortest
        self.best_fit = best_fit

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        state = initial_state or {}
        self.source.reset(state.get("before"))
        self._notes: list[Note] = []
        self._before = self.source.state_dict()
        self._document: Document = torch.zeros(0, dtype=torch.long)  # none is open
        self._rows: list[list[tuple[Document, int, int]]] = []
        self.offset: int = state.get("offset", 0)  # in the document that is open, or rows of those that are packed together
        self._resumed = bool(state)

    def _load(self) -> Document:
        """The next document that can be used."""
        while isinstance(document := next(self.source), BadSample):
            self._notes.append(Note(document.name, document.why))
        return document

    def next(self) -> list[TokenSequence] | Noted:
        """The documents of one row."""
        row = self._best() if self.best_fit else self._in_order()
        notes, self._notes = self._notes, []
        return Noted(row, notes) if notes else row

    def _in_order(self) -> list[TokenSequence]:
        """The next ones, the last cut where the row ends."""
        row: list[TokenSequence] = []
        room = self.length
        while room >= self.overhead + self.shortest:
            while self._resumed or self.offset >= len(self._document):
                self._open()
            stop = self.offset + room - self.overhead
            span = self._read(self._document, self.offset, stop)
            if span is None:
                self.offset = len(self._document)
                continue
            row.append(self.sequence(span))
            self.offset += len(span)
            room -= len(span) + self.overhead
        return row

    def _open(self) -> None:
        """The next document, with the state of the source before it."""
        offset = self.offset if self._resumed else 0
        while True:
            self._before = self.source.state_dict()
            document = next(self.source)
            if not isinstance(document, BadSample):
                break
            self._notes.append(Note(document.name, document.why))
            offset = 0
        self._document, self.offset, self._resumed = document, offset, False

    def _best(self) -> list[TokenSequence]:
        """The next row of documents that are packed together."""
        row: list[TokenSequence] = []
        while not row:
            while self._resumed or self.offset >= len(self._rows):  # a resume may stand behind the last row of its documents
                self._pack()
            spans = (self._read(*part) for part in self._rows[self.offset])
            row = [self.sequence(span) for span in spans if span is not None]
            self.offset += 1
        return row

    def _pack(self) -> None:
        """The next documents, packed together, with the state of the source before them."""
        offset = self.offset if self._resumed else 0
        self._before = self.source.state_dict()
        self._rows = best_fit([self._load() for _ in range(self.best_fit)], self.length, self.overhead)
        self.offset, self._resumed = offset, False
        if offset:  # what there was to tell of them was told with their first row
            self._notes = []

    def _read(self, document: Document, start: int, stop: int) -> Tensor | None:
        """A span of a document; None, and a note, where it turns out that it cannot be used."""
        try:
            return document[start:stop]
        except BadSample as bad:
            self._notes.append(Note(bad.name, bad.why))
            if len(self._notes) >= PATIENCE:
                raise hopeless(len(self._notes), bad) from bad
            return None

    def get_state(self) -> dict[str, Any]:
        return {"before": self._before, "offset": self.offset}


def best_fit(documents: Sequence[Document], length: int, overhead: int) -> list[list[tuple[Document, int, int]]]:
    """Rows of (document, start, stop), each of at most `length` positions: longest first, where the least room is left.

    A document longer than a row fills rows of its own, and its rest is placed as others are. Rows come in the order of the
    first document in them.
    """
    room = length - overhead
    parts = [
        (d, start, min(start + room, len(documents[d])))
        for d in range(len(documents))
        for start in range(0, len(documents[d]), room)
    ]
    rows: list[list[tuple[int, int, int]]] = []
    left: list[tuple[int, int]] = []  # (room of a row, the row), sorted
    for part in sorted(parts, key=lambda p: (p[1] - p[2], p)):
        size = part[2] - part[1] + overhead
        place = bisect_left(left, (size, -1))
        if place == len(left):
            rows.append([])
            insort(left, (length, len(rows) - 1))
            place = bisect_left(left, (size, -1))
        free, row = left.pop(place)
        rows[row].append(part)
        insort(left, (free - size, row))
    return [[(documents[d], start, stop) for d, start, stop in sorted(row)] for row in sorted(map(sorted, rows))]
