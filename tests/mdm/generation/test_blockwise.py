"""Block by block: the logits of a cached pass are those of a pass over everything, whatever the prompts, paces and settings."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from components.block_diffusion import cache as block_cache
from components.block_diffusion import decoding
from components.block_diffusion.cache import PAGE
from components.kernels import Hybrid, Uniform
from components.samplers import (
    Ancestral,
    Blocks,
    Confidence,
    EntropyBounded,
    FirstHitting,
    PerModality,
    Psi,
    SelfCorrect,
    Threshold,
)
from components.samplers.left_to_right import LeftToRight, SelfSpeculation
from components.tokenizers.audio import Codec2Tokenizer
from components.tokenizers.image import GreyPatchTokenizer
from components.tokenizers.text import TextTokenizer
from components.visibility import FINISHED, NOISY, Places, attention_mask, doubled, doubled_causal
from components.weightings import Noise
from mdm.data.processor import Processor
from mdm.generation import blockwise, drafts
from mdm.generation.generate import generate
from mdm.models import builders
from mdm.models.transformer import MaskedDiffusionModel

SIZES = {"text": 4, "audio": 8}


@pytest.fixture(scope="module")
def processor():
    text = TextTokenizer.train(["a handwritten seven", "a spoken nine and a longer text of many words"] * 20, vocab_size=300)
    tokenizers = {"text": text, "image": GreyPatchTokenizer(8, 2, 3), "audio": Codec2Tokenizer()}
    return Processor.build(tokenizers, {"image": 16, "audio": 16}, tasks=["joint_text_image"])


@pytest.fixture(scope="module", params=[False, True], ids=["blocks", "causal"])
def model(processor, request):
    model = builders.nano(processor.vocabulary.size, 128, 32, 2, 2, blocks=SIZES, causal=request.param)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.unembedding.weight *= 4  # peaked enough that adaptive samplers have something to adapt to
    return model.eval()


PROMPTS = [{"text": t} for t in ("a", "a handwritten seven", "a longer text of many words", "nine", "a spoken nine and a")]
SAMPLERS = [
    Threshold(threshold=0.3, temperature=0.0),
    Confidence(num_steps=2, temperature=0.0),
    FirstHitting(),
    Ancestral(num_steps=5),
    EntropyBounded(gamma=2.0, temperature=1.0),
]


def whole(model, tokens, block, start, stop, ids):
    """Logits of a block by one pass over everything up to its end, with the rule spelt out: no cache, no batch."""
    index = torch.arange(stop)[None]
    places = Places(torch.zeros_like(index), index, block[None, :stop], torch.where(index < start, FINISHED, NOISY))
    mask = attention_mask(doubled_causal if model.config.causal else doubled, places)
    return model.unembedding(model.hidden(tokens[None, :stop], mask, index))[0, start:stop][:, ids]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("task", ["text_to_image", "text_to_speech", "text"])
@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_every_pass_of_a_batch_gives_the_logits_of_a_pass_over_everything(model, processor, sampler, task, scale, monkeypatch):
    """Prompts of unlike lengths, rows at their own paces, with and without cache and guidance: the issue's 1e-5."""
    if task == "text" and scale:
        return
    call, largest = blockwise.BlockwiseLogits.__call__, []

    def compared(self, tokens, start, stop, width):
        got = call(self, tokens, start, stop, width)
        for row in range(len(tokens)):
            own = (self.block[row], start[row], stop[row], self.ids)
            want = whole(model, tokens[row], *own)
            if scale:
                without = whole(model, tokens[row].masked_fill(self.prompt[row], processor.vocabulary.mask_id), *own)
                want = want + scale * (want - without)
            largest.append((got[row, : stop[row] - start[row]] - want).abs().max())
        return got

    monkeypatch.setattr(blockwise.BlockwiseLogits, "__call__", compared)
    monkeypatch.setattr(block_cache, "PAGE", 8)  # it grows while a sample is made
    prompts = PROMPTS if task != "text" else [{}] * 3
    made = {}
    for cache in ("exact", "off"):
        length = 18 if task == "text" else None
        made[cache] = generate(model, processor, task, prompts, sampler, scale, cache=cache, length=length)
    assert max(largest) < 1e-5 * (1 + 2 * scale) * 4  # logits are four times larger than a model's, see the fixture
    assert torch.equal(made["exact"].tokens, made["off"].tokens)
    assert torch.equal(made["exact"].forwards, made["off"].forwards)


