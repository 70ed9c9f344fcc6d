"""Keys and values kept between forward passes of a bidirectional transformer, for decoding in blocks (Fast-dLLM, 2505.22618).

While a block is decoded, tokens outside it hardly change what they offer to attention; so a step computes a few positions only
and attends to the kept keys and values of the others. An approximation: exact where everything is computed anew each step.

torchtune's attention asks its `kv_cache` for what to attend to: this one writes the new keys and values to their positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


class PositionCache:
    """One layer's keys and values, `[rows, heads, length, head_dim]`."""

    def __init__(self) -> None:
        self.keys: Float[Tensor, "rows heads length dim"] | None = None
        self.values: Float[Tensor, "rows heads length dim"] | None = None
        self.rows: Int[Tensor, " rows"] = torch.zeros(0, dtype=torch.long)
        self.positions: Int[Tensor, "rows new"] = torch.zeros(0, 0, dtype=torch.long)
        self.shape: tuple[int, int] = (0, 0)

    def update(
        self, keys: Float[Tensor, "rows heads new dim"], values: Float[Tensor, "rows heads new dim"]
    ) -> tuple[Float[Tensor, "rows heads length dim"], Float[Tensor, "rows heads length dim"]]:
        """Writes the new ones to (rows, positions); returns all of those rows."""
        if self.keys is None or self.values is None:
            rows, length = self.shape
            self.keys = keys.new_zeros(rows, keys.shape[1], length, keys.shape[3])
            self.values = torch.zeros_like(self.keys)
        where = (self.rows[:, None], slice(None), self.positions)  # rows and positions broadcast; heads stay whole
        self.keys[where] = keys.transpose(1, 2)
        self.values[where] = values.transpose(1, 2)
        return self.keys[self.rows], self.values[self.rows]


@contextmanager
def attending_to(
    caches: Sequence[PositionCache], blocks: Any, rows: Int[Tensor, " rows"], positions: Int[Tensor, "rows new"]
) -> Iterator[None]:
    """Within it, attention writes its keys and values to `positions` of `rows`, and attends to all of those rows."""
    for cache in caches:
        cache.rows, cache.positions = rows, positions
    with asking(caches, blocks):
        yield


@contextmanager
def asking(caches: Sequence[Any], blocks: Any) -> Iterator[None]:
    """Within it, the attention of each block asks its cache for what to attend to."""
    for cache, block in zip(caches, blocks, strict=True):
        block.attn.kv_cache, block.attn.cache_enabled = cache, True
    try:
        yield
    finally:
        for block in blocks:
            block.attn.kv_cache, block.attn.cache_enabled = None, False
