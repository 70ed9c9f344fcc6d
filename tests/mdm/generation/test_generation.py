"""The generation pipeline: slots, caches, prompts of different lengths, edits, defaults."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.fx.experimental.proxy_tensor import make_fx

from components.samplers import (
    Ancestral,
    Blocks,
    Confidence,
    Editing,
    EntropyBounded,
    FirstHitting,
    Gibbs,
    LinearScale,
    PerModality,
    Psi,
    ReMDM,
    Threshold,
)
from components.tokenizers.audio import Codec2Tokenizer
from components.tokenizers.image import GreyPatchTokenizer
from components.tokenizers.text import TextTokenizer
from components.visibility import Places, attention_mask, same_document
from mdm.config import UserError
from mdm.data.processor import Processor
from mdm.generation.canvas import CachedSlotLogits, Canvas, SlotLogits, local_ids
from mdm.generation.defaults import Defaults, Inference
from mdm.generation.editing import Edit, edit, infill
from mdm.generation.generate import closed, generate, prepare
from mdm.models import builders

GREEDY = Confidence(num_steps=8, temperature=0.0)


@pytest.fixture(scope="module")
def processor():
    text = TextTokenizer.train(["a handwritten seven", "a spoken nine and a longer text of many words"] * 20, vocab_size=300)
    tokenizers = {"text": text, "image": GreyPatchTokenizer(8, 2, 3), "audio": Codec2Tokenizer()}
    return Processor.build(tokenizers, {"text": 16, "image": 16, "audio": 16})


@pytest.fixture(scope="module")
def model(processor):
    model = builders.nano(vocab_size=processor.vocabulary.size, max_length=128, width=32, num_layers=2, num_heads=2)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.unembedding.weight *= 4  # peaked enough that adaptive samplers have something to adapt to
    return model.double().eval()


@pytest.fixture
def free_prompts(processor):
    """Text from text, the prompt at its exact length: prompts of different lengths make rows of different lengths."""
    return Processor(processor.vocabulary, processor.tokenizers, {"image": 16})


PROMPTS = [{"text": t} for t in ("a", "a handwritten seven", "a longer text of many words", "nine", "a spoken nine and a")]


@pytest.mark.parametrize("cache", ["off", "prefix", "dual"])
@pytest.mark.parametrize("scale", [0.0, 1.5])
@pytest.mark.parametrize("refresh", [None, 2])
def test_a_batch_of_prompts_of_different_lengths_gives_what_each_gives_alone(model, free_prompts, cache, scale, refresh):
    """Greedily, with and without caches and guidance; in float64, so that a near tie does not tip."""
    sampler = Blocks(Threshold(threshold=0.5, temperature=0.0), 4)
    options = {
        "sampler": sampler,
        "guidance_scale": scale,
        "cache": cache,
        "refresh_every": refresh if cache != "off" else None,
    }
    together = generate(model, free_prompts, "text_to_image", PROMPTS, **options)
    assert len({s.tolist().index(-1) if -1 in s.tolist() else len(s) for s in together.batch.document}) == 5
    for i, prompt in enumerate(PROMPTS):
        alone = generate(model, free_prompts, "text_to_image", [prompt], **options)
        assert torch.equal(alone.tokens[0], together.tokens[i, : alone.tokens.shape[1]])
        assert alone.forwards[0] == together.forwards[i]
    assert len(set(together.forwards.tolist())) > 1  # rows went their own pace, and were left out when finished


@pytest.mark.parametrize("mode", ["prefix", "dual"])
@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("sampler", [Confidence(num_steps=4), EntropyBounded(gamma=1.0), FirstHitting()], ids=lambda s: s.name)
def test_a_cache_refreshed_every_step_changes_nothing(model, processor, mode, scale, sampler):
    """Equal to the bit: tokens and confidences; random draws, not greedy ones."""
    options = {"sampler": Blocks(sampler, 4), "guidance_scale": scale, "seed": 3}
    plain = generate(model, processor, "text_to_image", PROMPTS, **options)
    cached = generate(model, processor, "text_to_image", PROMPTS, cache=mode, refresh_every=1, **options)
    assert torch.equal(plain.tokens, cached.tokens)
    assert torch.equal(plain.confidence, cached.confidence)


@pytest.mark.parametrize("mode", ["prefix", "dual"])
def test_a_kept_cache_attends_to_the_keys_of_its_last_refresh(model, processor, mode):
    """Oracle: full passes in which keys and values outside the computed positions are those of the first pass."""
    given = prepare(processor, "text_to_image", PROMPTS[:2], processor.canvas)
    vocabulary, batch = processor.vocabulary, given.batch
    ids = torch.arange(vocabulary.size)
    ids = torch.cat([ids[ids != vocabulary.mask_id], torch.tensor([vocabulary.mask_id])])
    canvas = Canvas.of(batch.tokens, given.generate, ids)
    cached = CachedSlotLogits.around(SlotLogits.of(model, canvas, batch, 1), mode, 4, None)
    first = batch.tokens.masked_fill(given.generate, vocabulary.mask_id)
    cached(first)
    start = int(canvas.index[0, 0])
    second = first.clone()
    second[:, start] = vocabulary.ranges[1].start + 7
    got = cached(second)[:, :4]
    computed = torch.zeros(second.shape[1], dtype=torch.bool)
    computed[start : start + 4 if mode == "dual" else None] = True
    stale, new = model.embedding(first), model.embedding(second)
    for block in model.blocks:
        old_keys = block.sa_norm(stale)
        mixed = torch.where(computed[:, None], block.sa_norm(new), old_keys)
        attended = block.attn(block.sa_norm(new), mixed)
        stale = block(stale)
        h = new + attended
        new = h + block.mlp(block.mlp_norm(h))
    want = torch.nn.functional.linear(model.norm(new)[:, start : start + 4], model.unembedding.weight[ids]).float()
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    full = canvas.take(model(second)[..., ids]).float()[:, :4]
    assert (got - full).abs().max() > 1e-3  # and it is an approximation


@pytest.mark.parametrize("mode", ["prefix", "dual"])
def test_a_cache_is_made_anew_where_a_block_begins(model, processor, mode, monkeypatch):
    """Four blocks of four image tokens, two passes each: the first over all, the second over the block (and what follows)."""
    lengths, hidden = [], model.hidden

    def spied(tokens, *args):
        lengths.append(tokens.shape[1])
        return hidden(tokens, *args)

    monkeypatch.setattr(model, "hidden", spied)
    sampler = Blocks(Confidence(num_steps=2, temperature=0.0), 4)
    made = generate(model, processor, "text_to_image", PROMPTS[:1], sampler, 0.0, cache=mode)
    whole = made.tokens.shape[1]
    start = int(made.batch.maskable[0].nonzero()[0])
    short = [4] * 4 if mode == "dual" else [whole - start - 4 * k for k in range(4)]
    assert lengths == [n for k in range(4) for n in (whole, short[k])]


class Recordings:
    """A `Recorder` without a GPU: the operations as they ran, on the memory that they ran on; Python is not run again."""

    def __init__(self):
        self.made = self.replays = 0

    def __call__(self, function, inputs):
        tensors = [x for x in inputs if x is not None]

        def of_tensors(*given):
            left = iter(given)
            return function(*[x if x is None else next(left) for x in inputs])

        output = torch.full_like(function(*inputs), torch.nan)
        operations = make_fx(of_tensors)(*tensors)
        self.made += 1

        def replay():
            self.replays += 1
            output.copy_(operations(*tensors))

        return replay, output


@pytest.mark.parametrize("cache", ["off", "prefix", "dual"])
@pytest.mark.parametrize("scale", [0.0, 1.5])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[1:2]], ids=["five", "one"])
def test_recorded_passes_give_what_plain_ones_give(model, free_prompts, monkeypatch, cache, scale, prompts):
    """As CUDA graphs are replayed: rows leave the batch, blocks move, caches are refreshed; every replay is on old memory."""
    sampler = Blocks(Threshold(threshold=0.9, temperature=0.0), 4)
    options = {"sampler": sampler, "guidance_scale": scale, "cache": cache, "seed": 3}
    plain = generate(model, free_prompts, "text_to_image", prompts, **options)
    recordings = Recordings()
    monkeypatch.setattr(model, "recorder", recordings)
    replayed = generate(model, free_prompts, "text_to_image", prompts, **options)
    assert recordings.replays > recordings.made > 0
    assert torch.equal(plain.tokens, replayed.tokens)
    assert torch.equal(plain.forwards, replayed.forwards)
    torch.testing.assert_close(plain.confidence, replayed.confidence, atol=1e-12, rtol=0)


def test_logits_are_those_of_the_plain_model(model, processor):
    """Slots and local ids against the whole model's logits, with padding between."""
    given = prepare(
        processor, "image_to_text", [{"image": Image.new("L", (8, 8))}, {"image": Image.new("L", (8, 8), 255)}], {"text": 5}
    )
    batch = given.batch
    ids = torch.tensor([3, 5, 90, processor.vocabulary.mask_id])
    canvas = Canvas.of(batch.tokens, given.generate, ids)
    got = SlotLogits.of(model, canvas, batch, 1)(batch.tokens)
    want = model(batch.tokens)[given.generate].view(2, 5, -1)[..., ids].float()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    padded = attention_mask(same_document, Places(torch.tensor([[0, 0, -1]])))
    assert not padded[0, 0, 2]


