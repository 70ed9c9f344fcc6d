"""Confidence sampling: draw a token everywhere, keep the most confident, mask the rest again.

LLaDA (2502.09992): confidence is the probability of the drawn token; with n masked at the start and N steps, n // N are kept a
step, plus one in the first n % N.
MaskGIT (2202.04200): the number still masked follows a schedule, and annealed Gumbel noise is added to the log-confidence.

Positions are chosen by their drawn token, so even one token a step does not follow the joint: the bias towards likely tokens
is what makes few steps look good.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.samplers.base import SamplerState
from components.samplers.categorical import check_settings, draw, gumbel
from components.schedules import Schedule


@dataclass(frozen=True)
class Confidence:
    """num_steps:          forwards at the most (a row of fewer tokens is done earlier)
    schedule:           how many stay masked after each step, MaskGIT's way; None keeps equal numbers, LLaDA's way
    choice_temperature: of the Gumbel noise on the log-confidence, annealed to 0 over the steps; 0 is none
    """

    num_steps: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    schedule: Schedule | None = None
    choice_temperature: float = 0.0

    def __post_init__(self) -> None:
        check_settings("Confidence", self.temperature, self.top_p, self.num_steps)
        if self.choice_temperature < 0:
            raise ValueError(f"Confidence: choice_temperature must be at least 0, got {self.choice_temperature}")

    def step(self, logits: Float[Tensor, "batch seq vocab"], state: SamplerState) -> SamplerState:
        """Draws everywhere and keeps this step's share of the most confident."""
        masked, g = state.masked, state.generator
        drawn, probability = draw(logits[masked], self.temperature, self.top_p, g)
        confidence = probability.log()
        if self.choice_temperature > 0:
            annealed = self.choice_temperature * (1 - (state.step + 1) / self.num_steps)
            confidence = confidence + annealed * gumbel(tuple(confidence.shape), confidence.device, g)
        score = torch.full(masked.shape, float("-inf"), dtype=torch.float64, device=masked.device)
        score[masked] = confidence
        now = keep_top(score, masked, self._keep(state))
        proposal = state.tokens.clone()
        proposal[masked] = drawn
        return replace(
            state,
            tokens=torch.where(now, proposal, state.tokens),
            masked=masked & ~now,
            step=state.step + 1,
            time=torch.full_like(state.time, max(1 - (state.step + 1) / self.num_steps, 0.0)),
        )

    def _keep(self, state: SamplerState) -> Int[Tensor, " batch"]:
        """How many tokens of each row this step unmasks."""
        if self.schedule is None:
            return state.total // self.num_steps + (state.step < state.total % self.num_steps).long()
        s = torch.full_like(state.time, max(1 - (state.step + 1) / self.num_steps, 0.0))
        stay = torch.floor((1 - self.schedule.alpha(s)) * state.total).long()
        remaining = state.masked.sum(dim=1)
        return torch.where(s > 0, (remaining - stay).clamp(min=1), remaining)


def keep_top(
    score: Float[Tensor, "batch seq"], masked: Bool[Tensor, "batch seq"], count: Int[Tensor, " batch"]
) -> Bool[Tensor, "batch seq"]:
    """The `count` masked positions of each row with the highest score; the leftmost first among equals."""
    order = score.masked_fill(~masked, float("-inf")).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(score.shape[1], device=score.device).expand_as(order))
    return masked & (rank < count[:, None])
