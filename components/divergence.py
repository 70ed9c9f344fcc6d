"""The bound's density where a token may have become any other, in closed form.

    D = KL(q(.|x) || q(.|p)) + rho - log rho - 1,    rho = q(z | x) / q(z | p),    q(.|p) = alpha p + mask m + uniform u

(GIDD, 2503.04482; with its weight it is the rate matching of a continuous-time Markov chain, and for uniform noise Duo's
2506.10892.) D is 0 where p = x. With c = uniform / N and kappa = alpha / c, over the N ids that may stand there

    KL      = (alpha + c) log(1 + kappa) - alpha l_x - c sum_j l_j,        l_j = log(1 + kappa p_j)
    log rho = [z = x] log(1 + kappa) - l_z,  and 0 where z is the mask

so that nothing of the vocabulary's size is needed but the sum of l_j. As uniform -> 0 it goes to alpha times the cross-entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from components.precision import precise

LEAST_UNIFORM = 1e-30
"""A share of uniform noise that D cannot tell from none, with alpha N over it a number in float32 for N up to 10^8."""


class _LogSum(torch.autograd.Function):
    """logits -> (log p at two columns, sum_j log(1 + kappa p_j)), holding the probabilities alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, columns: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        log_p = logits.log_softmax(dim=-1)
        at = log_p.gather(-1, columns)
        p = log_p.exp_()
        ctx.save_for_backward(p, columns, kappa)
        return at, torch.log1p(kappa[:, None] * p).sum(dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        p, columns, kappa = ctx.saved_tensors
        at, total = grads
        slope = p * (total * kappa)[:, None] / (1 + kappa[:, None] * p)
        out = slope - p * (slope.sum(dim=-1) + at.sum(dim=-1))[:, None]
        return out.scatter_add_(-1, columns, at), None, None


def divergence(
    logits: Float[Tensor, "n ids"],
    target: Int[Tensor, " n"],
    place: Int[Tensor, " n"],
    alpha: Float[Tensor, " n"],
    uniform: Float[Tensor, " n"],
    size: int | Int[Tensor, " n"],
) -> Float[Tensor, " n"]:
    """D from logits, in nats.

    target, place: columns of x, and of z (-1: the mask);  size: N, the ids that may stand there; the others' logits are -inf
    """
    kappa = alpha * size / uniform
    columns = torch.stack([target, place.clamp(min=0)], dim=1)
    log_p, total = _LogSum.apply(precise(logits), columns, kappa.to(precise(logits).dtype))
    return density(log_p[:, 0], log_p[:, 1], total, target == place, place < 0, alpha, uniform / size)


def density(
    log_p_x: Float[Tensor, " n"],
    log_p_z: Float[Tensor, " n"],
    total: Float[Tensor, " n"],
    clean: Bool[Tensor, " n"],
    masked: Bool[Tensor, " n"],
    alpha: Float[Tensor, " n"],
    each: Float[Tensor, " n"],
) -> Float[Tensor, " n"]:
    """D from what it needs of a distribution. total: sum_j log(1 + kappa p_j);  each: uniform / N"""
    kappa = alpha / each
    whole = torch.log1p(kappa)
    kl = (alpha + each) * whole - alpha * torch.log1p(kappa * log_p_x.exp()) - each * total
    log_rho = torch.where(clean, whole, 0.0) - torch.log1p(kappa * log_p_z.exp())
    log_rho = torch.where(masked, 0.0, log_rho)
    return kl + torch.expm1(log_rho) - log_rho


def chunked_divergence(
    hidden: Float[Tensor, "n width"],
    pieces: Sequence[Float[Tensor, "_ width"]],
    ruled_out: int,
    log_z: Float[Tensor, " n"],
    logits: Float[Tensor, "n 2"],
    columns: Int[Tensor, "n 2"],
    masked: Bool[Tensor, " n"],
    tilt: Float[Tensor, " n"] | None,
    alpha: Float[Tensor, " n"],
    each: Float[Tensor, " n"],
) -> Float[Tensor, " n"]:
    """D where the ids go in pieces of the unembedding, each computed again in the backward pass.

    log_z:           log-sum-exp of all logits;  ruled_out: the column that no token is in, the mask's (-1: there is none)
    logits, columns: of x and of z;  masked: where z is the mask, and its column another's
    tilt:            taken off the logit of z
    """
    clean = (columns[:, 0] == columns[:, 1]) & ~masked
    raw_z = logits[:, 1]
    if tilt is not None:  # of the sum over all ids one term is another: exp(log_z) + exp(z - tilt) - exp(z)
        log_z = log_z + torch.log1p((raw_z - log_z).exp() * torch.expm1(-tilt))
        logits = logits - torch.stack([torch.where(clean, tilt, 0.0), tilt], dim=1)
    log_p, kappa = logits - log_z[:, None], alpha / each
    total, start = torch.zeros_like(log_z), 0
    for rows in pieces:
        total = total + checkpoint(_piece, hidden, rows, log_z, kappa, ruled_out - start, use_reentrant=False)
        start += len(rows)
    if tilt is not None:
        total = total - torch.log1p(kappa * (raw_z - log_z).exp()) + torch.log1p(kappa * log_p[:, 1].exp())
    return density(log_p[:, 0], log_p[:, 1], total, clean, masked, alpha, each)


def _piece(
    hidden: Float[Tensor, "n width"],
    rows: Float[Tensor, "rows width"],
    log_z: Float[Tensor, " n"],
    kappa: Float[Tensor, " n"],
    ruled_out: int,
) -> Float[Tensor, " n"]:
    """sum_j log(1 + kappa p_j) over the ids of a piece."""
    each = torch.log1p(kappa[:, None] * (precise(hidden @ rows.T) - log_z[:, None]).exp())
    if 0 <= ruled_out < len(rows):
        each = each.index_fill(1, torch.tensor(ruled_out, device=each.device), 0.0)
    return each.sum(dim=1)
