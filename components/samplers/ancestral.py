"""Ancestral sampling: the reverse process on a grid of times.

From t to s < t each masked token is unmasked with probability (alpha(s) - alpha(t)) / (1 - alpha(t))  (MDLM, 2406.07524).
Exact as the number of steps grows; with few, tokens unmasked together are drawn independently.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from components.samplers.base import SamplerState
from components.samplers.categorical import check_settings, draw
from components.schedules import Linear, Schedule


@dataclass(frozen=True)
class Ancestral:
    """num_steps equal steps of time from 1 to 0; the last one unmasks all that is left."""

    num_steps: int = 32
    schedule: Schedule = field(default_factory=Linear)
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_settings("Ancestral", self.temperature, self.top_p, self.num_steps)

    def step(self, logits: Float[Tensor, "batch seq vocab"], state: SamplerState) -> SamplerState:
        """Unmasks each token with the probability of this interval of time."""
        t = state.time
        s = torch.full_like(t, max(1 - (state.step + 1) / self.num_steps, 0.0))
        alpha_t, alpha_s = self.schedule.alpha(t), self.schedule.alpha(s)
        probability = torch.where(s > 0, (alpha_s - alpha_t) / (1 - alpha_t), 1.0)
        u = torch.rand(state.masked.shape, dtype=torch.float64, device=t.device, generator=state.generator)
        now = state.masked & (u < probability[:, None])
        tokens = state.tokens.clone()
        if bool(now.any()):
            tokens[now] = draw(logits[now], self.temperature, self.top_p, state.generator)[0]
        return replace(state, tokens=tokens, masked=state.masked & ~now, step=state.step + 1, time=s)
