"""Any order in one pass: against a pass for every token, in the harness and in evaluate, and what it costs."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from torch.testing import assert_close

from components.likelihood import ordered
from components.orders import Sequential
from components.sequences import TokenSequence, collate
from components.types import Batch
from components.vocabulary import Vocabulary
from mdm.data.settings import StreamSettings
from mdm.data.validation import validation_batches
from mdm.evaluation.nelbo import nelbo, task_bits
from mdm.evaluation.order_likelihood import any_order_nelbo, left_to_right_figures, ordered_nats
from mdm.hardware import hardware
from mdm.models import builders
from mdm.models.two_stream import UNKNOWN, hidden_at

VOCABULARY = Vocabulary.build({"text": (9,)}, may_end=(), tasks=["text"])


@pytest.fixture(scope="module")
def model():
    model = builders.model(VOCABULARY.size, 32, 16, 2, 2, orders="two_streams")
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.unembedding.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model.eval()


def batch():
    """Prompts of unlike lengths, and an answer each."""
    rows = []
    for i, (given, length) in enumerate(((3, 9), (1, 6))):
        tokens = torch.randint(9, (length,), generator=torch.Generator().manual_seed(i))
        maskable = torch.arange(length) >= given
        zeros = torch.zeros(length, dtype=torch.long)
        rows.append(TokenSequence(tokens, zeros, zeros, maskable, ~maskable))
    return collate([[r] for r in rows], [[0], [1]], VOCABULARY.pad_id)


def rank_by_rank(model, batch, mask_id):
    """A logits function of masked rows, as `ordered` wants it: what is known has come from left to right, one at a time, behind
    a prompt that is a group."""

    def logits(tokens):
        position = torch.arange(tokens.shape[1]).expand_as(tokens)
        rank = torch.where(batch.maskable, position, 0).masked_fill(tokens == mask_id, UNKNOWN)
        rank = rank.masked_fill(batch.document < 0, UNKNOWN)
        return model.unembedding(hidden_at(model, tokens, rank, position, position, mask_id))

    return logits


def test_one_pass_says_what_a_pass_for_every_token_says(model):
    passes, own, hidden = [], batch(), model.hidden
    model.hidden = lambda *a, **k: passes.append(1) or hidden(*a, **k)
    try:
        nats = ordered_nats(model, own, VOCABULARY, Sequential())
        once, rows = len(passes), []
        for row in range(2):
            part = own.select(torch.tensor([row]))
            net = rank_by_rank(model, part, VOCABULARY.mask_id)
            allowed = VOCABULARY.allowed(part.id_range)
            rows.append(-ordered(net, part.tokens, VOCABULARY.mask_id, part.maskable, allowed=allowed, batch_size=1).sum())
    finally:
        model.hidden = hidden
    assert_close(nats, torch.stack(rows), atol=1e-5, rtol=0)
    assert once == 1
    assert len(passes) - once == int(own.maskable.sum())  # L times as many


def test_draws_are_orders_and_their_mean_a_bound_with_an_error(model):
    own = batch()
    bound = any_order_nelbo(model, own, VOCABULARY, draws=64, batch_size=50)
    again = any_order_nelbo(model, own, VOCABULARY, draws=64, batch_size=7)
    assert torch.equal(bound.nats, again.nats)  # an order does not depend on the batch
    assert bool((bound.error > 0).all())
    other = any_order_nelbo(model, own, VOCABULARY, draws=64, seed=1)
    assert not torch.equal(bound.nats, other.nats)
    assert bool(((bound.nats - other.nats).abs() < 5 * (bound.error**2 + other.error**2).sqrt()).all())


def test_padding_is_no_part_of_a_rows_likelihood(model):
    padded = batch().select(torch.tensor([1, 0]))  # the shorter one first: its orders are those of index 0 and on
    alone = Batch(*(getattr(padded, f.name)[:1, :6] for f in fields(padded)))
    for nats in (
        lambda rows: ordered_nats(model, rows, VOCABULARY),
        lambda rows: any_order_nelbo(model, rows, VOCABULARY, draws=8).nats,
    ):
        assert_close(nats(padded)[:1], nats(alone), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def spoken():
    """A processor of text, and an untrained model of two streams."""
    from components.tokenizers.text import TextTokenizer
    from mdm.data.processor import Processor

    processor = Processor.build({"text": TextTokenizer.train(["a spoken nine seven"] * 9, vocab_size=270)}, {}, tasks=["text"])
    net = builders.model(processor.vocabulary.size, 32, 16, 2, 2, orders="two_streams")
    net.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        net.unembedding.weight *= 8
    return processor, net.eval()


def test_evaluate_reports_left_to_right_beside_the_mean_over_orders(spoken):
    processor, net = spoken
    source = {"_component_": "x"}
    data = {"text": StreamSettings({"text": 1.0}, 1, source, validation=source, pack=12)}
    held_out = {"text": [{"text": "a spoken nine"}, {"text": "seven spoken seven"}]}
    with hardware("cpu", "fp32") as hw:
        found = left_to_right_figures(data, held_out, processor, net, hw, samples=2)
        masked = builders.model(processor.vocabulary.size, 32, 16, 2, 2)
        assert left_to_right_figures(data, held_out, processor, masked, hw, samples=2) == {}
        plan = validation_batches(data, held_out, processor, 2, model=net.config)
        assert found["text_left_to_right_bits_per_token"] != pytest.approx(
            task_bits(nelbo(net, plan, processor.vocabulary, hw), plan)["text"]
        )
    ((micro, tokens),) = plan["text"]
    ranks = micro.noisy.block[micro.noisy.clean.maskable]
    assert ranks.tolist() != ranks.sort().values.tolist()  # a permutation
    nats = ordered_nats(net, micro.noisy.clean, processor.vocabulary)
    assert found == {"text_left_to_right_bits_per_token": pytest.approx(float(nats.sum()) / math.log(2) / tokens, rel=1e-4)}


def test_the_harness_scores_in_one_pass(spoken):
    pytest.importorskip("lm_eval", reason="the eval extra is not installed")
    from mdm.evaluation.harness import HarnessModel

    processor, net = spoken
    passes, hidden = [], net.hidden
    net.hidden = lambda *a, **k: passes.append(1) or hidden(*a, **k)
    asked = HarnessModel(net, processor, likelihood="left_to_right")
    tokens, scored = asked.row(asked.tok_encode("a spoken"), asked.tok_encode(" nine"))
    value = asked.log_likelihood(tokens, scored)
    assert len(passes) == 1
    by_orders = HarnessModel(net, processor, likelihood="nelbo", draws=32).log_likelihood(tokens, scored)
    assert -40 < value < 0
    assert by_orders == pytest.approx(value, abs=4.0)
    tokens, scored = asked.row(asked.tok_encode("a"), asked.tok_encode(" spoken nine seven nine"))
    ways = [{}, {"seed": 1}, {"draws": 31}]  # each is asked for; of a single token all orders are the same
    others = {HarnessModel(net, processor, **{"draws": 32, **own}).log_likelihood(tokens, scored) for own in ways}
    assert len(others) == 3
    assert asked.is_greedy(asked.tok_encode("a spoken"), asked.tok_encode(" nine")) in (True, False)
