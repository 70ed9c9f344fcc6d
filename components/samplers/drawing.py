"""Drawing tokens from logits: temperature, top-k, top-p, and the inverse of the cumulative distribution in float64.

    token = the first id v with  p_1 + ... + p_v > u,    u ~ U(0, 1)

One uniform number a position, in float64. (argmax of logits + Gumbel noise draws from the same distribution with one number for
every id, and needs float64 for all of them: truncated float32 noise lowers the effective temperature, 2409.02908.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.precision import precise


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How a sampler draws a token once it has logits: the settings that all samplers share.

    temperature: divides the logits; 0 takes the most probable token
    top_k:       only the k most probable ids; None is all
    top_p:       only the smallest set of ids whose probabilities sum to it (nucleus sampling, 1904.09751); 1 is all
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"{self.name}: temperature must be at least 0 (0 is greedy), got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"{self.name}: top_k must be at least 1, or null for all ids; got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"{self.name}: top_p must be in (0, 1], got {self.top_p}")
        if (num_steps := getattr(self, "num_steps", None)) is not None and num_steps < 1:
            raise ValueError(f"{self.name}: num_steps must be at least 1, got {num_steps}")

    @property
    def name(self) -> str:
        return type(self).__name__

    def draw(
        self, logits: Float[Tensor, "*shape vocab"], uniform: Float[Tensor, "*shape"]
    ) -> tuple[Int[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """A token for each position, and its probability under the logits as they came (untempered, unfiltered)."""
        logits = precise(logits)
        token = logits.argmax(dim=-1) if self.temperature == 0 else invert(self.tempered(logits), uniform)
        return token, probability_of(token, logits)

    def tempered(self, logits: Float[Tensor, "*shape vocab"]) -> Float[Tensor, "*shape vocab"]:
        """The logits of what is drawn from: divided by the temperature (unless that is 0), filtered by top-k, then by top-p."""
        kept = precise(logits)
        if self.temperature > 0:
            kept = kept / self.temperature
        if self.top_k is not None:
            kept = top_k_filter(kept, self.top_k)
        return top_p_filter(kept, self.top_p) if self.top_p < 1 else kept


def probability_of(token: Int[Tensor, "*shape"], logits: Float[Tensor, "*shape vocab"]) -> Float[Tensor, "*shape"]:
    """The probability of each token under the logits, in float64."""
    logits = precise(logits)
    return (logits.gather(-1, token[..., None])[..., 0] - logits.logsumexp(dim=-1)).exp().double()


def invert(logits: Float[Tensor, "*shape vocab"], uniform: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """The id at which the cumulative distribution passes `uniform`. An id of probability 0 is never it."""
    return invert_probabilities(precise(logits).softmax(dim=-1), uniform)


def invert_probabilities(p: Float[Tensor, "*shape vocab"], uniform: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """The same of probabilities, which need not sum to 1."""
    cumulative = p.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[..., -1:]
    u = torch.minimum(uniform[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, u, right=True)[..., 0].clamp(max=p.shape[-1] - 1)


def top_k_filter(logits: Float[Tensor, "*shape vocab"], top_k: int) -> Float[Tensor, "*shape vocab"]:
    """-inf for all but the k largest."""
    smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, float("-inf"))


def top_p_filter(logits: Float[Tensor, "*shape vocab"], top_p: float) -> Float[Tensor, "*shape vocab"]:
    """-inf outside the smallest set of ids whose probabilities sum to `top_p`."""
    ordered, index = precise(logits).sort(dim=-1, descending=True)
    probability = ordered.softmax(dim=-1)
    outside = probability.cumsum(dim=-1) - probability >= top_p  # the id that crosses top_p is kept
    return logits.masked_fill(outside.scatter(-1, index, outside), float("-inf"))


def gumbel(uniform: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Standard Gumbel noise from uniform numbers, in float64."""
    return -torch.log(-torch.log(uniform.double().clamp_min(torch.finfo(torch.float64).tiny)))


def keep_top(
    score: Float[Tensor, "batch seq"], masked: Bool[Tensor, "batch seq"], count: Int[Tensor, " batch"]
) -> Bool[Tensor, "batch seq"]:
    """The `count` masked positions of each row with the highest score; the leftmost first among equals."""
    order = score.masked_fill(~masked, float("-inf")).argsort(dim=1, descending=True, stable=True)
    return masked & (order.argsort(dim=1) < count[:, None])
