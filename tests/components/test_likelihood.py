"""Against enumeration: the tiny joint's own conditionals, and those of an imperfect model."""

import itertools
import math

import pytest
import torch

from components.likelihood import nelbo, ordered
from tests.oracles import LENGTH, MASK, SYMBOLS, all_sequences, exact_conditionals, tiny_joint

JOINT = tiny_joint()
SEQUENCES = all_sequences()


def exact(tokens):
    return exact_conditionals(JOINT, tokens)


def imperfect(tokens):
    """Conditionals that are no joint's: flattened by as much as is masked."""
    masked = (tokens == MASK).sum(1, keepdim=True)[..., None]
    return exact_conditionals(JOINT, tokens) / (1 + 0.3 * masked)


def chain(fn, row, order):
    """log p of a sequence in an order, one conditional at a time."""
    known = torch.full((LENGTH,), MASK)
    total = 0.0
    for i in order:
        logits = fn(known[None])[0, i, :SYMBOLS]
        total += logits.log_softmax(-1)[row[i]].item()
        known[i] = row[i]
    return total


@pytest.mark.parametrize("fn", [exact, imperfect])
def test_conditional_scores_are_the_chain_rule_in_every_order(fn):
    for order in itertools.permutations(range(LENGTH)):
        rank = torch.tensor([order.index(i) for i in range(LENGTH)]).expand(64, -1)
        got = ordered(fn, SEQUENCES, MASK, order=rank, batch_size=7).sum(1)
        want = torch.tensor([chain(fn, row, order) for row in SEQUENCES], dtype=torch.float64)
        torch.testing.assert_close(got, want, atol=1e-9, rtol=0)


def test_with_exact_conditionals_every_order_gives_the_joint():
    torch.testing.assert_close(ordered(exact, SEQUENCES, MASK).sum(1), JOINT.flatten().log(), atol=1e-9, rtol=0)


def test_nelbo_is_the_mean_over_orders():
    """Within 5 of its own standard errors for every sequence; and the error says what the spread over seeds is."""
    want = torch.tensor(
        [-sum(chain(imperfect, row, o) for o in itertools.permutations(range(LENGTH))) / 6 for row in SEQUENCES]
    )
    bound = nelbo(imperfect, SEQUENCES, MASK, draws=600)
    assert ((bound.nats - want).abs() < 5 * bound.error).all()
    assert (want > -JOINT.flatten().log() - 1).any()
    few = torch.stack([nelbo(imperfect, SEQUENCES[:1], MASK, draws=12, seed=s).nats for s in range(200)])
    stated = nelbo(imperfect, SEQUENCES[:1], MASK, draws=12 * 200).error * math.sqrt(200)
    assert few.std().item() < 1.1 * stated.item()  # strata can only help


def test_the_mask_token_has_no_share_and_every_row_its_own_ids():
    """Logits that are all equal: the probability of a token is one over the number of ids that may stand there."""

    def flat(tokens):
        return torch.zeros(*tokens.shape, MASK + 1, dtype=torch.float64)

    rows, ids = SEQUENCES[:2] % 2, torch.arange(MASK + 1)
    allowed = torch.stack([ids < 2, ids < 3])[:, None].expand(-1, LENGTH, -1)
    for given, shares in ((None, [SYMBOLS, SYMBOLS]), (allowed, [2, 3])):
        want = -torch.tensor(shares, dtype=torch.float64).log()[:, None].expand(-1, LENGTH)
        torch.testing.assert_close(ordered(flat, rows, MASK, allowed=given), want)


def test_strata_cover_every_mask_count():
    """With as many draws as positions each count comes once: no variance is left from k."""
    seen = []

    def fn(tokens):
        seen.append((tokens == MASK).sum(1))
        return exact(tokens)

    nelbo(fn, SEQUENCES[:5], MASK, draws=LENGTH)
    assert torch.cat(seen).view(5, LENGTH).sort(1).values.tolist() == [[1, 2, 3]] * 5


def test_the_likelihood_of_some_positions_is_given_the_others():
    scored = torch.tensor([False, True, True]).expand(64, -1)
    want = (JOINT / JOINT.sum((1, 2), keepdim=True)).flatten().log()
    per_token = ordered(exact, SEQUENCES, MASK, scored)
    torch.testing.assert_close(per_token.sum(1), want, atol=1e-9, rtol=0)
    assert (per_token[:, 0] == 0).all()
    bound = nelbo(exact, SEQUENCES, MASK, scored, draws=400)
    assert ((bound.nats + want).abs() < 5 * bound.error + 1e-9).all()


def test_only_allowed_ids_share_the_probability():
    allowed = torch.tensor([True, True, False, False, False]).expand(1, LENGTH, -1)
    rows = SEQUENCES[(SEQUENCES < 2).all(1)]
    restricted = ordered(exact, rows, MASK, allowed=allowed)
    assert (restricted > ordered(exact, rows, MASK)).all()
    total = ordered(lambda t: exact(t), rows, MASK, allowed=allowed).sum(1).exp().sum()
    assert total.item() == pytest.approx(1.0, abs=1e-9)


def test_the_error_falls_with_the_root_of_the_draws():
    """It is that of the mean: a hundredfold of draws, a tenth of it (to 10 %: 9 sequences' own errors are averaged)."""
    few, many = (nelbo(imperfect, SEQUENCES[::7][:9], MASK, draws=n).error.mean().item() for n in (60, 6000))
    assert few == pytest.approx(10 * many, rel=0.1)


def test_the_callers_logits_are_not_written_to():
    own = torch.randn(1, LENGTH, MASK + 1, generator=torch.Generator().manual_seed(0))
    before = own.clone()
    for allowed in (None, torch.ones(1, 1, MASK + 1, dtype=torch.bool)):
        ordered(lambda t: own, SEQUENCES[:1], MASK, allowed=allowed, batch_size=1)
    assert torch.equal(own, before)


@pytest.mark.parametrize("score", [nelbo, ordered])
def test_a_token_that_may_not_stand_there_is_named(score):
    allowed = torch.tensor([True, True, False, True, True]).expand(1, LENGTH, -1)
    with pytest.raises(ValueError, match="token 2 at position 1 of row 1 is not allowed there"):
        score(exact, torch.tensor([[0, 1, 1], [0, 2, 2]]), MASK, allowed=allowed)
    with pytest.raises(ValueError, match=f"token {MASK} at position 2 of row 0 is the mask token"):
        score(exact, torch.tensor([[0, 1, MASK]]), MASK, allowed=allowed)
    given = torch.tensor([[True, True, False]])
    assert score(exact, torch.tensor([[0, 1, MASK]]), MASK, given, allowed=allowed) is not None  # what is given may be anything


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits_are_named(value):
    def broken(tokens):
        logits = torch.zeros(*tokens.shape, MASK + 1)
        logits[:, 1, 0] = value
        return logits

    with pytest.raises(ValueError, match="the logits at position 1 of row 1 are NaN, infinite"):
        nelbo(broken, torch.tensor([[0, 1, 2], [0, 1, 2]]), MASK, torch.tensor([[True, False, False], [True, True, True]]))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="row 1 has no scored position"):
        ordered(exact, SEQUENCES[:2], MASK, torch.tensor([[True, True, True], [False, False, False]]))
    with pytest.raises(ValueError, match="draws must be at least 2, got 1"):
        nelbo(exact, SEQUENCES, MASK, draws=1)