def test_defaults_guide_only_where_something_is_given(model, processor, monkeypatch):
    """A default scale is of a modality; a task of it that has no prompt has nothing to leave out, and is sampled plainly."""
    passes, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, *args: passes.append(len(tokens)) or hidden(tokens, *args))
    found = SimpleNamespace(sampler=Confidence(num_steps=2, temperature=0.0), guidance_scale=1.5)
    monkeypatch.setattr(Defaults, "packaged", lambda: SimpleNamespace(of=lambda task, *own: found))
    generate(model, processor, "text", [{}])
    generate(model, processor, "text_to_image", PROMPTS[:1])
    assert passes == [1, 1, 2, 2]


def test_no_end_may_stand_before_what_is_given(model, processor):
    edits = [{"text": infill(processor, text)} for text in ("a [mask:2] seven", "a handwritten [mask:2]")]
    given = prepare(processor, "text", edits, {})
    found = closed(given.batch, given.generate, processor.vocabulary.end_id)
    assert torch.equal(found[0], given.generate[0])
    assert not found[1].any()


def test_behind_an_end_are_ends_alone_unless_that_is_asked_for(model, processor):
    """From left to right; only two words and the end token may be drawn, so that most rows of 16 tokens end early."""
    words = {*processor.encode("text", "a nine").tolist(), processor.vocabulary.end_id}
    forbid = [i for i in range(processor.vocabulary.ranges[0].stop) if i not in words]
    prompts = [{"image": Image.new("L", (8, 8), 200)}] * 8
    options = {"sampler": Blocks(FirstHitting(temperature=10.0), 1), "guidance_scale": 0.0, "forbid": forbid}
    for stop in (True, False):
        made = generate(model, processor, "image_to_text", prompts, stop_at_end=stop, **options)
        rows = [made.tokens[k][made.batch.maskable[k]] == processor.vocabulary.end_id for k in range(8)]
        behind = [row[int(row.nonzero()[0]) :] for row in rows if row.any()]
        assert len(behind) >= 4
        assert all(bool(b.all()) for b in behind) is stop


