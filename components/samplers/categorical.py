"""Drawing tokens from logits, with Gumbel noise in float64.

    argmax_v (logits_v / temperature + g_v),    g_v = -log(-log u_v)

float32 noise is truncated, which lowers the effective temperature of a masked diffusion model's samples (2409.02908).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def gumbel(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> Float[Tensor, "*shape"]:
    """Standard Gumbel noise in float64."""
    uniform = torch.rand(shape, dtype=torch.float64, device=device, generator=generator)
    return -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float64).tiny)))


def top_p_filter(logits: Float[Tensor, "n vocab"], top_p: float) -> Float[Tensor, "n vocab"]:
    """-inf outside the smallest set of ids whose probabilities sum to `top_p` (nucleus sampling, 1904.09751)."""
    ordered, index = logits.sort(dim=-1, descending=True)
    probability = ordered.softmax(dim=-1)
    outside = probability.cumsum(dim=-1) - probability >= top_p  # the id that crosses top_p is kept
    return logits.masked_fill(outside.scatter(-1, index, outside), float("-inf"))


def draw(
    logits: Float[Tensor, "n vocab"], temperature: float, top_p: float, generator: torch.Generator | None
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """A token for each row, and its probability under the (untempered, unfiltered) logits. Temperature 0 is the argmax."""
    logits = logits.double()
    noisy = logits
    if temperature > 0:
        noisy = logits / temperature
        if top_p < 1:
            noisy = top_p_filter(noisy, top_p)
        noisy = noisy + gumbel(tuple(noisy.shape), noisy.device, generator)
    token = noisy.argmax(dim=-1)
    return token, logits.softmax(dim=-1).gather(-1, token[:, None])[:, 0]


def check_settings(name: str, temperature: float, top_p: float, num_steps: int = 1) -> None:
    """Raises ValueError for settings that make no sense; every sampler calls it when it is built."""
    if temperature < 0:
        raise ValueError(f"{name}: temperature must be at least 0 (0 is greedy), got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"{name}: top_p must be in (0, 1], got {top_p}")
    if num_steps < 1:
        raise ValueError(f"{name}: num_steps must be at least 1, got {num_steps}")
