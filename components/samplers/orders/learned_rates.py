"""Sampling with learned rates: a model says of each position not only what stands there, but how soon it is its turn.

Its logits are log rates: their softmax is the distribution of the token, their log-sum-exp (over the ids that may stand there)
is log r of the position. From t to s a masked position is unmasked with probability 1 - (s / t)^r; the next of all is i with
probability r_i / sum of r  (OeMDM, arXiv 2602.02112; see components/learned_orders.py). Other samplers take no notice of r.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from components.samplers.ancestral import next_time
from components.samplers.drawing import Drawing
from components.samplers.state import POSITION, TOKEN, SamplerState


@dataclass(frozen=True)
class LearnedRates(Drawing):
    """num_steps equal steps of time from 1 to 0, the last of which unmasks all that is left; null is one position a pass.

    Rates are read from the logits as they come: temperature, top-k and top-p change the tokens alone.
    """

    num_steps: int | None = None
    reads_rates = True

    def step(self, logits: Float[Tensor, "batch seq vocab"], state: SamplerState) -> SamplerState:
        """Unmasks each position with the probability that its rate gives it."""
        rate = logits.double().logsumexp(dim=-1).exp()
        if self.num_steps is not None:
            s = next_time(state, self.num_steps)
            stay = (s / state.time)[:, None] ** rate
            now = state.masked & (state.uniform[:, POSITION] < torch.where(s[:, None] > 0, 1 - stay, 1.0))
            return state.unmask(now, *self.draw(logits, state.uniform[:, TOKEN]), time=s)
        wait = (-torch.log1p(-state.uniform[:, POSITION]) / rate).masked_fill(~state.masked, float("inf"))
        first, chosen = wait.min(dim=1, keepdim=True)
        now = state.masked & (torch.arange(wait.shape[1], device=wait.device) == chosen)
        at = chosen[..., None].expand(-1, -1, logits.shape[-1])  # no token is drawn elsewhere
        token, probability = self.draw(logits.gather(1, at), state.uniform[:, TOKEN].gather(1, chosen))
        time = torch.where(state.masked.any(dim=1), state.time * torch.exp(-first[:, 0]), state.time)
        return state.unmask(now, token.expand_as(now), probability.expand_as(now), time=time)
