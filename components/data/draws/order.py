"""The order of samples without memory: which sample a place of the order holds is computed from the place alone.

    Permutation(n, seed, index)     a keyed bijection of [0, n), another one for every (seed, index)
    WholeOrder(n, seed)             place -> sample, epoch after epoch, each in an order of its own
    ShardOrder(sizes, lanes, ...)   the same where samples lie in shards, of which few are open at a time

Places are dealt to lanes: place p is of lane p mod lanes, its draw p // lanes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np

from components.noise import sample_rng

WORD = 2**64 - 1


@runtime_checkable
class Order(Protocol):
    """Which sample stands at a place, through all epochs."""

    def __call__(self, place: int, /) -> int: ...


class Permutation:
    """A keyed bijection of [0, n), computed for one index at a time.

    A Feistel network permutes the smallest power of two that holds n (Luby and Rackoff, SIAM J. Comput. 1988); what falls
    outside goes through it again until it is inside (cycle walking: Black and Rogaway, CT-RSA 2002), less than once on average.
    A few bits mix slowly: below 256 it has 24 rounds, with which all orders of up to 6 samples are equally likely (12 are too
    few for 5).
    """

    def __init__(self, n: int, seed: int, index: int, stream: str = "order") -> None:
        if n < 1:
            raise ValueError(f"a permutation of {n} samples")
        self.n = n
        bits = max((n - 1).bit_length(), 2)
        rounds = 24 if bits <= 8 else 8
        self._right = bits // 2
        keys = sample_rng(seed, stream, index).integers(2**64, size=rounds, dtype=np.uint64).tolist()
        masks = ((1 << bits - self._right) - 1, (1 << self._right) - 1)  # of the half that a round changes
        self._rounds: list[tuple[int, int]] = [(key, masks[k % 2]) for k, key in enumerate(keys)]

    def __call__(self, i: int) -> int:
        """Where the i-th goes. Raises IndexError outside of [0, n)."""
        if not 0 <= i < self.n:
            raise IndexError(f"place {i} of {self.n}")
        shift = self._right
        low = (1 << shift) - 1
        while True:
            left, right = i >> shift, i & low
            for key, mask in self._rounds:  # 64 bits that depend on all of right: SplitMix64's finalizer (OOPSLA 2014)
                z = right + key & WORD
                z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & WORD
                z = (z ^ z >> 27) * 0x94D049BB133111EB & WORD
                left, right = right, left ^ (z ^ z >> 31) & mask
            i = left << shift | right
            if i < self.n:
                return i


class WholeOrder:
    """Every sample once an epoch, any one beside any other."""

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self._epoch = lru_cache(maxsize=8)(lambda epoch: Permutation(n, seed, epoch))  # lanes cross its end one by one

    def __call__(self, place: int) -> int:
        epoch, i = divmod(place, self.n)
        return self._epoch(epoch)(i)


class ShardOrder:
    """Every shard once an epoch, in a new order, dealt to the lanes; a lane mixes the samples of a few shards at a time.

    So a lane reads a shard from its beginning to its end, and nobody else does: what the whole order would fetch again and
    again is fetched once. What that costs in randomness: samples of one shard come within `open_shards` shards of one lane
    (in an order of their own), and a batch is of `lanes` x `open_shards` shards at the most; shards that hold one kind of
    sample each want more open, or a source that was shuffled before it was written.

    Where there are fewer shards than lanes, each is cut into as many equal pieces as it takes: more than one lane reads it. A
    lane has no more open than it has in an epoch.
    """

    def __init__(self, sizes: Sequence[int], lanes: int, seed: int, open_shards: int) -> None:
        if open_shards < 1:
            raise ValueError(f"open_shards must be at least 1, got {open_shards}")
        full = [(start, size) for start, size in zip(np.cumsum([0, *sizes]).tolist(), sizes, strict=False) if size]
        cut = -(-lanes // max(len(full), 1))
        edges = [(start + size * k // cut, start + size * (k + 1) // cut) for start, size in full for k in range(cut)]
        self._pieces: list[tuple[int, int]] = [(start, stop) for start, stop in edges if stop > start]
        self.lanes: int = lanes
        self.seed: int = seed
        self.open_shards: int = min(open_shards, max(len(self._pieces) // lanes, 1))  # of one epoch
        self._epoch = lru_cache(maxsize=8)(lambda epoch: Permutation(len(self._pieces), seed, epoch))
        self._ends: dict[int, list[int]] = {}  # of a lane: samples up to the end of each of its windows so far
        self._window = lru_cache(maxsize=2 * lanes)(self._opened)

    def __call__(self, place: int) -> int:
        draw, lane = divmod(place, self.lanes)
        ends = self._ends.setdefault(lane, [])
        while not ends or ends[-1] <= draw:
            ends.append((ends[-1] if ends else 0) + sum(stop - start for start, stop in self._shards(lane, len(ends))))
        window = bisect_right(ends, draw)
        inside, starts, order = self._window(lane, window)
        i = order(draw - (ends[window - 1] if window else 0))
        piece = bisect_right(starts, i) - 1
        return inside[piece][0] + i - starts[piece]

    def _shards(self, lane: int, window: int) -> list[tuple[int, int]]:
        """The pieces that a lane has open in a window: every `lanes`-th of the endless order of all pieces."""
        first = window * self.open_shards
        dealt = [lane + self.lanes * k for k in range(first, first + self.open_shards)]
        return [self._pieces[self._epoch(q // len(self._pieces))(q % len(self._pieces))] for q in dealt]

    def _opened(self, lane: int, window: int) -> tuple[list[tuple[int, int]], list[int], Permutation]:
        pieces = self._shards(lane, window)
        starts = np.cumsum([0, *(stop - start for start, stop in pieces)]).tolist()
        return pieces, starts[:-1], Permutation(starts[-1], self.seed, window * self.lanes + lane, "window")
