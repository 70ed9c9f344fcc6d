"""The loss of learned orders against a loop over documents and positions, and against fixed counts where nothing is learned."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from components.learned_orders import LearnedOrderMasker, density
from components.maskers import FixedCountMasker
from components.types import Batch
from mdm.config import UserError
from mdm.data.corruption import check_autoregressive
from mdm.data.pipeline import micro_batch
from mdm.data.settings import LossSettings
from mdm.evaluation import order_loss as module
from mdm.evaluation.nelbo import forward_loss
from mdm.evaluation.order_loss import document_nats, draw_masks, order_loss, order_nelbo
from mdm.hardware import Hardware
from mdm.models import builders
from mdm.models.orders import LearnedOrder
from mdm.models.transformer import MaskedDiffusionModel

CPU = Hardware(torch.device("cpu"), 0, 1, True)


def model_of(vocabulary, orders="learned", mean=0.7, spread=0.65, noise=0.5):
    config = builders.model(vocabulary.size, 32, 32, 2, 2, orders=orders).config
    model = MaskedDiffusionModel(replace(config, order_mean=mean, order_spread=spread))
    model.init_weights(torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "score" in name or name == "order.bias":
                p.normal_(0, noise / (10 if "score" in name else 1), generator=rng)  # scores are ten times as large
    return model


def micro_of(vocabulary, batch, samples=2, reduction="token", packed=False):
    masker = LearnedOrderMasker(vocabulary.mask_id, samples=samples, seed=3)
    return micro_batch(batch, masker, LossSettings(reduction=reduction), vocabulary, packed)


@pytest.mark.parametrize("task", ["text_to_image", "text_to_speech", "joint_text_image"])
@pytest.mark.parametrize("orders", ["learned", "learned_by_token"])
def test_loss_and_bound_are_those_of_a_loop_over_documents(vocabulary, make_batch, orders, task):
    model, batch = model_of(vocabulary, orders).double(), make_batch(rows=3, task=task)
    by_range, losses = torch.zeros(len(vocabulary.ranges), dtype=torch.float64), []
    sums = {r: order_loss(model, micro_of(vocabulary, batch, 2, r), vocabulary) for r in ("token", "sequence")}
    noise = micro_of(vocabulary, batch).noisy.arrivals
    rates = model.order().exp() if orders == "learned_by_token" else None
    for row in range(3):
        where = batch.maskable[row].nonzero()[:, 0]
        length, x = len(where), batch.tokens[row]

        def of(head, z, where=where):
            score = head(model.hidden(z[None]))[0, where]
            score = (score - score.mean()).sigmoid()
            return 0.7 + 0.65 * (score - score.mean())

        e = rates[x[where]] if rates is not None else of(model.order.clean, x)
        for sample in range(2):
            time = noise.arrival[sample, row, :length] / e
            chosen = time.argsort()[length - int(noise.masked[row]) :]
            z = x.clone()
            z[where[chosen]] = vocabulary.mask_id
            log_p = vocabulary.restrict(model(z[None]), batch.id_range[row][None]).log_softmax(-1)[0, where]
            own, loss = log_p.gather(-1, x[where, None])[:, 0], 0.0
            r = None if rates is not None else of(model.order.noisy, z)
            for i in chosen.tolist():
                if rates is not None:  # GenMD4's own formula
                    term = -e[i] * (own[i] + 1) + (rates * log_p[i].exp()).sum()
                else:
                    term = -e[i] * own[i] + e[i] * (e[i] / r[i]).log() - (e[i] - r[i])
                loss = loss + length / e[chosen].sum() * term
                by_range[batch.id_range[row, where[i]]] += float(length / e[chosen].sum() * term) / 2
            losses.append(float(loss) / length)
    assert_close(sums["token"].nelbo, by_range, atol=1e-10, rtol=1e-10)
    assert_close(sums["sequence"].nelbo, by_range, atol=1e-10, rtol=1e-10)
    assert float(sums["token"].loss) == pytest.approx(float(by_range.sum()))
    assert float(sums["sequence"].loss) == pytest.approx(sum(losses) / 2)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_without_a_spread_it_is_the_masked_model_to_the_bit(vocabulary, make_batch, reduction, spread):
    model = model_of(vocabulary, mean=1.0, spread=spread, noise=0.0 if spread else 0.5)  # or before anything is learned
    plain = builders.model(vocabulary.size, 32, 32, 2, 2)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("order.")})
    batch, settings = make_batch(rows=4), LossSettings(reduction=reduction)
    masked = micro_batch(batch, FixedCountMasker(vocabulary.mask_id, seed=3), settings, vocabulary)
    ours = micro_of(vocabulary, batch, 1, reduction)
    assert ours.denominator == masked.denominator
    sums, theirs = forward_loss(model, ours, vocabulary, CPU), forward_loss(plain, masked, vocabulary, CPU)
    assert sums.loss == theirs.loss
    assert torch.equal(sums.nelbo, theirs.nelbo)
    sums.loss.backward()
    theirs.loss.backward()
    assert torch.equal(model.blocks[0].attn.q_proj.weight.grad, plain.blocks[0].attn.q_proj.weight.grad) or spread


def test_a_new_model_has_the_weights_of_a_masked_one_and_every_turn_alike(vocabulary):
    models = [builders.model(vocabulary.size, 32, 32, 2, 2, orders=o) for o in (None, "learned", "learned_by_token")]
    for model in models:
        model.init_weights(torch.Generator().manual_seed(0))
    plain, heads, rates = models
    for other in (heads, rates):
        assert all(torch.equal(other.state_dict()[name], value) for name, value in plain.state_dict().items())
    assert isinstance(heads.order, LearnedOrder)
    assert (heads.order.clean(torch.randn(2, 5, 32)) == 0).all()
    assert_close(rates.order(), torch.zeros(vocabulary.size))


@pytest.mark.parametrize("orders", ["learned", "learned_by_token"])
def test_packed_documents_have_the_bounds_that_they_have_alone(vocabulary, orders):
    model, tokens = model_of(vocabulary, orders), torch.tensor([[1, 3, 0, 5, 2, 6, 4, 1]])
    alone = [Batch.of(tokens[:, :5], 7), Batch.of(tokens[:, 5:], 8)]
    packed = Batch.of(tokens, 7)
    packed.document[:, 5:], packed.position[:, 5:] = 8, torch.arange(3)
    found = document_nats(model, micro_of(vocabulary, packed, packed=True), vocabulary)
    each = [document_nats(model, micro_of(vocabulary, batch), vocabulary)[0] for batch in alone]
    assert_close(found, torch.stack(each), atol=1e-5, rtol=1e-5)


def test_what_the_reverse_process_says_does_not_see_what_is_masked(vocabulary, make_batch, monkeypatch):
    model, batch = model_of(vocabulary), make_batch(rows=4)
    monkeypatch.setattr(module, "forward_exponents", lambda model, micro, noise: torch.ones(noise.place.shape))  # same masks
    micro = micro_of(vocabulary, batch, samples=1)
    drawn = draw_masks(model, micro, vocabulary.mask_id)
    other = batch.tokens.clone()
    masked = drawn.masked[0].view_as(other)
    other[masked] = vocabulary.ranges[1].start + (other[masked] - vocabulary.ranges[1].start + 1) % 5
    again = draw_masks(model, micro_of(vocabulary, replace(batch, tokens=other), samples=1), vocabulary.mask_id)
    assert not torch.equal(other, batch.tokens)
    for a, b in zip((drawn.hidden, drawn.reverse), (again.hidden, again.reverse), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("orders", ["learned", "learned_by_token"])
def test_every_weight_has_a_gradient_also_where_nothing_is_predicted(vocabulary, make_batch, orders):
    model = model_of(vocabulary, orders)
    batch = make_batch(rows=2, task="text_to_speech")
    for given in (batch, replace(batch, maskable=torch.zeros_like(batch.maskable))):
        model.zero_grad()
        sums = order_loss(model, micro_of(vocabulary, given), vocabulary)
        sums.loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        assert math.isfinite(float(sums.loss))
    assert all(p.grad.abs().max() == 0 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("orders", ["learned", "learned_by_token"])
def test_flops_count_every_pass(vocabulary, orders):
    """Of two documents of 16: the clean rows where heads look at them, both samples, the heads, and the logits of 32 places."""
    model, batch = model_of(vocabulary, orders), Batch.of(torch.arange(32).view(2, 16) % 7, 0)
    with FlopCounterMode(display=False) as counter:
        order_loss(model, micro_of(vocabulary, batch), vocabulary).loss.backward()
    places = 2 * 32  # of two samples; as many as are masked at the most, rounded up to a bucket that is not that small
    assert counter.get_total_flops() == pytest.approx(model.flops(32, 2 * 16**2, places * 8), rel=0.02)


def test_masker_and_model_go_together_and_weights_are_the_bounds(vocabulary):
    learned, plain = model_of(vocabulary).config, builders.model(vocabulary.size, 32, 32, 2, 2).config
    own, fixed = LearnedOrderMasker(0), FixedCountMasker(0)
    for model, masker in ((learned, fixed), (plain, own)):
        with pytest.raises(UserError, match=r"LearnedOrderMasker goes with model.orders=learned"):
            check_autoregressive(model, {"a": masker}, LossSettings())
    with pytest.raises(UserError, match=r"LearnedOrderMasker goes with .* for every stream"):
        check_autoregressive(learned, {"a": own, "b": fixed}, LossSettings())
    with pytest.raises(UserError, match=r"loss.weighting=plain is for masks alone"):
        check_autoregressive(learned, {"a": own}, LossSettings(weighting="plain"))
    with pytest.raises(ValueError, match=r"model.order_spread 0.7 must be less than model.order_mean = 0.7"):
        model_of(vocabulary, spread=0.7)


def enumerated(model, vocabulary, x):
    """The bound of a text of three tokens, by all that may have been unmasked first."""

    def exponents_of(score):
        level = (score - score.mean()).sigmoid()
        return 0.7 + 0.65 * (level - level.mean())

    e, total = exponents_of(model.order.clean(model.hidden(x[None]))[0]), torch.zeros(())
    for order in itertools.chain.from_iterable(itertools.permutations(range(3), k) for k in range(3)):
        chance, left, z = 1.0, [0, 1, 2], x.clone()
        for i in order:  # these are the first
            chance = chance * e[i] / e[left].sum()
            left.remove(i)
        z[left] = vocabulary.mask_id
        hidden = model.hidden(z[None])
        r = exponents_of(model.order.noisy(hidden)[0])[left]
        log_p = model.unembedding(hidden)[0][:, [*range(7), vocabulary.end_id]].log_softmax(-1)
        total = total + chance * density(-log_p[left, x[left]], e[left], r).sum() / e[left].sum()
    return total


def test_the_gradient_of_a_step_is_that_of_the_bound(vocabulary):
    """Of 40 batches of 128 rows with two samples: 4.5 standard errors for each of the 64 weights of both heads' last layers."""
    model, x = model_of(vocabulary, noise=2.0).double(), torch.tensor([1, 3, 0])
    heads = [p for name, p in model.named_parameters() if "score" in name]
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(enumerated(model, vocabulary, x) / 3, heads)])
    found = []
    for step in range(40):
        micro = micro_of(vocabulary, Batch.of(x.expand(128, -1).contiguous(), 128 * step), reduction="sequence")
        drawn = order_loss(model, micro, vocabulary).loss
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(drawn / 128, heads)]))
    found = torch.stack(found)
    error = found.std(dim=0) / len(found) ** 0.5
    assert (((found.mean(dim=0) - exact) / error).abs() < 4.5).all()
    assert float(error.norm()) < 0.1 * float(exact.norm())  # so that a wrong one would be seen


def test_the_bound_of_a_row_is_that_of_all_counts_and_orders(vocabulary):
    """Three tokens, every order and count; 512 stratified draws come near it, within five of their errors."""
    model, batch = model_of(vocabulary).double(), Batch.of(torch.tensor([[1, 3, 0], [6, 6, 2]]), 0)
    bound = order_nelbo(model, batch, vocabulary, draws=512, batch_size=256)
    for row, x in enumerate(batch.tokens):
        total = float(enumerated(model, vocabulary, x))
        assert abs(float(bound.nats[row]) - total) < 5 * float(bound.error[row])
        assert float(bound.error[row]) < 0.05 * total
    with pytest.raises(ValueError, match="draws must be at least 2, got 1"):
        order_nelbo(model, batch, vocabulary, draws=1)
    half = replace(batch, maskable=torch.tensor([[True] * 3, [False] * 3]))
    with pytest.raises(ValueError, match="row 1 has no scored position"):
        order_nelbo(model, half, vocabulary)
