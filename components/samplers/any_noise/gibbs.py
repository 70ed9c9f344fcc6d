"""Gibbs correctors: between the steps of another sampler, tokens are drawn anew at the noise level they are at (2605.22765).

    z_i ~ q_s(. | p_i) = alpha_s p_i + mask_s m + uniform_s u,      p_i = P(x_i | z without i)

is the conditional distribution of one noisy token given the others. To draw one anew leaves the marginal q_s as it is, and
brings a state that has left it, by steps that are too large, nearer. Several at once are drawn as if they were independent: an
approximation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from components.samplers.any_noise.reverse import afresh, denoised, stepped
from components.samplers.base import Sampler, passes
from components.samplers.drawing import Drawing, keep_top
from components.samplers.state import POSITION, SamplerState


@dataclass(frozen=True)
class Gibbs:
    """`correctors` passes after each step of a sampler but the last, whose tokens are clean. It draws as that sampler does.

    sampler:   one of a time grid: Ancestral or Psi
    positions: tokens of each row that a pass draws anew, at random places
    """

    sampler: Sampler
    correctors: int = 1
    positions: int = 1
    any_noise = True
    goes_on = True

    def __post_init__(self) -> None:
        for name in ("correctors", "positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"Gibbs: {name} must be at least 1, got {getattr(self, name)}")
        on_grid = isinstance(self.sampler, Drawing) and hasattr(self.sampler, "num_steps")
        if not on_grid or getattr(self.sampler, "schedule", None) is None:
            raise ValueError(
                f"Gibbs: {type(self.sampler).__name__} has no grid of times with a schedule, and so no noise level to correct "
                "at; take Ancestral or Psi"
            )

    @property
    def most_passes(self) -> int:
        return passes(self.sampler) * (1 + self.correctors)

    def step(self, logits: Float[Tensor, "batch seq vocab"], state: SamplerState) -> SamplerState:
        """The sampler's step, or one of the corrections behind it; a row is finished when its time is over."""
        sampler: Any = self.sampler
        masked = state.generate & (state.tokens == state.mask_id)
        inner = sampler.step(logits, replace(state, step=state.step // (1 + self.correctors), masked=masked))
        said = denoised(logits, state, 1 - sampler.schedule.alpha(state.time), sampler)
        chosen = keep_top(state.uniform[:, POSITION], state.generate, torch.full_like(state.total, self.positions))
        fresh = torch.where(chosen, afresh(said.p, said.allowed, said.levels, state), state.tokens)
        corrected = stepped(state, fresh, said.own, state.time)
        moves = (state.step % (1 + self.correctors) == 0) | (state.time <= 0)
        time = torch.where(moves, inner.time, state.time)
        return replace(
            corrected,
            tokens=torch.where(moves[:, None], inner.tokens, corrected.tokens),
            masked=state.generate & (time > 0)[:, None],
            confidence=torch.where(moves[:, None], inner.confidence, corrected.confidence),
            time=time,
            finished=time <= 0,
        )