def test_a_batch_gives_what_each_prompt_gives_alone(model, processor):
    together = generate(model, processor, "text_to_speech", PROMPTS, FirstHitting(), 1.0)
    for batch_size in (1, 2):
        apart = generate(model, processor, "text_to_speech", PROMPTS, FirstHitting(), 1.0, batch_size=batch_size)
        assert torch.equal(together.tokens, apart.tokens)
        assert torch.equal(together.forwards, apart.forwards)
        torch.testing.assert_close(together.confidence, apart.confidence, atol=1e-5, rtol=1e-4)


def test_two_canvases_and_samplers_of_their_own(model, processor):
    """A caption in blocks of 4, then a whole image, each with its sampler's passes."""
    both = Processor(processor.vocabulary, processor.tokenizers, {"text": 8, "image": 16})
    samplers = PerModality([Blocks(Confidence(num_steps=4), 4), Confidence(num_steps=3), FirstHitting()])
    made = generate(model, both, "joint_text_image", [{}] * 3, samplers, stop_at_end=False)
    assert made.forwards.tolist() == [4 + 4 + 3] * 3
    assert not bool((made.tokens == processor.vocabulary.mask_id).any())


def test_an_end_closes_its_canvas_and_nothing_more_of_it_is_computed(model, processor):
    """The first block holds an end: rows stop there, the rest is filled with it; a canvas behind goes on."""
    end = processor.vocabulary.end_id
    both = Processor(processor.vocabulary, processor.tokenizers, {"text": 8, "image": 16})
    made = generate(model, both, "joint_text_image", [{}], Confidence(num_steps=4), 0.0)
    text = made.batch.maskable[0] & (made.batch.modality[0] == 0)
    ended = made.tokens[0][text] == end
    if bool(ended.any()):
        first = int(ended.long().argmax())
        assert bool(ended[first:].all())
        assert int(made.forwards[0]) == 4 * (1 + (first >= 4)) + 4


def test_a_text_of_many_times_the_trained_length_has_constant_passes_and_memory_in_pages(model, processor, monkeypatch):
    """8 x max_length: every block takes as many passes, of no more tokens than two blocks; the cache holds what is finished."""
    config = dataclasses.replace(model.config, max_length=32)
    small = builders.nano(processor.vocabulary.size, 32, 32, 2, 2, blocks=SIZES, causal=model.config.causal)
    small.load_state_dict(model.state_dict())
    assert small.config == config
    passed, held, call = [], [], blockwise.BlockwiseLogits.__call__
    hidden = small.hidden

    def counted(tokens, *args):
        passed.append(tokens.shape[1])
        return hidden(tokens, *args)

    def watched(self, tokens, start, stop, width):
        out = call(self, tokens, start, stop, width)
        held.append((max(stop), self.cache.num_bytes))
        return out

    monkeypatch.setattr(small, "hidden", counted)
    monkeypatch.setattr(blockwise.BlockwiseLogits, "__call__", watched)
    made = generate(
        small.eval(), processor, "text", [{}], Threshold(threshold=0.0, temperature=0.0), length=512, stop_at_end=False
    )
    assert made.forwards.tolist() == [128]
    assert max(passed[1:]) == 8  # the block, and the one before it for the last time
    per_position = 2 * 2 * 32 * 4  # keys and values, layers, width, bytes
    assert all((stop - 4) * per_position <= size < (stop + 8 + PAGE) * per_position for stop, size in held)
    assert held[0][1] == PAGE * per_position < held[-1][1]


