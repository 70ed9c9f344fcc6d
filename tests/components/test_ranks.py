"""A rank makes its own rows alone, and all ranks together make what one would."""

import itertools
import json
from collections import Counter

import pytest
import torch
from torchdata.nodes import Loader, Mapper, Prefetcher

from components.data.bad import Refused
from components.data.draws.endless import Draws, Passing, Placed, Prepared, Streamed
from components.data.draws.order import ShardOrder, WholeOrder
from components.data.nodes import Lanes, MicroBatches, Mix, Stream, gathered
from components.data.packing import Packed
from components.maskers import StratifiedTimes
from components.sequences import task_sequence
from components.types import PAD_DOCUMENT
from tests.components.test_nodes import Lines

LANES = 64


class Counted(list):
    """Samples that know how often they were read."""

    def __init__(self, samples):
        super().__init__(samples)
        self.read = Counter()

    def __getitem__(self, index):
        self.read[index] += 1
        return super().__getitem__(index)


def pipeline(vocabulary, rank=0, world_size=1, size=96, pairs=False, lanes=LANES, sources=None):
    """Pairs placed one by one, pairs of shards, streamed pairs and packed text, 3 : 1 : 1 : 3."""

    def pair(sample, rng):
        parts = {"text": torch.tensor([sample % 7]), "image": vocabulary.to_global("image", torch.full((4,), sample % 5))}
        task = ["text_to_image", "image_to_text"][int(rng.integers(2))]
        return [task_sequence(vocabulary, task, parts, {"text": 2, "image": 4})]

    sources = {} if sources is None else sources
    photos = sources.setdefault("photos", Counted(range(500)))
    shards = sources.setdefault("shards", Counted(range(7 * 128)))
    documents = sources.setdefault("text", Counted(torch.arange(3 + 7 * i % 61) % 7 for i in range(900)))
    shard_order = ShardOrder([7] * 128, lanes, 5, 2)

    def packed(lane):
        node = Draws(Prepared(documents), WholeOrder(900, 2), lanes, lane)
        return Packed(node, lambda ids: task_sequence(vocabulary, "text", {"text": ids}, {}), 24)

    def streamed(lane):
        return Passing(Streamed(Lines([*range(1000 * lane, 1000 * lane + 9)]), lane, block_size=4))

    streams = [
        Stream("photos", Placed(Prepared(photos), WholeOrder(500, 1)), 3, pair, pairs=pairs, seed=1),
        Stream("shards", Placed(Prepared(shards), shard_order, lanes), 1, pair, seed=2),
        Stream("web", Lanes(lanes, streamed), 1, pair, seed=3),
        Stream("text", Lanes(lanes, packed), 3, lambda row, rng: row, length=24, pairs=pairs, seed=4),
    ]
    return MicroBatches(Mix(streams, 0), size, 8, vocabulary.pad_id, rank, world_size)


def rows(steps):
    """The rows of a step, of one rank or several, as they can be compared."""
    found = []
    for name, batch, _ in itertools.chain(*steps):
        for tokens, document in zip(batch.tokens, batch.document, strict=True):
            kept = document != PAD_DOCUMENT
            if kept.any():
                found.append((name, tokens[kept].tolist(), document[kept].tolist()))
    return sorted(found)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, 7, 8, 64])
def test_the_rows_of_all_ranks_are_those_of_one(vocabulary, world_size, pairs):
    """Token for token, for three steps; and all ranks make as many passes over as many rows."""
    alone = pipeline(vocabulary, pairs=pairs)
    ranks = [pipeline(vocabulary, rank, world_size, pairs=pairs) for rank in range(world_size)]
    for _ in range(3):
        whole, parts = next(alone), [next(rank) for rank in ranks]
        assert rows(parts) == rows([whole])
        assert sum(len(batch.tokens) for _, batch, _ in whole) == 96
        shapes = [[(name, len(batch.tokens)) for name, batch, _ in part] for part in parts]
        assert all(shape == shapes[0] for shape in shapes)


