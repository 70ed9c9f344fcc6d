"""The least sure first: the tokens that the model would most rather have another in the place of (2512.10858).

    score_i = (max_v p_i(v) - p_i(z_i)) pi(z_i),      pi(z): share of z in the noise, at its end

Each step sets the best-scored ones, so that tokens may be revised. pi puts masks first where noise ends in masks, and makes no
difference where it is uniform; p_i(mask) is 0. Probabilities are the model's as they are: no distribution is aimed at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from components.precision import precise
from components.samplers.ancestral import next_time
from components.samplers.any_noise.reverse import stepped
from components.samplers.drawing import Drawing, keep_top
from components.samplers.state import TOKEN, SamplerState

END = 1 / (1 + math.exp(-9))
"""The noise level where the noise ends: log-SNR -9, the authors' last; at 1 tokens would have no share beside masks at all."""


@dataclass(frozen=True)
class LeastSureFirst(Drawing):
    """num_steps: forwards at the most; each sets ceil(total / num_steps) tokens, and the last one all masks that are left

    A row is finished before where no token scores above 0: each is then the most probable one, and none is a mask.
    """

    num_steps: int = 16
    any_noise = True

    def step(self, logits: Float[Tensor, "batch seq vocab"], state: SamplerState) -> SamplerState:
        """Draws everywhere, and sets this step's share of the least sure."""
        s = next_time(state, self.num_steps)
        masked = state.tokens == state.mask_id
        p = precise(logits).softmax(dim=-1).double()
        here = p.gather(-1, state.tokens[..., None])[..., 0].masked_fill(masked, 0.0)
        noise = state.noise.levels(torch.full_like(state.confidence, END), state.modality)
        share, _ = noise.of_token(masked, (logits > float("-inf")).sum(dim=-1).clamp(min=1))
        score = (p.amax(dim=-1) - here) * share
        may = state.generate & (score > 0) & (state.time > 0)[:, None]
        now = keep_top(score, may, -(-state.total // self.num_steps))
        now = now | (may & masked & (s <= 0)[:, None])
        drawn, _ = self.draw(logits, state.uniform[:, TOKEN])
        time = torch.where(now.any(dim=1), s, 0.0)
        return stepped(state, torch.where(now, drawn, state.tokens), precise(logits), time)
