"""ReMDM: ancestral sampling that may mask decoded tokens again, and so mend early mistakes (2503.00307).

From t to s, with remasking probability sigma <= sigma_max = min(1, (1 - alpha_s) / alpha_t), a decoded token is masked again
with probability sigma, and a masked one unmasks with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t): the marginals
of every time stay those of ancestral sampling, which is sigma = 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from components.samplers.ancestral import next_time
from components.samplers.drawing import Drawing
from components.samplers.state import POSITION, TOKEN, SamplerState
from components.schedules import Linear, Schedule

VARIANTS = ("cap", "rescale", "confidence")


@dataclass(frozen=True)
class ReMDM(Drawing):
    """num_steps equal steps of time from 1 to 0.

    variant: cap         sigma = min(eta, sigma_max)
             rescale     sigma = eta * sigma_max
             confidence  sigma = eta * sigma_max * softmax over the decoded tokens of minus the probability each was drawn with:
                         what the model was least sure of is masked again first
    eta:     how much is masked again; 0 is ancestral sampling. None is 1 for `confidence`, which then masks sigma_max <= 1
             tokens of a row again a step (the authors have no eta there); and 0.02 for the others (the authors' for 1,024
             steps: 0.008 for cap, 0.015 for rescale)
    """

    num_steps: int = 32
    variant: str = "cap"
    eta: float | None = None
    schedule: Schedule = field(default_factory=Linear)
    goes_on = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise ValueError(f"{self.name}: variant {self.variant!r} is not one of {', '.join(VARIANTS)}")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"{self.name}: eta must be in [0, 1], got {self.eta}")

    def step(self, logits: Float[Tensor, "batch seq vocab"], state: SamplerState) -> SamplerState:
        """Unmasks some tokens and masks others again; a row is finished when its time is over."""
        s = next_time(state, self.num_steps)
        alpha_t, alpha_s = self.schedule.alpha(state.time)[:, None], self.schedule.alpha(s)[:, None]
        sigma = self.sigma(alpha_t, alpha_s, state)
        last = (s <= 0)[:, None]
        unmask = torch.where(last, 1.0, (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t))
        u = state.uniform[:, POSITION]
        decoded = state.generate & ~state.masked
        stepped = state.unmask(state.masked & (u < unmask), *self.draw(logits, state.uniform[:, TOKEN]), time=s)
        again = decoded & (u < sigma) & ~last
        tokens = stepped.tokens.masked_fill(again, state.mask_id)
        return replace(stepped, tokens=tokens, masked=stepped.masked | again, finished=s <= 0)

    def sigma(
        self, alpha_t: Float[Tensor, "batch 1"], alpha_s: Float[Tensor, "batch 1"], state: SamplerState
    ) -> Float[Tensor, "batch seq"]:
        """The remasking probability of each position; that of masked ones enters how fast they unmask."""
        eta = self.eta if self.eta is not None else 1.0 if self.variant == "confidence" else 0.02
        largest = ((1 - alpha_s) / alpha_t.clamp(min=1e-12)).clamp(max=1.0).expand_as(state.confidence)
        if self.variant == "cap":
            return largest.clamp(max=eta)
        if self.variant == "rescale":
            return eta * largest
        decoded = state.generate & ~state.masked
        share = (-state.confidence).masked_fill(~decoded, float("-inf")).softmax(dim=1)
        return eta * largest * share.nan_to_num(0.0)  # nothing is decoded before the first step
