"""Constraints: what a sample has to obey beside the model. Ids that may not stand somewhere are `allowed` of `sample`, and
positions that are given are those outside `generate`; here are the ones that depend on what has been drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from components.samplers.state import SamplerState


@dataclass(frozen=True)
class FillAfterEnd:
    """Everything behind an end token of its span is end tokens too: filled at once, without further forwards.

    A span is a run of positions of one modality. Where training fills every span with end tokens behind the first one, this is
    no approximation: nothing else has ever stood there. Where an end token may still change, nothing is filled.
    """

    end_id: int

    def __call__(self, state: SamplerState) -> SamplerState:
        """The state with the spans that have ended filled up."""
        behind = state.masked & after((state.tokens == self.end_id) & ~state.masked, state.modality)
        masked = state.masked & ~behind
        return replace(
            state,
            tokens=state.tokens.masked_fill(behind, self.end_id),
            confidence=state.confidence.masked_fill(behind, 1.0),
            masked=masked,
            finished=state.finished | (behind.any(dim=1) & ~masked.any(dim=1)),
        )


def after(event: Bool[Tensor, "batch seq"], group: Int[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """Positions behind an event of their own run of equal groups."""
    before = event.long().cumsum(dim=1) - event.long()
    starts = torch.ones_like(event)
    starts[:, 1:] = group[:, 1:] != group[:, :-1]
    at_start = before.masked_fill(~starts, 0).cummax(dim=1).values  # `before` never falls: the last start holds its maximum
    return before > at_start
