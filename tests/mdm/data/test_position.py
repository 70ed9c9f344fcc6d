"""Where a run is in its data: one state of all ranks together."""

import json

import pytest
from torchdata.nodes import Loader, Mapper, Prefetcher

from mdm.data.position import _position, load_state, whole_state
from tests.components.test_ranks import pipeline, rows

SIZE = 16


def loaders(vocabulary, world_size):
    ranks = (pipeline(vocabulary, rank, world_size, SIZE, lanes=8) for rank in range(world_size))
    return [Loader(Prefetcher(Mapper(rank, lambda step: step), 2)) for rank in ranks]


def states(ranks):
    """The whole state, as each rank sees it."""
    parts = []
    for loader in ranks:
        whole_state(loader, lambda own: parts.extend(own) or own)
    return [json.loads(json.dumps(whole_state(loader, lambda own: parts))) for loader in ranks]


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_rank_saves_the_same_state_and_any_number_goes_on_from_it(vocabulary, world_size):
    alone = pipeline(vocabulary, size=SIZE, lanes=8)
    expected = [rows([next(alone)]) for _ in range(5)]
    first = loaders(vocabulary, 2)
    steps = [iter(loader) for loader in first]
    for want in expected[:2]:
        assert rows([next(own) for own in steps]) == want
    one, other = states(first)
    assert _position(one) == _position(other)
    assert set(_position(one)["lanes"]["text"]) == {str(lane) for lane in range(8)}
    assert rows([next(own) for own in steps]) == expected[2]  # to save changes nothing
    again = loaders(vocabulary, world_size)
    assert [load_state(loader, one) for loader in again] == [True] * world_size
    steps = [iter(loader) for loader in again]
    assert [rows([next(own) for own in steps]) for _ in range(3)] == expected[2:]


def test_a_state_of_an_earlier_version_begins_at_its_row_of_the_mix(vocabulary):
    alone = pipeline(vocabulary, size=SIZE, lanes=8)
    expected = [rows([next(alone)]) for _ in range(3)]
    (loader,) = loaders(vocabulary, 1)
    (state,) = states([loader])
    own = _position(state)
    own.clear()
    own |= {"mix": {"row": 2 * SIZE}, "sources": {"text": {"before": {"draw": 3}}}}
    (again,) = loaders(vocabulary, 1)
    assert load_state(again, state) is False
    found = rows([next(iter(again))])
    for name in ("photos", "shards"):
        assert [row for row in found if row[0] == name] == [row for row in expected[2] if row[0] == name]
