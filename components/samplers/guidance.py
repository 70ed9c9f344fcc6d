"""Classifier-free guidance (2207.12598) as a logits function around another, with one batched forward.

    logits = (1 + w) * conditional - w * unconditional

`guidance_scale` is w: 0 is off. (diffusers' scale is w + 1.)
"""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from components.samplers.base import LogitsFn


def guided(logits_fn: LogitsFn, prompt: Bool[Tensor, "batch seq"], mask_id: int, guidance_scale: float) -> LogitsFn:
    """The guided logits function; unconditional means that the prompt positions hold the mask token."""
    if guidance_scale == 0:
        return logits_fn

    def fn(tokens: Tensor) -> Tensor:
        both = torch.cat([tokens, tokens.masked_fill(prompt, mask_id)])
        conditional, unconditional = logits_fn(both).chunk(2)
        return torch.lerp(unconditional, conditional, 1 + guidance_scale)

    return fn
