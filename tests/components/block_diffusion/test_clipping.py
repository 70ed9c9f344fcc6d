"""The variance of clipped counts, from unclipped estimates, is that of a clipped masker's own."""

from __future__ import annotations

import pytest
import torch

from components.block_diffusion.clipping import clipped
from components.maskers import FixedCountMasker, LowDiscrepancyTimes
from components.types import Batch

LENGTH, ROWS = 10, 20_000
HARD = torch.linspace(0.5, 3.0, LENGTH)  # nats of each position


def drawn(least=0.0, most=1.0):
    """Counts, lengths and losses of blocks whose positions are the harder the more of them are masked."""
    masker = FixedCountMasker(9, LowDiscrepancyTimes(64), least=least, most=most)
    noisy = masker(Batch.of(torch.zeros(ROWS, LENGTH, dtype=torch.long), 0))
    masked = noisy.mask.sum(dim=1)
    return masked, torch.full((ROWS,), LENGTH), (noisy.weight * HARD).sum(dim=1) / LENGTH * (masked / LENGTH)


def test_one_set_of_estimates_says_what_each_range_would_give():
    """The ratio of two variances over n independent draws of a bounded loss: 5 % is some five standard errors."""
    found = clipped(*drawn())
    by_range = {(c.least, c.most): c for c in found}
    for least, most in ((0.0, 1.0), (0.3, 0.8), (0.5, 1.0)):
        assert by_range[least, most].variance == pytest.approx(float(drawn(least, most)[2].var()), rel=0.05)
    assert by_range[0.0, 1.0].draws == ROWS
    assert [c.variance for c in found] == sorted(c.variance for c in found)
    assert all(c.most - c.least > 0.29 for c in found)


def test_where_counts_are_the_same_the_widest_range_is_the_first():
    one = torch.ones(8, dtype=torch.long)
    assert clipped(one, one, torch.arange(8.0))[0][:2] == (0.0, 1.0)
    with pytest.raises(ValueError, match="1 estimates are too few"):
        clipped(one[:1], one[:1], torch.ones(1))
