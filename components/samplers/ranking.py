"""Which positions a model is surest of: the scores by which samplers choose what to unmask first. Higher is surer.

    confidence    probability of the token that was drawn there          MaskGIT 2202.04200, LLaDA 2502.09992
    probability   the largest probability, whichever token was drawn     2502.06768
    margin        the largest minus the second largest                   2502.06768, Dream 2508.15487
    entropy       minus the entropy                                      Dream 2508.15487
    random        a uniform number                                       any-order decoding

All but the first depend on the distributions alone (or on nothing). Then one token at a time follows the joint of exact
conditionals, in whatever order. Chosen by `confidence` it does not: a position that drew a likely token is taken more often, so
samples lean towards likely sequences, even one token a step.

The distributions are the model's own, untempered and unfiltered, as LLaDA ranks. Dream (its `sample_tokens`) ranks on those
that it draws from, behind temperature, top-p and top-k: `Confidence(rank_tempered=True)`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from components.precision import precise

SCORES = ("confidence", "probability", "margin", "entropy", "random")


def rank(
    by: str, logits: Float[Tensor, "*shape vocab"], drawn: Float[Tensor, "*shape"], uniform: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """The score of each position, in float64. drawn: probability of the drawn tokens; uniform: for `random`."""
    if by == "confidence":
        return drawn.double()
    if by == "random":
        return uniform.double()
    if by == "entropy":
        return -entropy(logits)
    best = precise(logits).softmax(dim=-1).topk(2 if by == "margin" else 1, dim=-1).values.double()
    return best[..., 0] - best[..., 1] if by == "margin" else best[..., 0]


def entropy(logits: Float[Tensor, "*shape vocab"]) -> Float[Tensor, "*shape"]:
    """Entropy of each distribution in nats."""
    p = precise(logits).softmax(dim=-1).double()
    return -torch.special.xlogy(p, p).sum(dim=-1)


def check_rank(name: str, by: str) -> None:
    """Raises ValueError for an unknown score."""
    if by not in SCORES:
        raise ValueError(f"{name}: rank_by {by!r} is not one of {', '.join(SCORES)}")
