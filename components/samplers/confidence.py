"""Confidence sampling: each step keeps the positions the model is surest of, a number that is fixed beforehand.

LLaDA (2502.09992): confidence is the probability of the drawn token; with n masked at the start and N steps, n // N are kept a
step, plus one in the first n % N.
MaskGIT (2202.04200): the number still masked follows a schedule, and annealed Gumbel noise is added to the log-confidence.

Ranked by the drawn token, even one token a step does not follow the joint (see ranking.py): the bias towards likely tokens is
what makes few steps look good.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from components.samplers.ancestral import next_time
from components.samplers.drawing import Drawing, gumbel, keep_top, probability_of
from components.samplers.ranking import check_rank, rank
from components.samplers.state import POSITION, TOKEN, SamplerState
from components.schedules import Schedule

RATE_ERROR = 1e-12  # far above the rounding of a rate in float64, far below what tells two of the counts apart


@dataclass(frozen=True)
class Confidence(Drawing):
    """num_steps:          forwards at the most (a row of fewer tokens is done earlier)
    rank_by:            what "surest" means: confidence, probability, margin, entropy, random
    schedule:           how many stay masked after each step, MaskGIT's way; None keeps equal numbers, LLaDA's way
    choice_temperature: of the Gumbel noise on the log-confidence, annealed to 0 over the steps; 0 is none
    rank_tempered:      rank on the distributions that are drawn from (temperature, top-k, top-p), as Dream does; else on the
                        model's own, as LLaDA does
    """

    num_steps: int = 16
    rank_by: str = "confidence"
    schedule: Schedule | None = None
    choice_temperature: float = 0.0
    rank_tempered: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.name, self.rank_by)
        if self.choice_temperature < 0:
            raise ValueError(f"{self.name}: choice_temperature must be at least 0, got {self.choice_temperature}")
        if self.choice_temperature > 0 and self.rank_by not in ("confidence", "probability"):
            raise ValueError(f"{self.name}: choice_temperature is noise on a log-probability; rank_by {self.rank_by!r} is none")

    @property
    def deterministic(self) -> bool:
        return self.temperature == 0 and self.rank_by != "random" and self.choice_temperature == 0

    def step(self, logits: Float[Tensor, "batch seq vocab"], state: SamplerState) -> SamplerState:
        """Draws everywhere and keeps this step's share of the surest."""
        s = next_time(state, self.num_steps)
        drawn, probability = self.draw(logits, state.uniform[:, TOKEN])
        ranked = self.tempered(logits) if self.rank_tempered else logits
        own = probability_of(drawn, ranked) if self.rank_tempered else probability
        score = rank(self.rank_by, ranked, own, state.uniform[:, POSITION])
        if self.choice_temperature > 0:
            score = score.log() + self.choice_temperature * s[:, None] * gumbel(state.uniform[:, POSITION])
        now = keep_top(score, state.masked, self._count(state, s))
        return state.unmask(now, drawn, probability, s)

    def _count(self, state: SamplerState, s: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """How many tokens of each row this step unmasks."""
        if self.schedule is None:
            return state.total // self.num_steps + (state.step < state.total % self.num_steps).long()
        rate = 1 - self.schedule.alpha(s) + RATE_ERROR  # 3 of 10 tokens are 3, also where the rate comes as 0.29999999999999993
        stay = torch.floor(rate * state.total).long()
        remaining = state.masked.sum(dim=1)
        return torch.where(s > 0, (remaining - stay).clamp(min=1), remaining)
