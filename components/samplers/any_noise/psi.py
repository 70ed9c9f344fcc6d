"""Psi samplers: ancestral steps, in part replaced by predicting the clean sequence and noising it again (2602.21185).

    q = kappa q(z_s | z_t, p) + (1 - kappa) q_s(. | E[x | z_t]),      kappa = 1 - sigma / (1 - alpha_s)

For masks that is ReMDM with remasking probability sigma (2503.00307). kappa = 1 is ancestral sampling; below, tokens that have
been drawn become noise again and are drawn anew. The marginals of every time stay those of ancestral sampling; exact in the
limit of many steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from components.samplers.ancestral import alpha_at, next_time
from components.samplers.any_noise.reverse import afresh, backward, denoised, stepped
from components.samplers.drawing import Drawing
from components.samplers.state import POSITION, SamplerState
from components.schedules import Linear, Schedule


@dataclass(frozen=True)
class Psi(Drawing):
    """num_steps equal steps of time from 1 to 0, with any noise.

    eta: sigma = min(eta, (1 - alpha_s) / alpha_t), ReMDM's cap. Where that is more than 1 - alpha_s, kappa would be negative:
         it is 0 there, all is noised again, and ReMDM masks more
    """

    num_steps: int = 32
    eta: float = 0.02
    schedule: Schedule = field(default_factory=Linear)
    any_noise = True
    goes_on = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"{self.name}: eta must be in [0, 1], got {self.eta}")

    def step(self, logits: Float[Tensor, "batch seq vocab"], state: SamplerState) -> SamplerState:
        """Of each token an ancestral step, or noise of this time put on what the model takes it to be."""
        s = next_time(state, self.num_steps)
        tau_t, tau_s = 1 - self.schedule.alpha(state.time), 1 - alpha_at(s, self.schedule)
        said = denoised(logits, state, tau_t, self)
        earlier = state.noise.levels(tau_s[:, None].expand(state.tokens.shape), state.modality)
        sigma = (1 - earlier.alpha) / said.levels.alpha.clamp(min=1e-12)
        sigma = sigma.clamp(max=self.eta)
        kappa = (1 - sigma / (1 - earlier.alpha).clamp(min=1e-12)).clamp(min=0)
        noise, _ = said.levels.of_token(said.masked, said.size)
        here = torch.where(said.masked, 0.0, said.levels.alpha)
        clean = said.p * noise[..., None]  # E[x | z]: p times q(z | x)
        place = state.tokens.masked_fill(said.masked, 0)[..., None]
        here = here * said.at(state.tokens).clamp(min=1e-30)  # what no noise could be is clean, whatever p says of it
        clean = clean.scatter_add(-1, place, here[..., None])
        clean = clean / clean.sum(dim=-1, keepdim=True)
        chance = state.uniform[:, POSITION]
        again, within = chance >= kappa, state.uniform.clone()
        within[:, POSITION] = chance / kappa.clamp(min=1e-12)  # below kappa, uniform on it
        tokens = backward(said, earlier, replace(state, uniform=within))
        return stepped(state, torch.where(again, afresh(clean, said.allowed, earlier, state), tokens), said.own, s)