def test_local_ids_are_what_may_stand_anywhere_and_the_mask_token_last():
    allowed = torch.tensor([[True, False, True, False, False], [False, False, True, True, False]])
    assert local_ids(allowed, mask_id=4).tolist() == [0, 2, 3, 4]
    assert local_ids(allowed, mask_id=2).tolist() == [0, 3, 2]  # once, wherever its id lies


def test_a_sample_does_not_depend_on_the_batch_size(model, processor):
    a = generate(model, processor, "text_to_image", PROMPTS, FirstHitting(), batch_size=5)
    b = generate(model, processor, "text_to_image", PROMPTS, FirstHitting(), batch_size=2)
    assert torch.equal(a.tokens, b.tokens)


def inpaint(processor, image, box):
    return edit(processor, "image", image, ",".join(map(str, box)))


def respeak(processor, audio, start, stop=""):
    return edit(processor, "audio", audio, f"{start}-{stop}")


def image(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8))


def test_inpainting_keeps_what_is_given_to_the_bit(model, processor):
    """The right half anew: the left half's tokens stay, and the right's are of the image's range."""
    part = inpaint(processor, image(), (4, 0, 8, 8))
    assert part.region.view(4, 4).tolist() == [[False, False, True, True]] * 4
    made = generate(model, processor, "text_to_image", [{"text": "a", "image": part}] * 3, FirstHitting())
    own = made.batch.maskable[0]
    for row in made.tokens[:, own]:
        assert torch.equal(row[~part.region], part.tokens[~part.region])
    assert made.forwards.tolist() == [8] * 3
    left = [np.asarray(o["image"])[:, :4] for o in made.outputs]
    whole = np.asarray(processor.decode("image", part.tokens))
    assert all((pixels == whole[:, :4]).all() for pixels in left)
    assert len({m.tobytes() for m in (np.asarray(o["image"]) for o in made.outputs)}) > 1


