"""Adaptive sampling: as many tokens a step as the model is sure of, at least one. Easy sequences take few forwards.

    threshold          all positions with a score above tau                                    (Fast-dLLM, 2505.22618)
    factor             the n surest, n the largest with  (n + 1)(1 - c_n) < f                  (the same)
    entropy-bounded    the k of least entropy, k the largest with  sum_k H - max_k H <= gamma  (2505.24857)

The second asks for more the more tokens are taken: where n of them are each more probable than 1 - 1 / (n + 1), the most
probable of each are together the most probable of all. The third bounds the dependence that drawing tokens together ignores:
their joint entropy is at least the largest single one.
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
class Factor(Drawing):
    """factor: f of (n + 1)(1 - c_n) < f, c_n being the n-th best score; the best position of each row is unmasked always

    Up to 1 greedy tokens are those of the joint's mode; 0 is one token a step. rank_by is `confidence` (the drawn token's
    probability, Fast-dLLM's) or `probability`.
    """

    factor: float = 1.0
    rank_by: str = "confidence"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.name, self.rank_by)
        if self.rank_by not in ("confidence", "probability"):
            raise ValueError(f"{self.name}: a factor is for confidence or probability, not rank_by {self.rank_by!r}")
        if not self.factor >= 0:
            raise ValueError(f"{self.name}: factor must be at least 0, got {self.factor}")

    @property
    def deterministic(self) -> bool:
        return self.temperature == 0

    def step(self, logits: Float[Tensor, "batch seq vocab"], state: SamplerState) -> SamplerState:
        """Unmasks the largest set of the surest that the factor allows."""
        drawn, probability = self.draw(logits, state.uniform[:, TOKEN])
        score = rank(self.rank_by, logits, probability, state.uniform[:, POSITION])
        doubt = (1 - score).clamp(min=0).masked_fill(~state.masked, float("inf")).sort(dim=1).values
        n = torch.arange(1, doubt.shape[1] + 1, device=doubt.device)
        count = ((n + 1) * doubt < self.factor).sum(dim=1)  # the product never falls with n: these are the first ones
        now = keep_top(score, state.masked, count.clamp(min=1))
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