def test_a_pass_of_one_block_alone_has_no_mask(model, processor, monkeypatch):
    """It sees all that is kept; the first pass of a block, which computes the one before it too, does not."""
    masks, hidden = [], model.hidden

    def watched(tokens, mask, *rest):
        masks.append((tokens.shape[1], mask is None))
        return hidden(tokens, mask, *rest)

    monkeypatch.setattr(model, "hidden", watched)
    sampler = Confidence(num_steps=2, temperature=0.0)
    generate(model, processor, "text", [{}] * 2, sampler, 0.0, length=12, stop_at_end=False)
    assert [none for _, none in masks] == [False, True] * 3
    assert {width for width, none in masks if none} == {4}


def test_a_film_has_every_step_as_it_was(model, processor):
    """Of the frames none is another's memory: masks fall from all to none."""
    made = generate(model, processor, "text_to_speech", PROMPTS[:2], FirstHitting(), 0.0, film=True, stop_at_end=False)
    left = [int((step.tokens == processor.vocabulary.mask_id).sum()) for step in made.steps]
    assert left == list(range(32, -1, -2))


def test_finished_blocks_are_handed_over_as_they_come(model, processor):
    seen = []
    made = generate(model, processor, "text_to_speech", PROMPTS[:2], FirstHitting(), 0.0, stream=seen.append, stop_at_end=False)
    for place in range(2):
        own = [s for s in seen if s.place == place]
        assert [len(s.tokens) for s in own] == [8, 16]
        assert [s.last for s in own] == [False, True]
        assert {s.modality for s in own} == {"audio"}
        speech = made.batch.maskable[place] & (made.batch.modality[place] == 2)
        for s in own:
            assert torch.equal(s.tokens, made.tokens[place][speech][: len(s.tokens)])


def test_settings_that_do_not_go_together_are_one_line(model, processor):
    plain = builders.nano(processor.vocabulary.size, 128, 32, 2, 2)
    for settings, own, line in (
        ({"cache": "exact"}, plain, "cache 'exact' is for a model of blocks or of two streams; this one sees the whole row"),
        ({"cache": "dual"}, model, "cache 'dual' approximates what a model of blocks has exactly; set cache=exact, or off"),
        ({"cache": "some"}, model, "cache 'some' is not one of auto, exact, off, prefix, dual"),
        ({"sampler": Blocks(FirstHitting(), 3)}, model, r"block_length 3, but the model was trained in blocks of 4 \(text\)"),
        ({"sampler": PerModality([])}, model, "PerModality: 0 samplers, and positions of modality 0 to generate"),
        ({"guidance_scale": lambda t: t}, model, "guidance_scale changes with the share of masked tokens"),
    ):
        with pytest.raises(ValueError, match=line):
            generate(own, processor, "text", [{}], length=8, **settings)


def test_a_sampler_of_blocks_is_held_against_what_is_generated_alone(model, processor):
    """Text in blocks of 4: an image, which is whole, is not asked for. Ids that are none are said, and what goes not inside."""
    made = generate(model, processor, "text", [{}], Blocks(FirstHitting(), 4), length=8)
    assert not bool((made.tokens == processor.vocabulary.mask_id).any())
    with pytest.raises(ValueError, match=r"forbid: 99999 is none of the \d+ ids"):
        generate(model, processor, "text", [{}], FirstHitting(), length=8, forbid=[99_999])
    with pytest.raises(ValueError, match="LeftToRight cannot be inside SelfCorrect"):
        generate(model, processor, "text", [{}], SelfCorrect(LeftToRight(), passes=2), length=8)


