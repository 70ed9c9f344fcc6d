"""Sampling in an order that is drawn beforehand, a group of positions at a time (see components/orders.py).

Groups of one follow the joint of exact conditionals, whatever the order; the tokens of a larger group are drawn independently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.noise import sample_rng
from components.orders import Order, Sequential, canvases, check_order, checked
from components.samplers.any_noise.start import along
from components.samplers.drawing import Drawing
from components.samplers.state import TOKEN, SamplerState

NEVER = 2**40  # the rank of what is not generated


@dataclass(frozen=True)
class InOrder(Drawing):
    """As many forwards as the order has groups. A row's order is a function of (seed, its index)."""

    order: Order = field(default_factory=Sequential)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order("InOrder: order", self.order)

    def ranks(
        self, generate: Bool[Tensor, "batch seq"], modality: Int[Tensor, "batch seq"], seed: int, index: Sequence[int]
    ) -> Int[Tensor, "batch seq"]:
        """Of every position that is generated, its rank; NEVER of the others. Raises ValueError for what is no order."""
        found = np.full(generate.shape, NEVER)
        kinds = modality.cpu().numpy()
        for row, (i, own) in enumerate(zip(index, generate.cpu().numpy(), strict=True)):
            where = np.flatnonzero(own)
            if len(where):
                lengths = canvases(where, kinds[row])
                found[row, where] = checked(self.order(lengths, sample_rng(seed, "order", i)), len(where), self.order)
        return torch.from_numpy(found).to(generate.device)

    def step(self, logits: Float[Tensor, "batch seq vocab"], state: SamplerState) -> SamplerState:
        """Draws the positions of the lowest rank that is left, and no others. Raises ValueError for a state without ranks (see
        `ranked`)."""
        if state.rank is None:
            raise ValueError("InOrder: the state has no ranks; begin with components.samplers.orders.in_order.ranked")
        now = earliest(state.rank, state.masked)
        place = now.long().argsort(dim=1, descending=True, stable=True)[:, : state.group]
        chosen = logits.gather(1, place[..., None].expand(-1, -1, logits.shape[-1]))
        token, probability = self.draw(chosen, state.uniform[:, TOKEN].gather(1, place))
        return state.unmask(now, state.tokens.scatter(1, place, token), state.confidence.scatter(1, place, probability))


def earliest(rank: Int[Tensor, "batch seq"], masked: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """Of the masked positions those of the lowest rank."""
    left = rank.masked_fill(~masked, NEVER)
    return masked & (left == left.amin(dim=1, keepdim=True))


def ranked(sampler: object, state: SamplerState, seed: int, index: Sequence[int]) -> SamplerState:
    """The state with the ranks of a sampler that goes by an order, or of those inside it; of others as it is."""
    found = state.rank
    each = getattr(sampler, "samplers", None)
    for i in [None] if each is None else range(len(each)):
        own = next((part for part in along(sampler, i) if isinstance(part, InOrder)), None)
        if own is not None:
            generate = state.generate if i is None else state.generate & (state.modality == i)
            ranks = own.ranks(generate, state.modality, seed, index)
            found = ranks if found is None else torch.where(generate, ranks, found)
    return state if found is None else replace(state, rank=found, group=largest_group(found, state.generate))


def largest_group(rank: Int[Tensor, "batch seq"], generate: Bool[Tensor, "batch seq"]) -> int:
    """The most positions of one row that have one rank."""
    found = [
        np.unique(own[here], return_counts=True)[1]
        for own, here in zip(rank.cpu().numpy(), generate.cpu().numpy(), strict=True)
    ]
    return max([int(counts.max(initial=0)) for counts in found], default=0)
