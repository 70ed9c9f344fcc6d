"""Samplers around samplers: in blocks from left to right, or with settings of its own for each modality.

Blocks are LLaDA's semi-autoregressive decoding (2502.09992): an order of decoding only; the model sees the whole canvas. Inside
a block the sampler's steps and counts are those of the block: `Blocks(Confidence(num_steps=8), 32)` takes 8 forwards a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.samplers.any_noise.correcting import SelfCorrect
from components.samplers.base import Sampler, deterministic, started
from components.samplers.state import SamplerState


@dataclass(frozen=True)
class Blocks:
    """The generated positions in blocks of `block_length`, one after the other. Rows go on at their own pace."""

    sampler: Sampler
    block_length: int = 32
    any_noise = True

    def __post_init__(self) -> None:
        if self.block_length < 1:
            raise ValueError(f"Blocks: block_length must be at least 1, got {self.block_length}")

    @property
    def deterministic(self) -> bool:
        return deterministic(self.sampler)

    def start(self, state: SamplerState) -> SamplerState:
        """Raises ValueError where a row's generated positions are not a whole number of blocks."""
        for n in state.total.tolist():
            if n % self.block_length:
                raise ValueError(f"Blocks: block_length {self.block_length} does not divide the {n} positions to generate")
        if isinstance(self.sampler, (Blocks, PerModality, SelfCorrect)):
            raise ValueError(f"Blocks: {type(self.sampler).__name__} cannot be inside; it may hold blocks")
        return state

    def step(self, logits: Float[Tensor, "batch seq vocab"], state: SamplerState) -> SamplerState:
        """A step of the inner sampler in the current block of each row."""
        blocks = block_of(state.generate, self.block_length)
        inside = state.generate & (blocks == state.block[:, None])
        masked, fresh = state.masked & inside, state.step == 0
        inner = replace(
            state,
            masked=masked,
            generate=inside,
            total=torch.where(fresh, masked.sum(dim=1), state.total),
            time=torch.where(fresh, 1.0, state.time),
        )
        inner = self.sampler.step(logits, inner)
        masked = torch.where(inside, inner.masked, state.masked)
        following = blocks.masked_fill(~masked, int(1e9)).amin(dim=1)  # a block that a constraint has filled is passed over
        return replace(
            inner,
            masked=masked,
            generate=state.generate,
            step=torch.where(inner.finished, 0, inner.step),
            block=torch.where(inner.finished, following, state.block),
            extra=torch.where(inner.finished, 0, inner.extra),
            finished=inner.finished & ~masked.any(dim=1),
        )


def block_of(generate: Bool[Tensor, "batch seq"], block_length: int) -> Int[Tensor, "batch seq"]:
    """The block of each generated position: its rank among them, divided by the block length."""
    return (generate.long().cumsum(dim=1) - 1).clamp(min=0) // block_length


@dataclass(frozen=True)
class PerModality:
    """The i-th sampler for the positions of modality i, all in the same forward passes: each ends in its own time."""

    samplers: Sequence[Sampler]
    any_noise = True

    @property
    def deterministic(self) -> bool:
        return all(map(deterministic, self.samplers))

    def start(self, state: SamplerState) -> SamplerState:
        """A state for each modality. Raises ValueError for a modality without a sampler."""
        children = []
        for i, sampler in enumerate(self.samplers):
            own = state.generate & (state.modality == i)
            child = replace(state, generate=own, masked=own, total=own.sum(dim=1), finished=~own.any(dim=1)).clone()
            children.append(started(sampler, child))
        last = int(state.modality.masked_fill(~state.generate, 0).max())
        if last >= len(children):
            raise ValueError(f"PerModality: {len(children)} samplers, and positions of modality {last} to generate")
        return replace(state, children=tuple(children))

    def step(self, logits: Float[Tensor, "batch seq vocab"], state: SamplerState) -> SamplerState:
        """A step of every sampler at its own positions."""
        shared = {"tokens": state.tokens, "confidence": state.confidence, "uniform": state.uniform}  # also a constraint's
        stepped = [
            sampler.step(logits, replace(c, masked=c.masked & state.masked, **shared))
            for sampler, c in zip(self.samplers, state.children, strict=True)
        ]
        finished = [a.finished | b.finished for a, b in zip(state.children, stepped, strict=True)]
        tokens, masked, confidence = state.tokens, torch.zeros_like(state.masked), state.confidence
        for child in stepped:
            tokens = torch.where(child.generate, child.tokens, tokens)
            confidence = torch.where(child.generate, child.confidence, confidence)
            masked = masked | child.masked
        return replace(
            state,
            tokens=tokens,
            masked=masked,
            confidence=confidence,
            step=state.step + 1,
            time=torch.stack([c.time for c in stepped]).amax(dim=0),
            finished=torch.stack(finished).all(dim=0),
            children=tuple(replace(c, finished=f) for c, f in zip(stepped, finished, strict=True)),
        )
