"""Keys and values of finished blocks, which nothing behind them changes: exact, and as long as what is finished (2503.09573).

torchtune's attention asks its `kv_cache` for what to attend to: this one writes the new keys and values to their positions, and
gives all up to the last position that is needed. Its memory grows in pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from components.kv_cache import asking

PAGE = 256  # positions


class LayerCache:
    """One layer's keys and values, `[rows, heads, pages * PAGE, head_dim]`."""

    def __init__(self) -> None:
        self.keys: Float[Tensor, "rows heads room dim"] | None = None
        self.values: Float[Tensor, "rows heads room dim"] | None = None
        self.positions: Int[Tensor, "rows new"] | slice = slice(0)
        self.length: int = 0
        self.room: int = 0

    def update(
        self, keys: Float[Tensor, "rows heads new dim"], values: Float[Tensor, "rows heads new dim"]
    ) -> tuple[Float[Tensor, "rows heads length dim"], Float[Tensor, "rows heads length dim"]]:
        """Writes the new ones to their positions; returns those of the first `length`."""
        own, other = _grown(self.keys, keys, self.room), _grown(self.values, values, self.room)
        if isinstance(self.positions, slice):
            own[:, :, self.positions], other[:, :, self.positions] = keys, values
        else:
            where = (torch.arange(len(keys), device=keys.device)[:, None], slice(None), self.positions)
            own[where], other[where] = keys.transpose(1, 2), values.transpose(1, 2)
        self.keys, self.values = own, other
        return own[:, :, : self.length], other[:, :, : self.length]


def _grown(kept: Tensor | None, new: Tensor, length: int) -> Tensor:
    """The cache with room for `length` positions, of zeros: what is masked is multiplied all the same."""
    have = 0 if kept is None else kept.shape[2]
    if kept is not None and have >= length:
        return kept
    room = new.new_zeros(len(new), new.shape[1], -(-length // PAGE) * PAGE - have, new.shape[3])
    return room if kept is None else torch.cat([kept, room], dim=2)


class BlockCache:
    """The keys and values of all layers. rows keep their places until `select`."""

    def __init__(self, layers: int) -> None:
        self.layers: list[LayerCache] = [LayerCache() for _ in range(layers)]

    @contextmanager
    def attending(self, blocks: Any, positions: Int[Tensor, "rows new"] | slice, length: int, room: int) -> Iterator[None]:
        """Within it, attention writes its keys and values to `positions`, and attends to the first `length` of every row.

        positions: a slice where they are the same in every row, which costs no index
        room:      beyond all of the positions
        """
        for cache in self.layers:
            cache.positions, cache.length, cache.room = positions, length, room
        with asking(self.layers, blocks):
            yield

    def select(self, rows: Int[Tensor, " some"]) -> None:
        """Keeps some of the rows; the others' memory is free."""
        for cache in self.layers:
            if cache.keys is not None and cache.values is not None:
                cache.keys, cache.values = cache.keys[rows], cache.values[rows]

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        every = [t for cache in self.layers for t in (cache.keys, cache.values) if t is not None]
        return sum(t.numel() * t.element_size() for t in every)
