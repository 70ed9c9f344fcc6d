"""Every rule against its definition in words, its transitivity, and what leaks through layers of attention: nothing."""

from __future__ import annotations

import itertools

import pytest
import torch

from components.visibility import (
    FINISHED,
    NOISY,
    Places,
    attention_mask,
    block_causal,
    causal,
    doubled,
    doubled_causal,
    same_document,
    two_streams,
)

RULES = {r.__name__: r for r in (same_document, causal, block_causal, doubled, doubled_causal, two_streams)}


def places():
    """Two documents and padding in a row, of three and two blocks, each position once noisy and once finished."""
    document = [0] * 6 + [1] * 4 + [-1] * 2
    position = [*range(6), *range(4), 0, 0]
    block = [0, 1, 1, 2, 2, 2, 0, 0, 1, 1, 0, 0]
    twice = [torch.tensor([v + v]) for v in (document, position, block)]
    return Places(*twice, torch.tensor([[NOISY] * 12 + [FINISHED] * 12]))


def spelt(name, q, k):
    """The rules in words, one pair at a time: (document, position, block, stream)."""
    if q[0] != k[0]:
        return False
    if name == "same_document":
        return True
    if name == "causal":
        return k[1] <= q[1]
    if name == "block_causal":
        return k[2] <= q[2]
    if name == "two_streams":
        return k[3] == FINISHED and (k[2] < q[2] or (q[3] == FINISHED and k[2] == q[2]))
    if q[3] == NOISY:
        return k[2] == q[2] if k[3] == NOISY else k[2] < q[2]
    if k[3] == NOISY:
        return False
    return k[2] <= q[2] if name == "doubled" else k[1] <= q[1]


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_what_it_says(name):
    at = places()
    known = list(zip(*(v[0].tolist() for v in (at.document, at.position, at.block, at.stream)), strict=True))
    want = torch.tensor([[spelt(name, q, k) for k in known] for q in known])
    assert torch.equal(attention_mask(RULES[name], at)[0], want)
    some = at.map(lambda own: own[:, 3:7])
    assert torch.equal(attention_mask(RULES[name], some, at)[0], want[3:7])


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_transitive_and_everybody_sees_somebody(name):
    """What is not transitive in one layer leaks through two."""
    mask = attention_mask(RULES[name], places())[0]
    reached = (mask.float() @ mask.float()) > 0
    assert not bool((reached & ~mask).any())
    assert bool(mask.diagonal().all()) or name == "two_streams"


def test_a_query_of_two_streams_sees_no_query_not_even_itself():
    mask = attention_mask(two_streams, places())[0]
    assert not bool(mask[:, :12].any())
    assert bool(mask.diagonal()[12:].all())
    content = attention_mask(two_streams, places(), last=12)[0]  # what a pass attends to
    assert torch.equal(content, mask[:, 12:])


def test_a_rule_that_is_not_transitive_would_be_found():
    def leaking(q, k):
        return same_document(q, k) & ((k.position - q.position).abs() <= 1)

    mask = attention_mask(leaking, places())[0]
    assert bool((((mask.float() @ mask.float()) > 0) & ~mask).any())


def test_the_rules_of_doubled_rows_agree_with_those_of_single_ones_on_finished_tokens():
    at = places()
    finished = at.map(lambda own: own[:, 12:])
    for twice, once in ((doubled, block_causal), (doubled_causal, causal)):
        assert torch.equal(attention_mask(twice, at)[0, 12:, 12:], attention_mask(once, finished)[0])
    for a, b in itertools.pairwise((same_document, block_causal)):
        assert not torch.equal(attention_mask(a, finished), attention_mask(b, finished))