def test_a_patch_that_the_box_only_touches_is_drawn_anew(processor):
    assert inpaint(processor, image(), (3, 3, 5, 4)).region.view(4, 4).nonzero().tolist() == [[1, 1], [1, 2]]


def test_infilling_keeps_the_words_around_the_gap(model, processor):
    part = infill(processor, "a [mask:2] seven")
    assert int(part.region.sum()) == 2
    made = generate(model, processor, "text", [{"text": part}] * 2, FirstHitting(), length=16)
    own = made.batch.maskable[0]
    tokens = made.tokens[0, own]
    assert torch.equal(tokens[: len(part.tokens)][~part.region], part.tokens[~part.region])
    assert (tokens[len(part.tokens) :] == processor.vocabulary.end_id).all()  # the length is given
    assert processor.vocabulary.end_id not in tokens[: len(part.tokens)].tolist()  # no end before given words
    assert all(o["text"].startswith("a") and o["text"].endswith(" seven") for o in made.outputs)


def test_respeaking_keeps_the_frames_around_the_span(model, processor):
    """4 frames of 40 ms: 0.05 s to 0.09 s touches the second and the third."""
    audio = np.sin(np.arange(4 * 320) / 9).astype(np.float32) * 0.5
    part = respeak(processor, audio, 0.05, 0.09)
    assert part.region.view(4, 4)[:, 0].tolist() == [False, True, True, False]
    made = generate(model, processor, "text_to_speech", [{"text": "a", "audio": part}], FirstHitting())
    tokens = made.tokens[0, made.batch.maskable[0]]
    assert torch.equal(tokens[:16][~part.region], part.tokens[~part.region])
    assert respeak(processor, audio, 0.09).on_canvas(20).tolist() == [False] * 8 + [True] * 12


def test_what_is_given_partly_may_be_joined_with_what_is_not(model, processor):
    """A caption and half an image together, from the other half."""
    part = inpaint(processor, image(), (0, 0, 8, 4))
    made = generate(model, processor, "joint_text_image", [{"image": part}])
    assert set(made.outputs[0]) == {"text", "image"}


def test_parts_of_several_modalities_may_be_given(model, processor):
    audio = np.zeros(640, dtype=np.float32)
    made = generate(model, processor, "text_image_to_speech", [{"text": "a", "image": image()}], Threshold(threshold=0.2))
    assert set(made.outputs[0]) == {"audio"}
    made = generate(model, processor, "speech_to_image", [{"audio": audio}])
    assert set(made.outputs[0]) == {"image"}


def test_every_step_can_be_watched(model, processor):
    seen = []
    made = generate(
        model, processor, "text_to_image", PROMPTS[:2], GREEDY, film=True, watch=lambda step, batch: seen.append(step)
    )
    assert len(made.steps) == len(seen) == 9  # the first is all masks
    assert torch.equal(seen[-1].tokens, made.tokens)
    mask = processor.vocabulary.mask_id
    for k, step in enumerate(seen):
        assert ((step.tokens == mask).sum(1) == 16 - 2 * k).all()
        assert ((step.confidence > 0).sum(1) == 2 * k).all()


def test_forbidden_ids_do_not_appear(model, processor):
    first = processor.vocabulary.ranges[1].start
    made = generate(model, processor, "text_to_image", PROMPTS, FirstHitting(), forbid=range(first, first + 80))
    assert (made.tokens[made.batch.maskable] == first + 80).all()
    with pytest.raises(ValueError, match="no id is allowed at position 0 of row 0"):
        generate(model, processor, "text_to_image", PROMPTS, FirstHitting(), forbid=range(first, first + 81))


def test_defaults_are_those_of_the_modality_or_of_the_task(processor, tmp_path):
    path = tmp_path / "defaults.yaml"
    path.write_text(
        "text: {sampler: {_component_: components.samplers.Ancestral, num_steps: 3}}\n"
        "image: {sampler: {_component_: components.samplers.EntropyBounded, gamma: 0.5}, guidance_scale: 2.0}\n"
        "image_to_text: {sampler: {_component_: components.samplers.Confidence, num_steps: 2}}\n"
        '"audio -> image": {sampler: {_component_: components.samplers.Ancestral, num_steps: 4}}\n'
    )
    defaults = Defaults.load(path)
    modalities = processor.vocabulary.modalities
    assert defaults.of("text_to_image", modalities).sampler == EntropyBounded(gamma=0.5)
    assert defaults.of("text_to_image", modalities).guidance_scale == 2.0
    assert defaults.of("image_to_text", modalities).sampler == Confidence(num_steps=2)
    assert defaults.of("speech_to_text", modalities).sampler == Ancestral(num_steps=3)
    joint = defaults.of("joint_text_image", modalities).sampler
    assert isinstance(joint, PerModality)
    assert joint.samplers[:2] == [Ancestral(num_steps=3), EntropyBounded(gamma=0.5)]
    assert defaults.of("speech_to_image", modalities).sampler == Ancestral(num_steps=4)
    for unmeasured in ("text_to_speech", "text_to_pen", "pen"):  # sampled exactly
        assert defaults.of(unmeasured, modalities) == Inference(FirstHitting(), 0.0)
    path.write_text("image: {samplr: 3}")
    with pytest.raises(UserError, match="image must hold a sampler and a guidance_scale"):
        Defaults.load(path)


