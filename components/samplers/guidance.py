"""Classifier-free guidance (2207.12598) as a logits function around another, with one batched forward.

    logits = (1 + w) * conditional - w * unconditional

`guidance_scale` is w: 0 is off. (diffusers' scale is w + 1.) Unconditional means that the prompt holds mask tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.precision import precise
from components.samplers.base import LogitsFn, Selectable

Scale = float | Callable[[Tensor], Tensor]
"""w, or w as a function of time: the share of tokens still masked, from 1 down to 0."""


@dataclass(frozen=True)
class LinearScale:
    """w(t) = start * t + end * (1 - t): from `start` with everything masked to `end`, e.g. growing as in Muse (2301.00704)."""

    start: float = 0.0
    end: float = 1.0

    def __call__(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """w at time t."""
        return self.start * t + self.end * (1 - t)


def guided(
    logits_fn: LogitsFn,
    prompt: Bool[Tensor, "batch seq"],
    mask_id: int,
    guidance_scale: Scale,
    generate: Bool[Tensor, "batch seq"] | None = None,
) -> LogitsFn:
    """The guided logits function.

    logits_fn: called with the rows twice, first as they are, then without their prompt; its `select`, too, is of both halves
    generate:  positions that are generated, for a scale that changes with time

    Raises ValueError where a row has no prompt (its unconditional logits would be the conditional ones), or a scale is negative
    or scheduled without `generate`.
    """
    if isinstance(guidance_scale, (int, float)):
        if guidance_scale < 0:
            raise ValueError(f"guidance_scale must be at least 0 (0 is off), got {guidance_scale}")
        if guidance_scale == 0:
            return logits_fn
    elif generate is None:
        raise ValueError("guidance_scale changes with time, so `generate` has to say which positions count")
    if not bool(prompt.any(dim=1).all()):
        raise ValueError(f"guidance_scale {guidance_scale}: there is no prompt to leave out for the unconditional logits")
    return Guided(logits_fn, prompt, mask_id, guidance_scale, torch.ones_like(prompt) if generate is None else generate)


@dataclass(frozen=True)
class Guided:
    """Built by `guided`."""

    logits_fn: LogitsFn
    prompt: Bool[Tensor, "batch seq"]
    mask_id: int
    guidance_scale: Scale
    generate: Bool[Tensor, "batch seq"]

    def __call__(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch positions vocab"]:
        """Guided logits, in one forward of both halves."""
        w = self.guidance_scale
        if callable(w):
            masked = ((tokens == self.mask_id) & self.generate).sum(dim=1) / self.generate.sum(dim=1).clamp(min=1)
            w = w(masked)[:, None, None]
        both = torch.cat([tokens, tokens.masked_fill(self.prompt, self.mask_id)])
        conditional, unconditional = precise(self.logits_fn(both)).chunk(2)
        return conditional + w * (conditional - unconditional)

    def select(self, rows: Int[Tensor, " rows"]) -> LogitsFn:
        """The same for some of the rows."""
        inner = self.logits_fn
        if isinstance(inner, Selectable):
            inner = inner.select(torch.cat([rows, rows + len(self.prompt)]))
        return Guided(inner, self.prompt[rows], self.mask_id, self.guidance_scale, self.generate[rows])
