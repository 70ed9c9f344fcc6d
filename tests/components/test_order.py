"""Orders that are computed place by place."""

import itertools
import math
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from components.data.draws.endless import Placed, Prepared
from components.data.draws.order import Permutation, ShardOrder, WholeOrder


def test_it_is_a_bijection_of_every_size():
    larger = np.random.default_rng(0).integers(1_000, 8_000, 50).tolist()
    for n in [*range(1, 1001), *larger]:
        order = Permutation(n, 5, n)
        assert sorted(order(i) for i in range(n)) == [*range(n)], n


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_a_few_samples_are_equally_likely(n):
    """Chi-square over the n! orders, 80 draws of each; p < 1e-4 by chance in one of 10,000 seeds. 12 rounds fail it."""
    draws = 80 * math.factorial(n)
    seen = Counter(tuple(Permutation(n, 7, k)(i) for i in range(n)) for k in range(draws))
    found = [seen[order] for order in itertools.permutations(range(n))]
    assert stats.chisquare(found).pvalue > 1e-4


@pytest.mark.parametrize("n", [17, 256, 300, 1000])
def test_every_sample_is_equally_likely_at_a_place_and_behind_any_other(n):
    """Chi-square over where a sample goes, and over the distance to its neighbour; two looks at 4,000 orders."""
    orders = [Permutation(n, 3, k) for k in range(4000)]
    place = np.array([order(n // 3) for order in orders])
    behind = np.array([(order(n // 3 + 1) - order(n // 3)) % n for order in orders]) - 1
    for found, count in ((place, n), (behind, n - 1)):
        edges = np.arange(min(count, 40) + 1) * count // min(count, 40)
        expected = np.diff(edges) / count * len(orders)
        assert stats.chisquare(np.histogram(found, edges)[0], expected).pvalue > 1e-4


def test_epochs_and_seeds_have_orders_of_their_own():
    first = [WholeOrder(50, 0)(i) for i in range(100)]
    assert sorted(first[:50]) == sorted(first[50:]) == [*range(50)]
    assert first[:50] != first[50:]
    assert [WholeOrder(50, 1)(i) for i in range(50)] != first[:50]
    assert [WholeOrder(50, 0)(i) for i in reversed(range(100))][::-1] == first  # whatever was asked before


class Lazy:
    """Ten billion samples that are computed."""

    def __len__(self):
        return 10**10

    def __getitem__(self, index):
        return index


def test_ten_billion_samples_cost_neither_time_nor_memory():
    started = time.perf_counter()
    rows = Placed(Prepared(Lazy()), WholeOrder(10**10, 0))
    middle = [rows(5 * 10**9 + i) for i in range(1000)]
    assert time.perf_counter() - started < 1.0
    assert len(set(middle)) == 1000
    assert max(middle) > 9 * 10**9
    tracemalloc.start()
    rows = Placed(Prepared(Lazy()), WholeOrder(10**10, 1))
    [rows(5 * 10**9 + i) for i in range(10)]
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("sizes", "lanes", "few"), [((5, 0, 9, 7, 30, 2), 3, 2), ((0, 40, 0), 8, 1), ((3, 4), 5, 3), ([8] * 12, 4, 3)]
)
def test_a_lane_reads_few_shards_at_a_time_each_to_its_end(sizes, lanes, few):
    """Against a plain reading: shards, or equal pieces of them where there are few, in the epochs' orders, dealt to lanes."""
    order = ShardOrder(sizes, lanes, 0, few)
    starts = np.cumsum([0, *sizes]).tolist()
    full = [(start, size) for start, size in zip(starts, sizes, strict=False) if size]
    cut = math.ceil(lanes / len(full))
    pieces = [range(start + size * k // cut, start + size * (k + 1) // cut) for start, size in full for k in range(cut)]
    pieces = [piece for piece in pieces if len(piece)]
    few = min(few, max(len(pieces) // lanes, 1))
    endless = [pieces[Permutation(len(pieces), 0, epoch)(i)] for epoch in range(60) for i in range(len(pieces))]
    for lane in range(lanes):
        dealt = endless[lane::lanes]
        draw, mixed = 0, max(map(len, pieces)) < 4
        for window in range(4):
            inside = [sample for piece in dealt[window * few : window * few + few] for sample in piece]
            drawn = [order(lane + lanes * (draw + k)) for k in range(len(inside))]
            assert sorted(drawn) == sorted(inside)
            mixed |= drawn != inside
            draw += len(inside)
        assert mixed
    places = [*range(6 * sum(sizes))]
    first = [order(place) for place in places]
    again = ShardOrder(sizes, lanes, 0, few)
    assert [again(place) for place in reversed(places)] == first[::-1]  # whatever was asked before


def test_where_shards_are_equal_an_epoch_of_the_lanes_is_one_of_the_samples():
    order = ShardOrder([8] * 12, 4, 0, 3)
    for epoch in range(3):
        assert sorted(order(96 * epoch + place) for place in range(96)) == [*range(96)]


def test_shards_and_samples_of_a_window_are_in_another_order_for_every_seed():
    for sizes in ([1] * 40, [40]):  # the order of the shards alone, and of the samples of one
        orders = [[order(place) for place in range(40)] for order in (ShardOrder(sizes, 1, seed, 1) for seed in (0, 1))]
        assert orders[0] != orders[1]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="a permutation of 0 samples"):
        Permutation(0, 0, 0)
    with pytest.raises(IndexError, match="place 5 of 5"):
        Permutation(5, 0, 0)(5)
    with pytest.raises(ValueError, match="open_shards must be at least 1, got 0"):
        ShardOrder([3], 1, 0, 0)
