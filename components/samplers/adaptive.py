"""Adaptive sampling: as many tokens a step as the model is sure of, at least one. Easy sequences take few forwards.

    threshold          all positions with a score above tau                                    (Fast-dLLM, 2505.22618)
    entropy-bounded    the k of least entropy, k the largest with  sum_k H - max_k H <= gamma  (2505.24857)

The second bounds the dependence that drawing tokens together ignores: their joint entropy is at least the largest single one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from components.samplers.drawing import Drawing, keep_top
from components.samplers.ranking import check_rank, entropy, rank
from components.samplers.state import POSITION, TOKEN, SamplerState


@dataclass(frozen=True)
class Threshold(Drawing):
    """threshold: positions that score above it are unmasked, and the best one of each row always

    rank_by is `confidence` (the drawn token's probability, Fast-dLLM's), `probability` or `margin`.
    """

    threshold: float = 0.9
    rank_by: str = "confidence"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.name, self.rank_by)
        if self.rank_by not in ("confidence", "probability", "margin"):
            raise ValueError(f"{self.name}: a threshold is for confidence, probability or margin, not rank_by {self.rank_by!r}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"{self.name}: threshold must be in [0, 1], got {self.threshold}")

    @property
    def deterministic(self) -> bool:
        return self.temperature == 0

    def step(self, logits: Float[Tensor, "batch seq vocab"], state: SamplerState) -> SamplerState:
        """Unmasks all that is above the threshold."""
        drawn, probability = self.draw(logits, state.uniform[:, TOKEN])
        score = rank(self.rank_by, logits, probability, state.uniform[:, POSITION])
        now = state.masked & (score > self.threshold)
        now = now | keep_top(score, state.masked, torch.ones_like(state.total))
        return state.unmask(now, drawn, probability, remaining(state, now))


@dataclass(frozen=True)
class EntropyBounded(Drawing):
    """gamma: nats of entropy that may be drawn together beside the largest; 0 is one token a step, or several certain ones."""

    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma < 0:
            raise ValueError(f"{self.name}: gamma must be at least 0, got {self.gamma}")

    @property
    def deterministic(self) -> bool:
        return self.temperature == 0

    def step(self, logits: Float[Tensor, "batch seq vocab"], state: SamplerState) -> SamplerState:
        """Unmasks the largest set of least entropy within the bound."""
        h = entropy(logits).masked_fill(~state.masked, 0.0)
        ordered = h.masked_fill(~state.masked, float("inf")).sort(dim=1, stable=True).values
        finite = ordered.nan_to_num(posinf=0.0)
        others = finite.cumsum(dim=1) - finite  # the largest of the first k is the k-th
        count = ((others <= self.gamma) & ordered.isfinite()).sum(dim=1)
        now = keep_top(-h, state.masked, count)
        return state.unmask(now, *self.draw(logits, state.uniform[:, TOKEN]), remaining(state, now))


def remaining(state: SamplerState, now: Bool[Tensor, "batch seq"]) -> Float[Tensor, " batch"]:
    """The time that is left, as the share of tokens still masked."""
    return (state.masked & ~now).sum(dim=1).double() / state.total.clamp(min=1)
