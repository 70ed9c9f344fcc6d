"""First-hitting sampling: the reverse process without time discretisation, one token a forward (2409.02908).

With n tokens masked at time t, the next one unmasks when the mask rate has fallen by a factor u^(1/n), u ~ U(0, 1); it is any
of the n with equal probability. Exact: with exact conditionals the samples follow the joint.
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
class FirstHitting:
    """As many forwards as masked tokens. The schedule sets only the times, which the tokens do not depend on."""

    schedule: Schedule = field(default_factory=Linear)
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_settings("FirstHitting", self.temperature, self.top_p)

    def step(self, logits: Float[Tensor, "batch seq vocab"], state: SamplerState) -> SamplerState:
        """Unmasks one token of every row, at its drawn time."""
        masked, g = state.masked, state.generator
        remaining = masked.sum(dim=1)
        u = torch.rand(len(masked), dtype=torch.float64, device=masked.device, generator=g)
        mask_rate = (1 - self.schedule.alpha(state.time)) * u ** (1 / remaining.clamp(min=1))
        time = torch.where(remaining > 0, self.schedule.inverse(1 - mask_rate), state.time)
        priority = torch.rand(masked.shape, dtype=torch.float64, device=masked.device, generator=g)
        chosen = priority.masked_fill(~masked, -1.0).argmax(dim=1)
        rows = remaining.nonzero()[:, 0]  # a row that is complete waits for the others
        tokens, left = state.tokens.clone(), masked.clone()
        where = (rows, chosen[rows])
        tokens[where] = draw(logits[where], self.temperature, self.top_p, g)[0]
        left[where] = False
        return replace(state, tokens=tokens, masked=left, step=state.step + 1, time=time)
