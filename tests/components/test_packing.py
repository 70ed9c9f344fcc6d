"""Rows of running text: in order, or best-fit."""

import json

import numpy as np
import pytest
import torch

from components.data.bad import BadSample, Noted
from components.data.draws.endless import Draws, Prepared
from components.data.draws.order import WholeOrder
from components.data.packing import Packed, best_fit
from components.sequences import task_sequence

LENGTH, OVERHEAD = 64, 3


def node(vocabulary, documents, **more):
    source = Draws(Prepared(documents), WholeOrder(len(documents), 0))
    return Packed(source, lambda ids: task_sequence(vocabulary, "text", {"text": ids}, {}), LENGTH, OVERHEAD, **more)


def documents(count, seed=0, mean=3.0):
    """Of lognormal lengths, some longer than several rows; each begins with a number of its own, in digits of base 7."""
    rng = np.random.default_rng(seed)
    lengths = np.maximum(rng.lognormal(mean, 1.0, count).astype(int), 6)
    numbers = [torch.tensor([i // 7**k % 7 for k in range(4)]) for i in range(count)]
    return [torch.cat([n, torch.from_numpy(rng.integers(0, 7, m - 4))]) for n, m in zip(numbers, lengths, strict=True)]


def rows(packed, count):
    return [row.sample if isinstance(row, Noted) else row for row in (next(packed) for _ in range(count))]


def slow(lengths, room_of_row, overhead):
    """Best-fit decreasing as one would write it down: rows as lists of (document, start, stop)."""
    room = room_of_row - overhead
    parts = [(d, s, min(s + room, n)) for d, n in enumerate(lengths) for s in range(0, n, room)]
    made = []
    for part in sorted(parts, key=lambda p: (-(p[2] - p[1]), p)):
        size = part[2] - part[1] + overhead
        fits = [(room_of_row - sum(b - a + overhead for _, a, b in row) - size, k) for k, row in enumerate(made)]
        fits = [fit for fit in fits if fit[0] >= 0]
        if fits:
            made[min(fits)[1]].append(part)
        else:
            made.append([part])
    return sorted(sorted(row) for row in made)


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_is_best_fit_decreasing(seed):
    lengths = [len(d) for d in documents(80, seed)]
    found = best_fit([torch.full((n,), i) for i, n in enumerate(lengths)], LENGTH, OVERHEAD)
    assert [[(int(d[0]), a, b) for d, a, b in row] for row in found] == slow(lengths, LENGTH, OVERHEAD)


def test_best_fit_keeps_documents_whole_and_loses_none(vocabulary):
    texts = documents(120)
    packed = node(vocabulary, texts, best_fit=40)
    packed.reset()
    seen = []
    while packed.source.draw < 120 or packed.offset < len(packed._rows):
        (row,) = rows(packed, 1)
        assert sum(map(len, row)) <= LENGTH
        seen += [s.tokens[s.maskable] for s in row]
    whole = sorted(tuple(t.tolist()) for t in seen if len(t) < LENGTH - OVERHEAD)
    short = sorted(tuple(t.tolist()) for t in texts if len(t) < LENGTH - OVERHEAD)
    assert set(short) <= set(whole)
    assert sum(map(len, seen)) == sum(map(len, texts))


def test_shares_of_filled_positions(vocabulary):
    """In order: all but a few at a row's end. Best-fit: nearly as many, and no document is cut that fits a row."""
    texts = documents(3000)
    filled = {}
    for size in (0, 128):
        made = rows(node(vocabulary, texts, best_fit=size), 400)
        filled[size] = sum(len(s) for row in made for s in row) / (400 * LENGTH)
    assert filled[0] > 0.93
    assert filled[128] > 0.95


@pytest.mark.parametrize("size", [0, 16])
@pytest.mark.parametrize("stop", [0, 1, 7, 23])
def test_it_resumes_at_the_very_next_row(vocabulary, size, stop):
    texts = documents(50, 3)
    first = node(vocabulary, texts, best_fit=size)
    first.reset()
    rows(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    expected = [[s.tokens.tolist() for s in row] for row in rows(first, 30)]
    again = node(vocabulary, texts, best_fit=size)
    again.reset(state)
    assert again.state_dict() == state
    assert [[s.tokens.tolist() for s in row] for row in rows(again, 30)] == expected


def test_wherever_it_resumes_nothing_is_left_out_or_told_twice(vocabulary):
    """Behind the last row of documents that are packed together, too."""

    def prepare(document):
        if document[0] == 2 and document[1] == 1:
            raise ValueError("it is the ninth")
        return document

    def fresh(state=None):
        source = Draws(Prepared(documents(30, 3), prepare), WholeOrder(30, 0))
        made = Packed(source, lambda ids: task_sequence(vocabulary, "text", {"text": ids}, {}), LENGTH, OVERHEAD, best_fit=6)
        made.reset(state)
        return made

    def plain(item):
        row, notes = (item.sample, item.notes) if isinstance(item, Noted) else (item, [])
        return [s.tokens.tolist() for s in row], [(note.name, note.why) for note in notes]

    packed, states, made = fresh(), [], []
    for _ in range(50):
        states.append(json.loads(json.dumps(packed.state_dict())))
        made.append(plain(next(packed)))
    assert sum(len(notes) for _, notes in made) > 1
    for stop, state in enumerate(states[1:-3], 1):
        again = fresh(state)
        assert [plain(next(again)) for _ in range(3)] == made[stop : stop + 3]


class Lazy:
    """A document whose spans are read; from `bad` on they cannot be."""

    def __init__(self, ids, bad=None):
        self.ids, self.bad, self.read = ids, bad, 0

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, span):
        if self.bad is not None and span.stop > self.bad:
            raise BadSample("shard 3", "a code is outside")
        self.read += len(self.ids[span])
        return self.ids[span]


@pytest.mark.parametrize("size", [0, 4])
def test_a_span_that_cannot_be_read_is_passed_over_and_told_of(vocabulary, size):
    texts = [Lazy(torch.full((40,), i), bad=30 if i == 2 else None) for i in range(4)]
    packed = node(vocabulary, texts, best_fit=size)
    made = [next(packed) for _ in range(6)]
    notes = {(n.name, n.why) for row in made if isinstance(row, Noted) for n in row.notes}
    assert notes == {("shard 3", "a code is outside")}
    kept = [row.sample if isinstance(row, Noted) else row for row in made]
    assert all(kept)  # none is empty
    assert {int(s.tokens[s.maskable][0]) for row in kept for s in row} - {2} == {0, 1, 3}


def test_where_no_span_can_be_read_the_run_ends(vocabulary):
    packed = node(vocabulary, [Lazy(torch.full((40,), 1), bad=0)])
    with pytest.raises(ValueError, match="1000 samples in a row cannot be used; the first is shard 3: a code is outside"):
        next(packed)


def test_rows_in_order_read_no_more_than_they_hold(vocabulary):
    texts = [Lazy(torch.arange(1000) % 7) for _ in range(3)]
    packed = node(vocabulary, texts)
    rows(packed, 2)
    assert sum(t.read for t in texts) == 2 * (LENGTH - OVERHEAD)
    ((third,),) = rows(packed, 1)
    assert third.tokens[third.maskable][0] == 2 * (LENGTH - OVERHEAD) % 7


def test_a_document_whose_middle_cannot_be_read_is_not_begun_again_behind_it(vocabulary):
    class Torn(Lazy):
        def __getitem__(self, span):
            if span.start < 100 < span.stop:
                raise BadSample("shard 3", "a code is outside")
            return self.ids[span]

    made = rows(node(vocabulary, [Torn(torch.cat([torch.full((150,), 1), torch.full((150,), 2)]))]), 12)
    assert {int(token) for row in made for s in row for token in s.tokens[s.maskable]} == {1}


def test_no_document_begins_where_few_of_its_tokens_would_fit(vocabulary):
    """Rows of 24: behind one of 11 tokens and its overhead of 3 there is room for 7, behind one of 10 for 8."""
    for length, count in ((11, 1), (10, 2)):
        source = Draws(Prepared([torch.zeros(length, dtype=torch.long)]), WholeOrder(1, 0))
        packed = Packed(source, lambda ids: task_sequence(vocabulary, "text", {"text": ids}, {}), 24)
        row = next(packed)
        assert [len(s) for s in row] == [length + OVERHEAD, 11][:count]
    Packed(source, lambda ids: [], 11)  # the shortest rows there are
    with pytest.raises(ValueError, match="rows of 10 positions are too short to pack text; at least 11"):
        Packed(source, lambda ids: [], 10)


def test_a_document_that_has_become_bad_since_does_not_cut_the_next(vocabulary):
    texts = [torch.full((100,), i) for i in range(2)]
    first = node(vocabulary, texts)
    first.reset()
    ((begun,),) = rows(first, 1)
    texts[int(begun.tokens[begun.maskable][0])] = BadSample("a.txt", "it is gone")
    again = node(vocabulary, texts)
    again.reset(first.state_dict())
    row = next(again)
    assert [(n.name, n.why) for n in row.notes] == [("a.txt", "it is gone")]
    assert [len(s) for s in row.sample] == [LENGTH]


def test_a_document_left_out_of_those_packed_together_is_told_of(vocabulary):
    packed = node(vocabulary, [torch.zeros(9, dtype=torch.long), BadSample("a.txt", "it is empty")], best_fit=4)
    row = next(packed)
    assert {(n.name, n.why) for n in row.notes} == {("a.txt", "it is empty")}
