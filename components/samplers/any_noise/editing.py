"""Token editing: as masks are filled, tokens that are there already may be replaced by surer ones (LLaDA2.1).

    mask -> token      above a threshold, as `Threshold` does
    token -> token     where the most probable token is another, and its probability is above a threshold of its own

For models that were trained to say E[x | z] of tokens that may be wrong: noise with weighting=cross_entropy
(components/weightings.py). The model's probabilities are taken as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from components.precision import precise
from components.samplers.adaptive import Threshold
from components.samplers.base import PATIENCE
from components.samplers.drawing import probability_of
from components.samplers.state import SamplerState


@dataclass(frozen=True)
class Editing(Threshold):
    """Threshold, and edits. When no mask is left a row goes on until a pass edits nothing.

    edit_threshold: a token is replaced by one whose probability is above it; 1 edits nothing, and is `Threshold`
    extra_steps:    passes of a row (of each block) without any mask, at the most
    """

    edit_threshold: float = 0.9
    extra_steps: int = 16
    revises = True
    goes_on = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.edit_threshold <= 1:
            raise ValueError(f"{self.name}: edit_threshold must be in [0, 1], got {self.edit_threshold}")
        if not 0 <= self.extra_steps <= PATIENCE:
            raise ValueError(f"{self.name}: extra_steps must be from 0 to {PATIENCE}, got {self.extra_steps}")

    def step(self, logits: Float[Tensor, "batch seq vocab"], state: SamplerState) -> SamplerState:
        """Unmasks what is above one threshold, and replaces what is above the other."""
        filled = super().step(logits, state)
        if self.edit_threshold == 1:
            return filled
        best = precise(logits).argmax(dim=-1)
        probability = probability_of(best, logits)
        editable = state.generate & ~state.masked & ~state.finished[:, None]
        edited = editable & (best != state.tokens) & (probability > self.edit_threshold)
        full = ~state.masked.any(dim=1)
        extra = state.extra + full.long()
        settled = (full & ~edited.any(dim=1)) | (extra >= self.extra_steps)
        return replace(
            filled,
            tokens=torch.where(edited, best, filled.tokens),
            confidence=torch.where(edited, probability, filled.confidence),
            extra=extra,
            finished=filled.finished & settled,
        )
