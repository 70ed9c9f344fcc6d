"""Sampling in two streams: every pass against one over everything by the rule spelt out, and orders that are followed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from components.orders import ByBlock, Explicit, OrderMasker, Permuted, Sequential, Strided
from components.samplers import (
    Ancestral,
    Blocks,
    Confidence,
    Editing,
    Factor,
    FirstHitting,
    Gibbs,
    InOrder,
    LeastSureFirst,
    LeftToRight,
    PerModality,
    Psi,
    ReMDM,
    SamplerState,
    SelfCorrect,
    sample,
)
from components.samplers.orders.in_order import NEVER, earliest, ranked
from components.tokenizers.image import GreyPatchTokenizer
from components.tokenizers.text import TextTokenizer
from mdm.data.processor import Processor
from mdm.evaluation.order_likelihood import ordered_nats
from mdm.generation import any_order
from mdm.generation.editing import Edit, infill
from mdm.generation.generate import generate
from mdm.models import builders
from tests.oracles import MASK, exact_conditionals, tiny_joint


@pytest.fixture(scope="module")
def processor():
    text = TextTokenizer.train(["a handwritten seven", "a spoken nine and a longer text of many words"] * 20, vocab_size=300)
    tokenizers = {"text": text, "image": GreyPatchTokenizer(8, 2, 3)}
    return Processor.build(tokenizers, {"text": 6, "image": 16}, tasks=["joint_text_image"])


@pytest.fixture(scope="module")
def model(processor):
    model = builders.nano(processor.vocabulary.size, 64, 32, 2, 2, orders="two_streams")
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.unembedding.weight *= 4  # peaked enough that adaptive samplers have something to adapt to
    return model.eval()


PROMPTS = [{"text": t} for t in ("a", "a handwritten seven", "nine", "a spoken nine and a")]
SAMPLERS = [
    FirstHitting(),
    Confidence(num_steps=3, temperature=0.0),
    Ancestral(num_steps=5),
    Factor(),
    InOrder(),
    InOrder(order=Permuted(group=3)),
    InOrder(order=Strided(streams=2)),
    Blocks(InOrder(order=Permuted()), 2),
    PerModality([InOrder(order=Permuted()), InOrder(order=ByBlock(4, Permuted()))]),
]


def spelt(model, tokens, rank, mask_id, slot):
    """The logits of one position: a row of its own query and all that is known, who sees whom written down pair by pair."""
    known = [i for i, r in enumerate(rank) if r < any_order.UNKNOWN]
    shown = torch.tensor([[mask_id, *(tokens[i] for i in known)]])
    place = torch.tensor([[slot, *known]])
    mask = torch.zeros(1, len(known) + 1, len(known) + 1, dtype=torch.bool)
    mask[0, 0, 1:] = True  # all that is known is of a lower rank than what is asked
    for a, i in enumerate(known):
        for b, j in enumerate(known):
            mask[0, 1 + a, 1 + b] = rank[j] <= rank[i]
    return model.unembedding(model.hidden(shown, mask, place))[0, 0]


class Watched:
    """Every pass of a generation against `spelt`, with what has become known, and when, written down beside."""

    def __init__(self, monkeypatch):
        self.checked, self.runs, self.inner = 0, {}, any_order.TwoStreamLogits.__call__
        monkeypatch.setattr(any_order.TwoStreamLogits, "__call__", lambda logits_fn, tokens: self.look(logits_fn, tokens))

    def look(self, own, tokens):
        logits = self.inner(own, tokens)
        run, rows = self.runs.setdefault(id(own.known), ([0], {}, own.known))[:2]
        asked = logits.abs().sum(dim=-1) > 0
        for row in range(len(tokens)):
            place, kept = own.canvas.index[row].tolist(), rows.setdefault(int(own.rows[row]), {})
            there = range(len(tokens[row])) if own.document is None else (own.document[row] >= 0).nonzero()[:, 0].tolist()
            masked = [s for s, i in enumerate(place) if i in there and int(tokens[row, i]) == own.mask_id]
            for i in set(there) - {place[s] for s in masked}:  # a prompt that guidance leaves out is known: as masks
                if kept.get(i, (None, 0))[0] != int(tokens[row, i]):
                    kept[i] = (int(tokens[row, i]), 1 + run[0] if run[0] else int(own.known.given[own.rows[row], i]))
            for s in masked:
                kept.pop(place[s], None)
            now = asked[row].nonzero()[:, 0].tolist()
            assert set(now) <= set(masked)
            if own.turn is None:
                assert len(now) == len(masked)
            rank = [kept[i][1] if i in kept else any_order.UNKNOWN for i in range(len(tokens[row]))]
            for slot in now[::5]:
                want = spelt(own.model, tokens[row].tolist(), rank, own.mask_id, place[slot])[own.canvas.ids]
                assert_close(logits[row, slot], want, atol=1e-5, rtol=1e-5)
                self.checked += 1
        run[0] += 1
        return logits


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{type(s).__name__}-{getattr(s, 'order', '')}")
@pytest.mark.parametrize(("task", "scale"), [("text_to_image", 0.0), ("text_to_image", 1.5), ("joint_text_image", 0.0)])
def test_every_pass_gives_the_logits_of_a_pass_over_all_that_is_known(model, processor, sampler, task, scale, monkeypatch):
    """With the cache and without, rows at their own paces; tokens are the same ones."""
    prompts, made, watched = PROMPTS if task == "text_to_image" else [{}] * 3, [], Watched(monkeypatch)
    for cache in ("exact", "off"):
        made.append(generate(model, processor, task, prompts, sampler, scale, cache=cache))
    assert torch.equal(made[0].tokens, made[1].tokens)
    assert torch.equal(made[0].forwards, made[1].forwards)
    assert watched.checked > 10


@pytest.mark.parametrize("sampler", [InOrder(order=Permuted()), Confidence(num_steps=3)], ids=lambda s: type(s).__name__)
def test_rows_of_unlike_lengths_and_gaps_do_not_see_their_padding(model, processor, sampler, monkeypatch):
    prompts = [{"text": infill(processor, t)} for t in ("a [mask:3]", "a spoken [mask:5] and a longer [mask:2] of many words")]
    watched = Watched(monkeypatch)
    together = [generate(model, processor, "text", prompts, sampler, 0.0, cache=cache) for cache in ("exact", "off")]
    assert torch.equal(together[0].tokens, together[1].tokens)
    assert watched.checked > 4
    alone = generate(model, processor, "text", prompts[:1], sampler, 0.0).tokens
    assert torch.equal(together[0].tokens[:1, : alone.shape[1]], alone)


def test_what_is_given_on_a_canvas_comes_behind_structure_and_prompts(model, processor, monkeypatch):
    """As in training, where structure never sees what is generated: it would be another model (0.5 nats a token worse)."""
    given, around = [], any_order.TwoStreamLogits.around

    def seen(*args, **options):
        given.append(args[3])
        return around(*args, **options)

    monkeypatch.setattr(any_order.TwoStreamLogits, "around", seen)
    made = generate(model, processor, "text", [{"text": infill(processor, "a spoken [mask:5] and")}], InOrder(), 0.0)
    text, masks = made.batch.modality[0] == 0, made.batch.maskable[0].clone()
    start = len(processor.encode("text", "a spoken "))
    masks[masks.nonzero()[:start, 0]] = False
    masks[masks.nonzero()[5:, 0]] = False
    assert torch.equal(given[0][0] == 1, text & ~masks)
    generate(model, processor, "text_to_image", PROMPTS[:1], InOrder(), 0.0)
    assert not bool(given[1].any())  # a prompt on a canvas of its own
    rows = OrderMasker(processor.vocabulary.mask_id)(made.batch)  # in training all of a text is generated
    assert rows.block[0].tolist().count(0) == int((~text).sum())


def test_what_is_masked_again_is_known_no_more_and_comes_anew(model, processor, monkeypatch):
    watched = Watched(monkeypatch)
    sampler = ReMDM(num_steps=8, variant="rescale", eta=0.9)
    made = generate(model, processor, "text_to_image", PROMPTS, sampler, 1.5)  # cache=off is what it means by auto
    assert watched.checked > 30
    assert not bool((made.tokens == processor.vocabulary.mask_id).any())


def test_copies_for_guidance_are_asked_the_same_and_only_whose_turn_it_is(model, processor, monkeypatch):
    inner, turns = any_order.TwoStreamLogits.__call__, []

    def looked_at(self, tokens):
        logits = inner(self, tokens)
        with_prompt, without = (logits.abs().sum(dim=-1) > 0).chunk(2)
        assert torch.equal(with_prompt, without)
        turns.append(with_prompt.sum(dim=1).tolist())
        return logits

    monkeypatch.setattr(any_order.TwoStreamLogits, "__call__", looked_at)
    generate(model, processor, "text_to_image", PROMPTS, InOrder(order=Permuted(group=3)), 1.5, seed=3)
    assert turns == [[3] * 4] * 5 + [[1] * 4]
    monkeypatch.undo()
    widths, hidden = [], any_order.hidden_at
    monkeypatch.setattr(any_order, "hidden_at", lambda *a, **k: widths.append(a[3].shape) or hidden(*a, **k))
    edits = [{"text": infill(processor, t)} for t in ("a [mask:1]", "a [mask:5]")]  # the first is done before the second
    generate(model, processor, "text", edits, InOrder(), 0.0, stop_at_end=False)
    assert widths == [(2, 1)] + [(1, 1)] * 4


def test_rows_are_selected_from_a_selection(model, processor, monkeypatch):
    kept = []
    inner = any_order.TwoStreamLogits.around.__func__
    monkeypatch.setattr(any_order.TwoStreamLogits, "around", classmethod(lambda *a: kept.append(inner(*a)) or kept[-1]))
    generate(model, processor, "text_to_image", PROMPTS, InOrder(), 0.0)
    part = kept[0].select(torch.tensor([1, 3])).select(torch.tensor([1]))
    assert part.rows.tolist() == [3]
    assert torch.equal(part.turn, kept[0].turn[3:])
    assert torch.equal(part.canvas.index, kept[0].canvas.index[3:])


def test_a_pass_computes_what_is_new_and_what_is_asked_alone(model, processor, monkeypatch):
    widths = []
    inner = any_order.hidden_at

    def counted(*args, **kwargs):
        widths.append(args[3].shape[1] + args[4].shape[1])
        return inner(*args, **kwargs)

    monkeypatch.setattr(any_order, "hidden_at", counted)
    generate(model, processor, "text_to_image", PROMPTS[1:2], InOrder(), 0.0, stop_at_end=False)
    assert widths[1:] == [2] * 15  # the token of the last turn, and the query of the next
    widths.clear()
    generate(model, processor, "text_to_image", PROMPTS[1:2], FirstHitting(), 0.0)
    assert widths[1:] == [1 + left for left in range(15, 0, -1)]


@pytest.mark.parametrize("order", [Sequential(), Permuted(), Strided(1), ByBlock(4, Permuted())], ids=str)
def test_the_probability_of_a_sample_is_the_likelihood_that_one_pass_gives(model, processor, order):
    """What is generated one by one in an order, and what one pass says of it in the same order, to rounding."""
    made = generate(model, processor, "text_to_image", PROMPTS, InOrder(order=order), 0.0, seed=5)
    where = made.batch.maskable
    clean = type(made.batch)(made.tokens, *(getattr(made.batch, f) for f in ("modality", "id_range")), where,
                             made.batch.document, made.batch.position)  # fmt: skip
    sampled = -made.confidence.log().masked_fill(~where, 0.0).sum(dim=1)
    assert_close(sampled, ordered_nats(model, clean, processor.vocabulary, order, seed=5), atol=1e-4, rtol=0)


def test_in_order_takes_the_lowest_rank_of_every_row():
    state = SamplerState.start(torch.zeros(2, 4, dtype=torch.long), torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]]).bool(), 9)
    state = ranked(InOrder(order=Sequential(group=2)), state, 0, [0, 1])
    assert state.rank.tolist() == [[0, 0, NEVER, 1], [0, 0, 1, 1]]
    later = torch.tensor([[0, 1], [2, 1]])  # each row goes on at its own pace
    assert earliest(later, torch.ones(2, 2, dtype=torch.bool)).tolist() == [[True, False], [False, True]]
    logits = torch.zeros(2, 4, 9)
    once = InOrder(order=Sequential(group=2)).step(logits, state)
    assert once.masked.tolist() == [[False, False, False, True], [False, False, True, True]]
    assert InOrder().step(logits, once).finished.tolist() == [True, True]
    with pytest.raises(ValueError, match="the state has no ranks"):
        InOrder().step(logits, SamplerState.start(state.tokens, state.generate, 9))


def test_ranks_are_of_each_rows_own_canvases_and_of_each_modalitys_own_sampler():
    generate_ = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()
    modality = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    assert InOrder(order=Strided(1)).ranks(generate_, modality, 0, range(2)).tolist()[0] == [0, 1, 2, 3, 4, NEVER]
    blocks = InOrder(order=ByBlock(2, Sequential(2))).ranks(generate_, modality, 0, range(2))
    assert blocks.tolist() == [[0, 0, 1, 2, 2, NEVER], [0, 0, 1, 1, 2, 2]]  # a block ends with its canvas
    state = SamplerState.start(torch.zeros(2, 6, dtype=torch.long), generate_, 9, modality)
    each = PerModality([Blocks(InOrder(order=Sequential(group=2)), 1), InOrder()])
    assert ranked(each, state, 0, range(2)).rank.tolist() == [[0, 0, 1, 0, 1, NEVER], [0, 0, 0, 1, 2, 3]]
    others = ranked(PerModality([Confidence(), InOrder()]), state, 0, range(2))
    assert others.rank[:, 3:5].tolist() == [[0, 1], [1, 2]]
    assert ranked(Confidence(), state, 0, range(2)).rank is None


@pytest.mark.parametrize("order", [Sequential(), Permuted(), Explicit([1, 2, 0])], ids=str)
def test_one_by_one_follows_the_joint_of_exact_conditionals_in_every_order(order):
    """Chi-square of 6,400 samples over the 64 strings: 63 degrees of freedom, of which 120 is exceeded once in 70,000 times."""
    joint = tiny_joint()
    tokens = torch.full((6400, 3), MASK)
    drawn = sample(InOrder(order=order), lambda z: exact_conditionals(joint, z), tokens, MASK, seed=2).tokens
    counts = torch.bincount((drawn * torch.tensor([16, 4, 1])).sum(dim=1), minlength=64)
    expected = joint.flatten() * len(tokens)
    assert float(((counts - expected) ** 2 / expected).sum()) < 120


def test_a_rows_order_is_its_own_and_does_not_depend_on_the_batch(model, processor):
    sampler = InOrder(order=Permuted())
    whole = generate(model, processor, "text_to_image", PROMPTS, sampler, 0.0)
    parts = generate(model, processor, "text_to_image", PROMPTS, sampler, 0.0, batch_size=3)
    assert torch.equal(whole.tokens, parts.tokens)
    flags = torch.ones(8, 6, dtype=torch.bool)
    orders = sampler.ranks(flags, torch.zeros(8, 6, dtype=torch.long), 0, range(8))
    assert len(orders.unique(dim=0)) > 4


def test_what_is_given_inside_a_canvas_stays(model, processor):
    """Inpainting: a part of the image is given, the rest comes in any order."""
    image = processor.vocabulary.ranges_of("image")[0]
    start = processor.vocabulary.ranges[image].start
    given = torch.arange(16) % 3 + start
    edit = Edit(given, torch.arange(16) >= 8)
    for sampler in (InOrder(order=Permuted()), Confidence(num_steps=4)):
        made = generate(model, processor, "text_to_image", [{"text": "nine", "image": edit}], sampler, 0.0)
        own = made.tokens[0][made.batch.modality[0] == 1]
        assert torch.equal(own[:8], given[:8])
        assert bool((own[8:] != processor.vocabulary.mask_id).all())


def test_what_two_streams_have_no_use_for_is_said(model, processor):
    def ask(sampler=None, model=model, **options):
        generate(model, processor, "text_to_image", PROMPTS[:1], sampler or InOrder(), 0.0, **options)

    for cache in ("prefix", "dual"):
        with pytest.raises(ValueError, match=f"cache '{cache}' approximates what a model of two streams has exactly"):
            ask(cache=cache)
    for sampler in (Gibbs(Ancestral()), Editing(), Blocks(Editing(), 8), LeastSureFirst(), SelfCorrect(Confidence())):
        with pytest.raises(ValueError, match="asks what else could stand where a token stands"):
            ask(sampler)
    with pytest.raises(ValueError, match="LeftToRight is for a model of blocks, and this one is of two streams: take InOrder"):
        ask(LeftToRight())
    with pytest.raises(ValueError, match="cache 'exact' keeps what ReMDM may mask again; set cache=off"):
        ask(ReMDM(num_steps=6), cache="exact")
    with pytest.raises(ValueError, match="cache 'exact' keeps what Psi may mask again; set cache=off"):
        ask(Psi(), cache="exact")
    ask(ReMDM(num_steps=6, variant="rescale", eta=0.5))
    for order, what in ((Explicit([1, 0]), "order names 2 positions, and 16 are generated"), (Strided(3), "do not divide")):
        with pytest.raises(ValueError, match=what):
            ask(InOrder(order=order))


def test_an_order_that_is_none_is_said_before_anything_is_drawn():
    for none in (None, 3, {"group": 2}, OrderMasker(9)):
        made = object.__new__(InOrder)  # what a config brings, whose types nobody looks at
        for name, value in {**vars(InOrder()), "order": none}.items():
            object.__setattr__(made, name, value)
        with pytest.raises(ValueError, match=r"InOrder: order must be one of components\.orders, or a callable of yours; got"):
            made.__post_init__()


def test_a_sampler_that_changes_what_is_kept_is_stopped(model, processor):
    class Forgetting(Confidence):
        def step(self, logits, state):
            after = super().step(logits, state)
            again = after.generate & ~after.masked & (after.step[:, None] == 2)
            return replace(after, masked=after.masked | again, tokens=after.tokens.masked_fill(again, after.mask_id))

    with pytest.raises(ValueError, match="the sampler has changed some of it"):
        generate(model, processor, "text_to_image", PROMPTS[:1], Forgetting(num_steps=4), 0.0)