def test_defaults_of_a_config_come_on_top_and_travel_with_the_model(processor, tmp_path):
    modalities, own = processor.vocabulary.modalities, {"pen": {"sampler": {"_component_": "Confidence", "num_steps": 5}}}
    packaged = Defaults.packaged()
    defaults = packaged.on_top(own, "inference")
    assert defaults.of("text_to_pen", modalities) == Inference(Confidence(num_steps=5), 0.0)
    assert defaults.of("text_to_image", modalities) == packaged.of("text_to_image", modalities)
    defaults.save(tmp_path)
    assert Defaults.load(tmp_path / "defaults.yaml") == defaults
    with pytest.raises(UserError, match="inference: pen must hold a sampler"):
        packaged.on_top({"pen": {}}, "inference")


@pytest.mark.parametrize(
    ("task", "prompts", "options", "message"),
    [
        ("text_to_image", [], {}, "there is no prompt"),
        ("text_to_image", PROMPTS, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ("text_to_image", [{"text": "a" * 99}], {}, "does not fit its canvas of 16"),
        ("text_to_image", [{}], {}, "it is given text, and there is none"),
        ("text", [{}], {"length": 500}, "503 positions, but the model has 128"),
        ("text", [{}], {"length": 16, "guidance_scale": 1.0}, "guidance_scale 1.0: there is no prompt"),
        ("text_to_image", PROMPTS, {"cache": "all"}, "cache 'all' is not one of auto, exact, off, prefix, dual"),
        ("text_to_image", PROMPTS, {"cache": "dual"}, "the sampler has to be Blocks"),
        *(
            (
                "text_to_image",
                PROMPTS,
                {"cache": "dual", "sampler": Blocks(own, 4)},
                f"{type(own).__name__} may go on in a block",
            )
            for own in (ReMDM(), Psi(), Gibbs(Ancestral()), Editing())
        ),
        (
            "text_to_image",
            PROMPTS,
            {"cache": "dual", "refresh_every": 0, "sampler": Blocks(GREEDY, 4)},
            "refresh_every must be",
        ),
        ("text_to_image", PROMPTS, {"sampler": Blocks(GREEDY, 5)}, "block_length 5 does not divide the 16 positions"),
    ],
)
def test_settings_that_do_not_work_are_named(model, processor, task, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, processor, task, prompts, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: infill(p, "no gap at all"), "has no gap; write"),
        (lambda p: infill(p, "none [mask:0] here"), "has no gap; write"),
        (
            lambda p: inpaint(p, image(), (4, 0, 4, 8)),
            r"region '4,0,4,8': left,top,right,bottom in pixels, inside 0..8, and not empty",
        ),
        (lambda p: inpaint(p, image(), (0, 0, 9, 8)), "inside 0..8"),
        (lambda p: inpaint(p, Image.new("L", (9, 9)), (0, 0, 2, 2)), "expected 8x8 pixels"),
        (lambda p: respeak(p, np.zeros(800), 0.3, 0.4), "inside 0-0.10, not empty"),
        (lambda p: respeak(p, np.zeros(800), 0.05, 0.05), "not empty"),
    ],
)
def test_edits_that_do_not_work_are_named(processor, make, message):
    with pytest.raises(ValueError, match=message):
        make(processor)


def test_a_scale_that_grows_is_guidance_too(model, processor):
    made = generate(model, processor, "text_to_image", PROMPTS, GREEDY, guidance_scale=LinearScale(0.0, 2.0))
    constant = generate(model, processor, "text_to_image", PROMPTS, GREEDY, guidance_scale=0.0)
    assert not torch.equal(made.tokens, constant.tokens)
    assert isinstance(Edit(torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.bool)), Edit)
