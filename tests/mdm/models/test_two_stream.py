"""Two streams: what leaks (nothing), any order in one pass against a pass for each turn, and strings that sum to one."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from components.kv_cache import PositionCache, attending_to
from components.maskers import documents
from components.orders import Explicit, OrderMasker, Permuted, Sequential, Strided
from components.sequences import TokenSequence, collate
from components.types import PAD_DOCUMENT, Batch
from components.visibility import FINISHED, NOISY, Places
from components.vocabulary import Vocabulary
from mdm.data.pipeline import micro_batch
from mdm.data.settings import LossSettings
from mdm.evaluation.nelbo import forward_loss
from mdm.evaluation.order_likelihood import any_order_nelbo, ordered_nats
from mdm.hardware import hardware
from mdm.models import builders
from mdm.models.shape import in_two_streams
from mdm.models.two_stream import UNKNOWN, hidden_at

VOCABULARY = Vocabulary.build({"text": (5,), "image": (4,)}, may_end=("text",), tasks=["text"])
SMALL = Vocabulary.build({"text": (3,)}, may_end=())


def model_of(size=VOCABULARY.size, layers=2):
    model = builders.model(size, 32, 16, layers, 2, orders="two_streams")
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.unembedding.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model.double().eval()


def logits_of(model, tokens, rank):
    """Every position asked, by one pass over the row."""
    place = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model.unembedding(hidden_at(model, tokens, rank, place, place, VOCABULARY.mask_id))


def random_row(seed, length=7):
    g = torch.Generator().manual_seed(seed)
    first = VOCABULARY.ranges[0]
    return torch.randint(first.start, first.stop, (1, length), generator=g), torch.randint(0, 4, (1, length), generator=g)


def assert_no_leak(model, fn):
    """Change each token: predictions of its own rank, its own above all, and of lower ones do not move; of higher ones do."""
    first = VOCABULARY.ranges[0]
    for seed in range(3):
        tokens, rank = random_row(seed)
        before = fn(model, tokens, rank).detach()
        for j in range(7):
            other = tokens.clone()
            other[0, j] = first.start + (tokens[0, j] - first.start + 1) % first.size
            moved = (fn(model, other, rank).detach() - before).abs().amax(dim=-1)[0]
            later = rank[0] > rank[0, j]
            assert float(moved[~later].max()) == 0
            assert bool((moved[later] > 1e-7).all())


@pytest.mark.parametrize("way", ["plain", "cached"])
def test_nothing_of_its_own_turn_or_later_reaches_a_prediction(way):
    model, fn = model_of(layers=3), logits_of
    if way == "cached":

        def fn(model, tokens, rank):
            """Group after group: each is asked before its own keys are written."""
            layers, out = [PositionCache() for _ in model.blocks], []
            for layer in layers:
                layer.shape = (1, 8)
            for turn in range(5):
                known = torch.where(rank < turn, rank, UNKNOWN)
                asked = torch.where(rank >= turn, torch.arange(7), 7)
                new = torch.where(rank == turn - 1, torch.arange(7), 7)
                with attending_to(layers, model.blocks, torch.arange(1), torch.cat([asked, new], dim=1)):
                    hidden = hidden_at(model, tokens, known, asked, new, VOCABULARY.mask_id, kept=True)
                out.append(model.unembedding(hidden))
            every = torch.stack(out)  # [turns, 1, positions, vocab]
            return every.gather(0, rank[None, ..., None].expand(1, -1, -1, every.shape[-1]))[0]

    assert_no_leak(model, fn)


def test_permuting_tokens_with_their_places_and_ranks_permutes_predictions():
    model = model_of()
    (tokens, rank), order = random_row(4), torch.tensor([3, 0, 6, 1, 5, 2, 4])

    def rows(order):
        place = order[None]
        stream = torch.tensor([[NOISY] * 7 + [FINISHED] * 7])
        at = Places(torch.zeros(1, 14, dtype=torch.long), *(torch.cat([v, v], 1) for v in (place, rank[:, order])), stream)
        shown = torch.cat([torch.full((1, 7), VOCABULARY.mask_id), tokens[:, order]], dim=1)
        return model.hidden(shown, model.sees(at, last=7), at.position)[:, :7]

    assert_close(rows(torch.arange(7))[:, order], rows(order), atol=1e-12, rtol=0)


def test_who_sees_nothing_is_told_apart_by_nothing_and_breaks_nothing():
    """The first rank: its attention is 0, so that every position says the same; gradients stay finite."""
    model = model_of()
    model.train()
    tokens, rank = random_row(0)
    logits = logits_of(model, tokens, torch.zeros_like(rank))
    assert_close(logits, logits[:, :1].expand_as(logits), atol=1e-12, rtol=0)
    logits.log_softmax(-1).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_a_row_may_be_as_long_as_the_model_and_what_is_one_too_far_is_nothing():
    model = model_of()
    tokens, place = torch.arange(16)[None] % 5 + VOCABULARY.ranges[0].start, torch.arange(16)[None]
    asked = torch.tensor([[15, 3]])
    found = hidden_at(model, tokens, place, asked, place, VOCABULARY.mask_id)
    further = torch.tensor([[16]])  # model.max_length: a place that its table of rotations does not have
    more = hidden_at(model, tokens, place, torch.cat([asked, further], 1), torch.cat([place, further], 1), VOCABULARY.mask_id)
    assert_close(more[:, :2], found, atol=1e-12, rtol=0)


def mixed_rows():
    """Documents with a prompt, text, and an image, of unlike lengths."""
    generator, found = torch.Generator().manual_seed(4), []
    for given, text, image in ((2, 5, 4), (3, 1, 0), (1, 4, 3)):
        length = 1 + given + text + image
        modality = torch.tensor([-1] + [0] * (given + text) + [1] * image)
        maskable = torch.tensor([False] * (1 + given) + [True] * (text + image))
        ranges = torch.where(modality == 1, VOCABULARY.ranges_of("image")[0], VOCABULARY.ranges_of("text")[0])
        start = torch.tensor([VOCABULARY.ranges[r].start for r in ranges])
        tokens = start + torch.randint(4, (length,), generator=generator)
        found.append(TokenSequence(tokens, modality, torch.where(modality < 0, -1, ranges), maskable, ~maskable))
    return found


@pytest.mark.parametrize("order", [Permuted(), Permuted(group=3), Sequential(group=2)], ids=str)
@pytest.mark.parametrize("packing", [[[0], [1], [2]], [[0, 1, 2]], [[1, 0], [2]]], ids=["padded", "packed", "both"])
def test_one_pass_gives_the_loss_of_a_pass_for_every_turn(order, packing):
    """The reference: a document alone, all of lower ranks as content, for each turn a pass of its own; gradients too."""
    model, masker = model_of(), OrderMasker(VOCABULARY.mask_id, order)
    sequences = mixed_rows()
    batch = collate([[sequences[i] for i in row] for row in packing], packing, VOCABULARY.pad_id)
    micro = micro_batch(batch, masker, LossSettings(), VOCABULARY, packed=True)
    with hardware("cpu", "fp32") as hw:
        sums = forward_loss(model, micro, VOCABULARY, hw)
    sums.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss, nelbo = torch.zeros((), dtype=torch.float64), torch.zeros(len(VOCABULARY.ranges), dtype=torch.float64)
    for row, span, _ in documents(batch):
        tokens, rank = batch.tokens[row, span][None], micro.noisy.block[row, span][None]
        maskable, ranges = batch.maskable[row, span], batch.id_range[row, span]
        for turn in rank[0][maskable].unique().tolist():
            asked = (rank[0] == turn).nonzero()[:, 0][None]
            known = (rank[0] < turn).nonzero()[:, 0][None]
            hidden = hidden_at(model, tokens, rank, asked, known, VOCABULARY.mask_id)
            logits = VOCABULARY.restrict(model.unembedding(hidden), ranges[asked])
            nats = -logits.log_softmax(-1).gather(-1, tokens.gather(1, asked)[..., None])[0, :, 0]
            loss = loss + nats.sum() / maskable.sum()
            nelbo.index_add_(0, ranges[asked[0]], nats.detach())
    assert_close(sums.loss, loss, atol=1e-6, rtol=0)
    assert_close(sums.nelbo.double(), nelbo, atol=1e-5, rtol=0)
    loss.backward()
    for name, p in model.named_parameters():
        if name in found:
            assert_close(found[name], p.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "order", [Sequential(), Sequential(2), Strided(3), *map(Explicit, itertools.permutations(range(3)))], ids=str
)
def test_the_probabilities_of_all_strings_sum_to_one_in_every_order(order):
    model = model_of(SMALL.size)
    strings = SMALL.ranges[0].start + torch.tensor(list(itertools.product(range(3), repeat=3)))
    nats = ordered_nats(model, Batch.of(strings, 0), SMALL, order, batch_size=10)
    assert float((-nats).exp().sum()) == pytest.approx(1, abs=1e-12)


def test_strided_with_one_stream_is_left_to_right_and_the_bound_is_the_mean_over_orders():
    model = model_of(SMALL.size)
    batch = Batch.of(SMALL.ranges[0].start + torch.tensor([[0, 2, 1], [1, 1, 0]]), 0)
    assert torch.equal(ordered_nats(model, batch, SMALL, Strided(1)), ordered_nats(model, batch, SMALL, Sequential()))
    every = torch.stack([ordered_nats(model, batch, SMALL, Explicit(o)) for o in itertools.permutations(range(3))])
    bound = any_order_nelbo(model, batch, SMALL, draws=600)
    assert bool(((bound.nats - every.mean(dim=0)).abs() < 4 * bound.error).all())  # four standard errors
    assert float((bound.error * 600**0.5 - every.std(dim=0)).abs().max()) < 0.25 * float(every.std(dim=0).max())


def test_what_cannot_be_said_in_one_pass_is_refused():
    batch = Batch.of(SMALL.ranges[0].start + torch.tensor([[0, 2, 1]]), 0)
    with pytest.raises(ValueError, match="two streams alone"):
        ordered_nats(builders.model(SMALL.size, 8, 16, 1, 2), batch, SMALL)
    with pytest.raises(ValueError, match="draws must be at least 2"):
        any_order_nelbo(model_of(SMALL.size), batch, SMALL, draws=1)
    broken = model_of(SMALL.size)
    with torch.no_grad():
        broken.norm.scale.fill_(float("nan"))
    with pytest.raises(ValueError, match="row 0 is not finite"):
        ordered_nats(broken, batch, SMALL)
    with pytest.raises(ValueError, match="says what stands at a position that is asked for"):
        model_of(SMALL.size)(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="what a position sees is its order's to say"):
        builders.model(9, 8, 16, 1, 2, orders="two_streams", blocks={"text": 2})
    with pytest.raises(ValueError, match=r"model\.orders must be one of two_streams, learned, learned_by_token, got 'three'"):
        builders.model(9, 8, 16, 1, 2, orders="three")


def test_a_checkpoint_of_any_kind_goes_on_in_two_streams():
    for kind in ({"autoregressive": True}, {"blocks": {"text": 2}, "causal": True}, {}):
        config = builders.model(VOCABULARY.size, 16, 16, 1, 2, **kind).config
        assert in_two_streams(config) == replace(
            config, orders="two_streams", blocks={}, causal=False, predicts_next=False, blocks_from_start=False
        )


def test_rows_in_which_nothing_is_content_have_columns_for_it_all_the_same():
    """One group and no structure: attention is to nothing, and no mask is without a column."""
    batch = Batch.of(SMALL.ranges[0].start + torch.tensor([[0, 2, 1]]), 0)
    model = model_of(SMALL.size)
    rows = micro_batch(batch, OrderMasker(SMALL.mask_id, Permuted(group=3)), LossSettings(), SMALL).rows
    assert rows.content > 0
    assert not bool(model.sees(rows.places, last=rows.content).any(dim=-1)[:, :3].any())
    assert float(ordered_nats(model, batch, SMALL, Permuted(group=3))) > 0


def test_padding_is_seen_by_nobody_and_asked_nothing():
    sequences = mixed_rows()
    batch = collate([[sequences[1]], [sequences[0]]], [[1], [0]], VOCABULARY.pad_id)
    rows = micro_batch(batch, OrderMasker(VOCABULARY.mask_id), LossSettings(), VOCABULARY).rows
    model = model_of()
    mask = model.sees(rows.places, last=rows.content)
    padding = rows.places.document == PAD_DOCUMENT
    assert not bool((mask & ~padding[:, -rows.content :][:, None] & padding[..., None]).any())
    assert not bool((mask & padding[:, -rows.content :][:, None] & ~padding[..., None]).any())
    full = model.sees(rows.places)
    assert rows.pairs == int(full[~padding].sum())
