"""Ancestral sampling: the reverse process on a grid of times.

From t to s < t each masked token is unmasked with probability (alpha(s) - alpha(t)) / (1 - alpha(t))  (MDLM, 2406.07524), and
with noise of other kinds each token is kept or drawn afresh (reverse.py), as often as it happens. Exact as the number of steps
grows; with few, tokens that change together are drawn independently.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from components.samplers.any_noise.reverse import backward, denoised, stepped
from components.samplers.drawing import Drawing
from components.samplers.state import POSITION, TOKEN, SamplerState
from components.schedules import Linear, Schedule


@dataclass(frozen=True)
class Ancestral(Drawing):
    """num_steps equal steps of time from 1 to 0; the last one unmasks all that is left."""

    num_steps: int = 32
    schedule: Schedule = field(default_factory=Linear)
    any_noise = True

    def step(self, logits: Float[Tensor, "batch seq vocab"], state: SamplerState) -> SamplerState:
        """Unmasks, or changes, each token with the probability of this interval of time."""
        s = next_time(state, self.num_steps)
        alpha_t, alpha_s = self.schedule.alpha(state.time), alpha_at(s, self.schedule)
        if not state.noise.masks_only:
            said = denoised(logits, state, 1 - alpha_t, self)
            tau_s = (1 - alpha_s)[:, None].expand(state.tokens.shape)
            return stepped(state, backward(said, state.noise.levels(tau_s, state.modality), state), said.own, s)
        probability = torch.where(s > 0, (alpha_s - alpha_t) / (1 - alpha_t), 1.0)
        now = state.masked & (state.uniform[:, POSITION] < probability[:, None])
        return state.unmask(now, *self.draw(logits, state.uniform[:, TOKEN]), time=s)


def next_time(state: SamplerState, num_steps: int) -> Float[Tensor, " batch"]:
    """The end of the interval that this step covers, on a grid of `num_steps` from 1 to 0."""
    return (1 - (state.step + 1).double() / num_steps).clamp(min=0.0)


def alpha_at(s: Float[Tensor, " batch"], schedule: Schedule) -> Float[Tensor, " batch"]:
    """alpha at the end of a step; at time 0 everything is clean, also by a schedule that stops short of it."""
    return torch.where(s > 0, schedule.alpha(s), 1.0)
