"""Which shares of a block to mask in training: those that make the loss least noisy (BD3-LM's search, 2503.09573).

An estimate of a block's loss has more variance the wider its counts are spread: hardly masked ones say little and weigh much,
entirely masked ones are always hard. With a fixed count, those of an estimate that fall between two shares are what a masker
clipped to these shares would have drawn. So one set of estimates says what each range would give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from components.maskers import counts

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Clipped(NamedTuple):
    """least, most: shares of a block that are masked;  variance: of an estimate;  draws: estimates that it is known from"""

    least: float
    most: float
    variance: float
    draws: int


def clipped(
    masked: Int[Tensor, " draws"],
    length: Int[Tensor, " draws"],
    loss: Float[Tensor, " draws"],
    width: float = 0.3,
    shares: Sequence[float] = SHARES,
) -> list[Clipped]:
    """Of every range of shares at least so wide, the variance of the loss, the least first.

    masked, length: of each estimate, the positions of its block that were masked, and all that could be
    loss:           of that block, per position, weighted: L / k times the cross-entropy at k masked positions, over L
    width:          a narrow range trains one noise level alone

    Raises ValueError where no range holds two estimates.
    """
    found = []
    for least in shares:
        for most in shares:
            if most - least < width - 1e-9:
                continue
            own = loss[_within(masked, length, least, most)].double()
            if len(own) > 1:
                found.append(Clipped(least, most, float(own.var()), len(own)))
    if not found:
        raise ValueError(f"clipped: {len(loss)} estimates are too few; every range of shares needs two")
    return sorted(found, key=lambda c: (c.variance, c.least - c.most))


def _within(masked: Tensor, length: Tensor, least: float, most: float) -> Tensor:
    """Which estimates a `FixedCountMasker` of these shares could have drawn."""
    bounds = {n: counts(n, least, most) for n in length.unique().tolist()}
    fewest, largest = (torch.tensor([bounds[n][i] for n in length.tolist()], device=masked.device) for i in (0, 1))
    return (masked >= fewest) & (masked <= largest)