def test_broken_logits_and_samplers_that_do_nothing_are_said(model, processor, monkeypatch):
    class Idle:
        def step(self, logits, state):
            return state

    monkeypatch.setattr(decoding, "PATIENCE", 3)
    with pytest.raises(ValueError, match="Idle has unmasked nothing of row 1 in 3 passes; 4 are left"):
        decoding.sample_blocks([Idle()], *_tiny(), index=[1])
    logits_fn, task = _tiny(float("nan"))
    with pytest.raises(ValueError, match=r"nothing can be drawn at position 0 of row 0: .* nan"):
        decoding.sample_blocks([FirstHitting()], logits_fn, task)
    barred = dataclasses.replace(task, allowed=torch.zeros(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="no id is allowed at position 0 of row 0"):
        decoding.sample_blocks([FirstHitting()], logits_fn, barred)


@pytest.mark.parametrize("kernel", [Uniform(), Hybrid()], ids=lambda k: type(k).__name__)
def test_noise_of_other_kinds_is_taken_off_in_blocks(model, processor, kernel):
    """The cache is as exact: what is finished changes no more. Nothing is left that is no token of its modality."""
    noisy = MaskedDiffusionModel(dataclasses.replace(model.config, noise={"text": Noise(kernel)}))
    noisy.load_state_dict(model.state_dict())
    for sampler in (Ancestral(num_steps=3), Psi(num_steps=3), SelfCorrect(Ancestral(num_steps=2), passes=2)):
        made = [generate(noisy, processor, "text", [{}] * 2, sampler, cache=c, length=8) for c in ("auto", "exact", "off")]
        assert all(torch.equal(made[0].tokens, other.tokens) for other in made)
        assert not bool((made[0].tokens == processor.vocabulary.mask_id).any())


def _tiny(value=0.0):
    class Logits:
        def __call__(self, tokens, start, stop, width):
            return torch.full((len(tokens), width, 5), value)

        def select(self, rows):
            pass

    zeros = torch.zeros(1, 8, dtype=torch.long)
    block = torch.arange(8)[None] // 4
    allowed = torch.ones(1, 5, dtype=torch.bool)
    return Logits(), decoding.Task(zeros, zeros == 0, block, zeros, zeros, allowed, torch.arange(5))


@pytest.mark.parametrize("scale", [0.0, 1.5])
@pytest.mark.parametrize("cache", ["exact", "off"])
def test_drafts_see_what_they_say_and_finished_tokens_are_an_autoregressive_model(model, processor, scale, cache, monkeypatch):
    """Each copy's logits against a pass of its own; the finished copy's against the baseline's model on the same weights."""
    if not model.config.causal:
        with pytest.raises(ValueError, match="SelfSpeculation asks the finished tokens for the next one"):
            generate(model, processor, "text_to_speech", PROMPTS, SelfSpeculation(), scale, cache=cache)
        return
    plain = builders.model(processor.vocabulary.size, 128, 32, 2, 2, autoregressive=True, ffn_width=model.config.hidden_ffn)
    plain.load_state_dict(model.state_dict())
    call, largest, mask_id = drafts.DraftLogits.__call__, [], processor.vocabulary.mask_id

    def compared(self, tokens, start, stop, width):
        got = call(self, tokens, start, stop, width)
        for row in range(len(tokens)):
            s, e = start[row], stop[row]
            each = [tokens[row], tokens[row].masked_fill(self.prompt[row], mask_id)] if scale else [tokens[row]]
            p = [plain.eval()(own[None, :e])[0, s:e][:, self.ids] for own in each]
            largest.append((got[row, 0, : e - s] - (p[0] + scale * (p[0] - p[-1]))).abs().max())
            for k in range(got.shape[1] - 1):
                noisy = [own.clone() for own in each]
                for own in noisy:
                    own[s + k :] = mask_id
                q = [whole(model, own, self.block[row], s, e, self.ids) for own in noisy]
                largest.append((got[row, 1 + k, : e - s] - (q[0] + scale * (q[0] - q[-1]))).abs().max())
        return got

    monkeypatch.setattr(drafts.DraftLogits, "__call__", compared)
    for sampler in (SelfSpeculation(), LeftToRight()):
        generate(model, processor, "text_to_speech", PROMPTS, sampler, scale, cache=cache)
    assert max(largest) < 4e-5 * (1 + 2 * scale)


def test_self_speculation_gives_the_greedy_tokens_of_one_by_one(model, processor):
    if not model.config.causal:
        return
    for task, prompts, length in (("text_to_speech", PROMPTS, None), ("text", [{}] * 2, 24), ("text_to_image", PROMPTS, None)):
        made = [
            generate(model, processor, task, prompts, own, 0.0, length=length)
            for own in (LeftToRight(temperature=0.0), SelfSpeculation(temperature=0.0))
        ]
        assert torch.equal(made[0].tokens, made[1].tokens)
        assert bool((made[1].forwards <= made[0].forwards).all())
