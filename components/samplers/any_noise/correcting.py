"""Self-correction: further passes over a finished sample, each of which may change a few of its tokens (GIDD, 2503.04482).

    new_i ~ softmax(logits_i / T),    score_i = [new_i != z_i] p(new_i),    the best-scored are put in their places

p is the distribution that is drawn from. The model sees a canvas without masks, so that it has to be one that was trained
against tokens which have become others; its logits are taken as they are, and no distribution is aimed at.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from components.samplers import base
from components.samplers.base import Sampler, deterministic, started
from components.samplers.drawing import Drawing, keep_top, probability_of
from components.samplers.state import TOKEN, SamplerState


@dataclass(frozen=True)
class SelfCorrect(Drawing):
    """Around any sampler: when that has finished a row, up to `passes` more, until one of them changes nothing.

    tokens:      how many are changed a pass, at the most
    temperature: of these passes; the sampler has its own
    """

    sampler: Sampler
    passes: int = 8
    tokens: int = 1
    temperature: float = field(default=0.1, kw_only=True)
    any_noise = True
    revises = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("passes", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{self.name}: {name} must be at least 1, got {getattr(self, name)}")

    @property
    def deterministic(self) -> bool:
        return self.temperature == 0 and deterministic(self.sampler)

    @property
    def most_passes(self) -> int:
        return base.passes(self.sampler) + self.passes

    def start(self, state: SamplerState) -> SamplerState:
        """The sampler has a state of its own."""
        return replace(state, children=(started(self.sampler, state.clone()),))

    def step(self, logits: Float[Tensor, "batch seq vocab"], state: SamplerState) -> SamplerState:
        """The sampler's step; of rows that it has finished, a correction."""
        (child,) = state.children
        shared = {"tokens": state.tokens, "confidence": state.confidence, "uniform": state.uniform}
        inner = self.sampler.step(logits, replace(child, masked=child.masked & state.masked, **shared))
        inner = replace(inner, finished=inner.finished | child.finished)
        done = child.finished[:, None]
        drawn, probability = self.draw(logits, state.uniform[:, TOKEN])
        score = probability_of(drawn, self.tempered(logits))
        changed = state.generate & (drawn != state.tokens) & done & ~state.finished[:, None]
        now = keep_top(score, changed, torch.full_like(state.total, self.tokens))
        extra = state.extra + child.finished.long()
        over = state.finished | (child.finished & (~changed.any(dim=1) | (extra >= self.passes)))
        tokens, confidence = (
            torch.where(done, state.tokens, inner.tokens),
            torch.where(done, state.confidence, inner.confidence),
        )
        return replace(
            state,
            tokens=torch.where(now, drawn, tokens),
            masked=torch.where(inner.finished[:, None], state.generate & ~over[:, None], inner.masked),
            confidence=torch.where(now, probability, confidence),
            step=state.step + 1,
            time=inner.time,
            extra=extra,
            finished=over,
            children=(inner,),
        )
