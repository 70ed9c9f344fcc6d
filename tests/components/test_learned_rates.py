"""Sampling by rates: exact one at a time whatever the rates, and Ancestral's steps where all of them are 1."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import chi2

from components.samplers import Ancestral, Blocks, LearnedRates, sample
from components.samplers.base import POSITION, SamplerState
from tests.oracles import LENGTH, MASK, exact_conditionals, tiny_joint

JOINT = tiny_joint()
STATES = torch.cartesian_prod(*[torch.arange(MASK + 1)] * LENGTH)
PLACES = torch.tensor([25, 5, 1])
TABLE = exact_conditionals(JOINT, STATES)
RATES = 0.2 + 2 * torch.rand(len(STATES), LENGTH, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Rated:
    """The joint's conditionals with rates that depend on all that is seen."""

    def __call__(self, tokens):
        return (TABLE + RATES.log())[tokens @ PLACES]

    def select(self, rows):
        return self


def chi_square(observed, p):
    expected = p * observed.sum()
    large = expected >= 5
    o = torch.cat([observed[large], observed[~large].sum()[None]])
    e = torch.cat([expected[large], expected[~large].sum()[None]])
    o, e = o[e > 0], e[e > 0]
    return float(chi2.sf(float(((o - e) ** 2 / e).sum()), len(o) - 1))


def test_one_at_a_time_is_the_joint_and_the_order_that_of_the_rates():
    """p-values under 1e-4 come at one seed in 10,000, and this one is fixed."""
    n, seen = 8000, []
    made = sample(LearnedRates(), Rated(), torch.full((n, LENGTH), MASK), MASK, on_step=lambda s: seen.append(s))
    assert (made.forwards == LENGTH).all()
    counts = torch.bincount((made.tokens * torch.tensor([16, 4, 1])).sum(dim=1), minlength=64).double()
    assert chi_square(counts, JOINT.flatten()) > 1e-4
    first = torch.stack([(~s.masked).sum(dim=0) for s in seen[:1]])[0].double()
    rates = RATES[int(torch.full((LENGTH,), MASK) @ PLACES), :, 0]
    assert chi_square(first, rates / rates.sum()) > 1e-4
    assert chi_square(first, torch.full((LENGTH,), 1 / LENGTH, dtype=torch.float64)) < 1e-6  # it is not any order
    wait = -seen[0].time.log()  # until the first of all: exponential of the sum of rates
    assert float(wait.mean()) == pytest.approx(1 / float(rates.sum()), rel=5 / math.sqrt(n))


def test_where_all_rates_are_1_a_grid_is_ancestrals():
    fn, start = lambda tokens: TABLE[tokens @ PLACES], torch.full((200, LENGTH), MASK)
    ours = sample(LearnedRates(num_steps=5, top_p=0.9), fn, start, MASK, seed=3)
    theirs = sample(Ancestral(num_steps=5, top_p=0.9), fn, start, MASK, seed=3)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.forwards, theirs.forwards)


def test_a_step_of_a_grid_unmasks_with_the_probability_of_its_rate():
    rates = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    logits = torch.zeros(1, LENGTH, MASK + 1, dtype=torch.float64).log_softmax(-1) + rates.log()[:, None]
    state = SamplerState.start(torch.full((1, LENGTH), MASK), torch.ones(1, LENGTH, dtype=torch.bool), MASK)
    for t, step in ((1.0, 0), (0.75, 1)):
        chance = 1 - ((t - 0.25) / t) ** rates
        for off, unmasked in ((-1e-9, True), (1e-9, False)):
            uniform = torch.full((1, 3, LENGTH), 0.5, dtype=torch.float64)
            uniform[0, POSITION] = chance + off
            at = replace(state, uniform=uniform, time=torch.tensor([t]).double(), step=torch.tensor([step]))
            assert (~LearnedRates(num_steps=4).step(logits, at).masked == unmasked).all()


def test_temperature_changes_tokens_and_no_rate():
    start = torch.full((300, LENGTH), MASK)
    hot, cold = [], []
    sample(LearnedRates(num_steps=4), Rated(), start, MASK, on_step=lambda s: hot.append(s.masked))
    greedy = sample(LearnedRates(num_steps=4, temperature=0.0), Rated(), start, MASK, on_step=lambda s: cold.append(s.masked))
    assert torch.equal(hot[0], cold[0])
    assert len(greedy.tokens.unique(dim=0)) < 30


def test_it_works_inside_blocks_and_refuses_no_steps():
    made = sample(Blocks(LearnedRates(), block_length=1), Rated(), torch.full((2, LENGTH), MASK), MASK)
    assert (made.tokens < MASK).all()
    with pytest.raises(ValueError, match="LearnedRates: num_steps must be at least 1, got 0"):
        LearnedRates(num_steps=0)
