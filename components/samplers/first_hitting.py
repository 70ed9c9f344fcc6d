"""First-hitting sampling: the reverse process without time discretisation, one token a forward (2409.02908).

With n tokens masked at time t, the next one unmasks when the mask rate has fallen by a factor u^(1/n), u ~ U(0, 1); it is any
of the n with equal probability. Exact: with exact conditionals the samples follow the joint.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from components.samplers.drawing import Drawing
from components.samplers.state import POSITION, TIME, TOKEN, SamplerState
from components.schedules import Linear, Schedule


@dataclass(frozen=True)
class FirstHitting(Drawing):
    """As many forwards as masked tokens. The schedule sets only the times, which the tokens do not depend on."""

    schedule: Schedule = field(default_factory=Linear)

    def step(self, logits: Float[Tensor, "batch seq vocab"], state: SamplerState) -> SamplerState:
        """Unmasks one token of every row, at its drawn time. Only that position's token is drawn."""
        chosen = state.uniform[:, POSITION].masked_fill(~state.masked, -1.0).argmax(dim=1)[:, None]
        remaining = state.masked.sum(dim=1)
        mask_rate = 1 - self.schedule.alpha(state.time)
        mask_rate = mask_rate * state.uniform[:, TIME].gather(1, chosen)[:, 0] ** (1 / remaining.clamp(min=1))
        time = torch.where(remaining > 0, self.schedule.inverse(1 - mask_rate), state.time)
        at = chosen[..., None].expand(-1, -1, logits.shape[-1])
        token, probability = self.draw(logits.gather(1, at), state.uniform[:, TOKEN].gather(1, chosen))
        now = state.masked & (torch.arange(state.masked.shape[1], device=chosen.device) == chosen)
        return state.unmask(now, token.expand_as(now), probability.expand_as(now), time)