def test_a_rank_reads_its_own_samples_alone(vocabulary):
    """Of 8 ranks each reads an eighth, and no two the same place of the order."""
    reads = []
    for world_size in (1, 8):
        for rank in range(world_size):
            sources = {}
            node = pipeline(vocabulary, rank, world_size, sources=sources)
            for _ in range(16):
                next(node)
            reads.append({name: sum(source.read.values()) for name, source in sources.items()})
    whole, *parts = reads
    for name in ("photos", "shards"):
        assert [part[name] for part in parts] == [whole[name] // 8] * 8
    assert sum(part["text"] for part in parts) == whole["text"]
    assert max(part["text"] for part in parts) < whole["text"] / 8 * 1.2


def test_a_rank_of_shards_opens_those_of_its_lanes_alone(vocabulary):
    opened = []
    for rank in range(8):
        sources = {}
        node = pipeline(vocabulary, rank, 8, sources=sources)
        for _ in range(4):  # of 12 rows of shards each: less than an epoch
            next(node)
        opened.append({index // 7 for index in sources["shards"].read})
    assert all(not a & b for a, b in itertools.combinations(opened, 2))


@pytest.mark.parametrize("sizes", [(1, 8, 2), (3, 1, 64), (8, 5, 1)])
def test_a_run_goes_on_with_another_number_of_ranks(vocabulary, sizes):
    """1 -> 8 -> 2 and the like, stopped at odd steps, through JSON: the rows of one rank that was never stopped."""
    alone = pipeline(vocabulary, pairs=True)
    expected = [rows([next(alone)]) for _ in range(13)]
    state, seen = None, []
    for world_size, stop in zip(sizes, (3, 7, 13), strict=True):
        nodes = [pipeline(vocabulary, rank, world_size, pairs=True) for rank in range(world_size)]
        for node in nodes:
            node.reset(state)
        while len(seen) < stop:
            seen.append(rows([next(node) for node in nodes]))
        state = json.loads(json.dumps(gathered([node.state_dict() for node in nodes])))
    assert seen == expected


def test_the_state_grows_with_lanes_and_not_with_ranks_or_steps(vocabulary):
    def state(world_size, steps):
        nodes = [pipeline(vocabulary, rank, world_size, lanes=512, size=512) for rank in range(world_size)]
        for _ in range(steps):
            for node in nodes:
                next(node)
        return len(json.dumps(gathered([node.state_dict() for node in nodes])))

    assert state(4, 2) == pytest.approx(state(1, 2), rel=0.01)
    assert state(512, 1) < 200_000


def test_ranks_that_have_no_row_of_a_stream_make_padding(vocabulary):
    """Six rows for eight ranks."""
    parts = [next(pipeline(vocabulary, rank, 8, size=16)) for rank in range(8)]
    assert rows(parts) == rows([next(pipeline(vocabulary, size=16))])
    empty = [(name, batch) for part in parts for name, batch, _ in part if (batch.document == PAD_DOCUMENT).all()]
    assert {name for name, _ in empty} >= {"shards", "web", "text"}
    assert all(not batch.maskable.any() for _, batch in empty)


def test_a_stream_that_has_come_into_another_number_of_lanes_does_not_go_on(vocabulary):
    node = pipeline(vocabulary)
    next(node)
    state = json.loads(json.dumps(gathered([node.state_dict()])))
    other = pipeline(vocabulary, lanes=32)
    with pytest.raises(Refused, match=r"^data\.shards is in 32 lanes, and was in 64 when it was saved: files have come"):
        other.reset(state)


def test_more_ranks_than_lanes_are_refused(vocabulary):
    with pytest.raises(ValueError, match=r"^data\.shards has 64 lanes, fewer than the 65 processes that share them:"):
        pipeline(vocabulary, 64, 65)


def test_the_times_of_a_stream_are_stratified_whatever_is_mixed_with_it(vocabulary):
    """A stream of every second row of the mix: a global index would draw it from half of the strata alone."""
    times = StratifiedTimes(group=8)
    node = pipeline(vocabulary, size=64)
    drawn = {"photos": [], "text": []}
    for _ in range(4):
        for name, batch, _ in next(node):
            if name in drawn:
                drawn[name] += [int(document[0]) for document in batch.document]
    for name, indices in drawn.items():
        strata = Counter(int(times(0, index) * 8) for index in indices)
        assert set(strata.values()) == {len(indices) // 8}, name


def test_a_prefetched_loader_has_the_state_of_what_was_taken_from_it(vocabulary):
    def loader():
        return Loader(Prefetcher(Mapper(pipeline(vocabulary), lambda step: step), 3))

    first = loader()
    steps = iter(first)
    for _ in range(3):
        next(steps)
    again = loader()
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    expected = [rows([next(steps)]) for _ in range(3)]
    resumed = iter(again)
    assert [rows([next(resumed)]) for _ in range(3)] == expected
