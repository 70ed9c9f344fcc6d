"""What every sampler is, and the loop around its step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LogitsFn = Callable[[Tensor], Tensor]
"""tokens `[batch, seq]` -> logits `[batch, seq, vocab]`; position i predicts the token at i."""


@dataclass(frozen=True)
class SamplerState:
    """tokens: the canvas so far; masked: positions still to be generated; step: forwards done; total: masked at the start;
    time: of the reverse process, from 1 down to 0; generator: every random draw comes from it."""

    tokens: Int[Tensor, "batch seq"]
    masked: Bool[Tensor, "batch seq"]
    step: int
    total: Int[Tensor, " batch"]
    time: Float[Tensor, " batch"]
    generator: torch.Generator | None = None


@runtime_checkable
class Sampler(Protocol):
    """Anything with a step is a sampler. A step fills some of the masked positions, and at least one of each row in the end."""

    def step(self, logits: Float[Tensor, "batch seq vocab"], state: SamplerState) -> SamplerState:
        """The state after one forward pass."""


@torch.no_grad()
def sample(
    sampler: Sampler,
    logits_fn: LogitsFn,
    tokens: Int[Tensor, "batch seq"],
    mask_id: int,
    generate: Bool[Tensor, "batch seq"] | None = None,
    allowed: Bool[Tensor, "batch seq vocab"] | None = None,
    generator: torch.Generator | None = None,
    on_step: Callable[[SamplerState], None] | None = None,
) -> Int[Tensor, "batch seq"]:
    """Fills the masked positions of `tokens`; the others stay as they are.

    generate: positions to fill; None: those that hold the mask token
    allowed:  ids that may stand at each position; the mask token never may
    on_step:  called with the state after each step (progress, films)
    """
    masked = tokens == mask_id if generate is None else generate
    state = SamplerState(
        tokens=tokens.masked_fill(masked, mask_id),
        masked=masked,
        step=0,
        total=masked.sum(dim=1),
        time=torch.ones(len(tokens), dtype=torch.float64, device=tokens.device),
        generator=generator,
    )
    while bool(state.masked.any()):
        logits = logits_fn(state.tokens)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, float("-inf"))
        logits[..., mask_id] = float("-inf")
        state = sampler.step(logits, state)
        if on_step is not None:
            on_step(state)
    return state.tokens
