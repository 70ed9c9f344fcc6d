"""Orders that are learned: masks whose rates depend on position and content.

OeMDM and LoMDM (arXiv 2602.02112), GenMD4 (2406.04329):

    q(x_i is masked at t) = t^e_i,    e_i(x) > 0 the position's exponent;    r_i(z) > 0 what the reverse process takes for it

    NELBO = int_0^1 dt/t  E_z  sum over masked i of  D_i,        D = -e log p(x_i | z) + e log(e / r) - (e - r)

The second and third term are a divergence of rates, never negative and 0 where they agree (`velocity`). Position i is generated
at a time T_i with -log T_i ~ Exp(e_i), so *the order is Plackett-Luce's with weights e*: the next one is i with probability
e_i / E, E = sum of e over masked positions; and the state lasts 1 / E on the average. So time can be integrated out exactly:

    NELBO = E over k ~ U{1..L} and the order of  [ L / E(z) * sum over masked i of D_i ],    z: its k - 1 first are not masked

which with equal exponents is the fixed count of components/maskers.py, with the same masks. As there, how many positions are
masked is known on the CPU. Scaling all e and r by one number changes nothing. In GenMD4 e_i = w of the token at i, and the
reverse process has a rate w_v p_v for each id v: it is the above with r = sum_v w_v p_v, and p tilted to w_v p_v / r.

Which positions are masked depends on e too: its gradient needs `leave_one_out` over two samples (RLOO) beside that of D.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.maskers import LowDiscrepancyTimes, TimeSampler, counts, documents
from components.noise import sample_rng
from components.types import Arrivals, Batch, NoisyBatch

STREAMS = ("mask", "second")  # of the samples' random numbers


def exponents(
    scores: Float[Tensor, "*samples documents positions"],
    there: Bool[Tensor, "documents positions"],
    mean: float,
    spread: float,
) -> Float[Tensor, "*samples documents positions"]:
    """mean + spread (sigmoid(score) - the document's mean of it): within mean +- spread, `mean` on the average (LoMDM).

    Scores are first taken from their mean over the document, which changes what can be said little, and keeps them where a
    sigmoid has a slope: what is common to all has no gradient, and an optimizer that divides by its size moves it all the same.

    there: which positions a document has; the mean is over them, masked or not, so that forward and reverse exponents compare
    """
    count = there.sum(dim=-1, keepdim=True).clamp(min=1)
    level = (scores - scores.masked_fill(~there, 0.0).sum(dim=-1, keepdim=True) / count).sigmoid()
    average = level.masked_fill(~there, 0.0).sum(dim=-1, keepdim=True) / count
    return mean + spread * (level - average)


def velocity(forward: Float[Tensor, "*shape"], reverse: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """f log(f / r) - (f - r) of the forward and the reverse process's rates: at least 0, and 0 where they agree."""
    return torch.xlogy(forward, forward) - torch.xlogy(forward, reverse) - (forward - reverse)


def density(
    nats: Float[Tensor, "*shape"], forward: Float[Tensor, "*shape"], reverse: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """What a masked position adds to the bound, from -log p and any rates of unmasking A = -alpha' / (1 - alpha)."""
    return forward * nats + velocity(forward, reverse)


def ranks(
    arrival: Float[Tensor, "*samples documents positions"],
    exponent: Float[Tensor, "*#samples documents positions"],
    there: Bool[Tensor, "documents positions"],
) -> Int[Tensor, "*samples documents positions"]:
    """The place of each position in the order, 0 the first generated; those that are not there come last.

    arrival: -log u, u ~ U(0, 1): divided by the exponents, the smaller the earlier
    """
    return (arrival / exponent.detach()).masked_fill(~there, float("inf")).argsort(dim=-1, stable=True).argsort(dim=-1)


def log_probability(
    exponent: Float[Tensor, "*#samples documents positions"],
    rank: Int[Tensor, "*samples documents positions"],
    there: Bool[Tensor, "documents positions"],
    first: Int[Tensor, " documents"] | None = None,
) -> Float[Tensor, "*samples documents"]:
    """log of the probability that the first ones of an order are these, under Plackett-Luce: sum of log(e / E) over them.

    first: how many of each document; None is all
    """
    order = rank.argsort(dim=-1)
    some = there.expand(rank.shape).gather(-1, order)
    if first is not None:
        some = some & (torch.arange(rank.shape[-1], device=rank.device) < first[:, None])
    weights = exponent.masked_fill(~there, 0.0).expand(rank.shape).gather(-1, order)
    left = weights.flip(-1).cumsum(dim=-1).flip(-1)
    return torch.where(some, weights, 1.0).log().sum(dim=-1) - torch.where(some, left, 1.0).log().sum(dim=-1)


def expected_rank(
    exponent: Float[Tensor, "*shape positions"], there: Bool[Tensor, "*shape positions"]
) -> Float[Tensor, "*shape positions"]:
    """Where in the order each position comes on the average, 1 the first: 1 + sum over others j of e_j / (e_i + e_j)."""
    weights = exponent.masked_fill(~there, 0.0)
    before = weights[..., None, :] / (exponent[..., :, None] + weights[..., None, :])
    return 0.5 + before.sum(dim=-1)  # with itself it is 1/2


def leave_one_out(
    losses: Float[Tensor, "2 documents"], log_probability: Float[Tensor, "2 documents"]
) -> Float[Tensor, " documents"]:
    """0, with the gradient that the losses have because what was drawn depends on the parameters (RLOO with two samples).

    It is 1/2 (L1 - L2) (grad log q(z1) - grad log q(z2)), to be added to the mean of the losses.
    """
    first, second = losses.detach()
    surrogate = 0.5 * (first - second) * (log_probability[0] - log_probability[1])
    return surrogate - surrogate.detach()


@dataclass(frozen=True)
class LearnedOrderMasker:
    """Draws how many positions are masked, as FixedCountMasker does, and the chance in which; the model has the rest.

    samples: masks of a sequence, all of one count: two in training, since the gradient needs two; one is enough to evaluate
    """

    mask_id: int
    times: TimeSampler = field(default_factory=LowDiscrepancyTimes)
    samples: int = 2
    seed: int = 0
    pairs = False

    def __post_init__(self) -> None:
        if self.samples not in (1, 2):
            raise ValueError(f"LearnedOrderMasker: samples must be 2, or 1 to evaluate; got {self.samples}")

    def __call__(self, batch: Batch) -> NoisyBatch:
        maskable, id_range = batch.maskable.numpy(), batch.id_range.numpy()
        weight = np.zeros(batch.tokens.shape)
        most = np.zeros(max(int(id_range.max(initial=0)), 0) + 1, dtype=np.int64)
        found: list[tuple[np.ndarray, np.ndarray, int]] = []
        for row, span, index in documents(batch):
            where = span.start + np.flatnonzero(maskable[row, span])
            length = len(where)
            if length == 0:
                continue
            fewest, largest = counts(length, 0.0, 1.0)
            masked = fewest + int(self.times(self.seed, index) * (largest - fewest + 1))
            uniform = np.stack([sample_rng(self.seed, s, index).random(length) for s in STREAMS[: self.samples]])
            weight[row, where] = length
            most += np.minimum(np.bincount(id_range[row, where], minlength=len(most)), masked)
            arrival = -np.log(np.maximum(uniform, np.finfo(np.float64).tiny))
            found.append((row * batch.tokens.shape[1] + where, arrival, masked))
        longest = max([len(where) for where, _, _ in found], default=0)
        place = np.zeros((len(found), longest), dtype=np.int64)
        there = np.zeros((len(found), longest), dtype=bool)
        arrivals = np.zeros((self.samples, len(found), longest))
        for i, (where, arrival, _) in enumerate(found):
            own = slice(len(where))
            place[i, own], there[i, own], arrivals[:, i, own] = where, True, arrival
        noise = Arrivals(
            torch.from_numpy(place),
            torch.from_numpy(there),
            torch.from_numpy(arrivals),
            torch.tensor([masked for _, _, masked in found], dtype=torch.long),
            tuple(most.tolist()),
        )
        return NoisyBatch(batch, batch.tokens, batch.maskable, torch.from_numpy(weight).float(), arrivals=noise)
