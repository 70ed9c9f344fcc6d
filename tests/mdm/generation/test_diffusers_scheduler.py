"""Our samplers in diffusers' LLaDA2Pipeline: beside its own scheduler, beside our own loop, and what is saved of them."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import BlockRefinementScheduler, LLaDA2Pipeline

from components.samplers import (
    Blocks,
    Confidence,
    Editing,
    EntropyBounded,
    Factor,
    FirstHitting,
    Gibbs,
    LeastSureFirst,
    PerModality,
    Psi,
    ReMDM,
    SelfCorrect,
    Threshold,
    deterministic,
    sample,
)
from components.schedules import Cosine
from mdm.config import UserError
from mdm.generation.diffusers_scheduler import SamplerScheduler
from tests.components.test_samplers import JOINT, LENGTH, chi_square_p
from tests.components.test_samplers import MASK as JOINT_MASK
from tests.components.test_samplers import logits_fn as exact

VOCAB, MASK, END, BLOCK = 12, 12, 11, 8
GREEDY = [
    Threshold(threshold=0.5, temperature=0.0),
    Factor(temperature=0.0),
    EntropyBounded(gamma=0.7, temperature=0.0),
    Confidence(num_steps=32, temperature=0.0, rank_by="margin"),
    Editing(threshold=0.5, edit_threshold=0.4, temperature=0.0),
    LeastSureFirst(num_steps=32, temperature=0.0),
    SelfCorrect(Threshold(threshold=0.3, temperature=0.0), temperature=0.0),
]


class Random:
    """A random model that sees to the end of each block, as the pipeline shows it; masks are unlikely, unless told."""

    def __init__(self, scale=3.0, mask_logit=-torch.inf, ending=0.0):
        g = torch.Generator().manual_seed(0)
        self.tokens, self.places = (torch.randn(n, 16, generator=g, dtype=torch.float64) for n in (VOCAB + 1, 64))
        self.out = scale * torch.randn(16, VOCAB + 1, generator=g, dtype=torch.float64) / 4
        self.mask_logit, self.ending, self.seen = mask_logit, ending, []

    def __call__(self, x, attention_mask=None, position_ids=None):
        self.seen.append((x.shape[1], attention_mask, position_ids))
        last = (torch.arange(x.shape[1]) // BLOCK * BLOCK + BLOCK - 1).clamp(max=x.shape[1] - 1)
        context = (self.tokens[x] * self.places[: x.shape[1]]).cumsum(1)[:, last]
        logits = torch.tanh(context + self.places[: x.shape[1]] + self.tokens[x].roll(1, 1)) @ self.out
        logits[..., MASK], logits[..., END] = self.mask_logit, logits[..., END] + self.ending
        return SimpleNamespace(logits=logits)


def prompts(length, rows=4):
    return torch.randint(0, END, (rows, length), generator=torch.Generator().manual_seed(length))


def pipe(scheduler, prompt, model=None, **asked):
    """The sequences, and how many passes they took."""
    model = Random() if model is None else model
    pipeline = LLaDA2Pipeline(model, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    asked = {"gen_length": 21, "block_length": BLOCK, "mask_token_id": MASK, "output_type": "seq"} | asked
    return pipeline(input_ids=prompt, **asked).sequences, len(model.seen)


@pytest.mark.parametrize("length", [0, 3, 8, 13])
def test_threshold_is_diffusers_own_without_its_idle_passes(length):
    asked = {"editing_threshold": None}
    theirs, passes = pipe(BlockRefinementScheduler(), prompts(length), threshold=0.5, **asked)
    ours, fewer = pipe(SamplerScheduler(Threshold(threshold=0.5, temperature=0.0)), prompts(length), **asked)
    assert torch.equal(ours, theirs)
    assert (ours != MASK).all()
    assert passes == fewer + -(-(length + 21) // BLOCK) - length // BLOCK  # one a block


@pytest.mark.parametrize("length", [3, 8, 13])
def test_rows_that_end_are_left_where_diffusers_leaves_them_and_not_waited_for(length):
    asked = {"editing_threshold": None, "eos_token_id": END}
    theirs, passes = pipe(BlockRefinementScheduler(), prompts(length), Random(ending=2.0), threshold=0.5, **asked)
    sampler = SamplerScheduler(Threshold(threshold=0.5, temperature=0.0))
    ours, fewer = pipe(sampler, prompts(length), Random(ending=2.0), **asked)
    assert torch.equal(ours, theirs)
    left = (ours == MASK).any(dim=1)
    assert left.any()
    assert (ours == END)[left].any(dim=1).all()
    assert fewer < passes


@pytest.mark.parametrize("length", [0, 3, 8, 13])
def test_editing_is_diffusers_own(length):
    edits = []

    def watch(pipeline, step, timestep, tensors):
        edits.append(int(tensors["editing_transfer_index"].sum()))
        return {}

    asked = {
        "callback_on_step_end": watch,
        "callback_on_step_end_tensor_inputs": ["editing_transfer_index"],
        "max_post_steps": 3,
    }
    theirs, passes = pipe(BlockRefinementScheduler(), prompts(length, 1), threshold=0.5, editing_threshold=0.3, **asked)
    before, edits[:] = edits[:], []
    sampler = Editing(threshold=0.5, edit_threshold=0.3, extra_steps=4, temperature=0.0)
    ours, as_many = pipe(SamplerScheduler(sampler), prompts(length, 1), **asked | {"max_post_steps": 16})
    assert torch.equal(ours, theirs)
    assert as_many == passes
    assert edits == before
    assert sum(edits) > 3


def test_confidence_is_diffusers_own_quota_in_blocks_that_are_masked_whole():
    own = SamplerScheduler(Confidence(temperature=0.0))
    asked = {"num_inference_steps": 3, "editing_threshold": None}
    for length in (0, 8):
        theirs, passes = pipe(BlockRefinementScheduler(), prompts(length), threshold=1.1, **asked)
        ours, as_many = pipe(own, prompts(length), **asked)
        assert torch.equal(ours, theirs)
        assert as_many == passes  # with its last step done, diffusers looks no more
    _, passes = pipe(BlockRefinementScheduler(), prompts(13), threshold=1.1, gen_length=3, **asked)
    _, as_many = pipe(own, prompts(13), gen_length=3, **asked)
    assert (passes, as_many) == (2, 3)  # of 3 masks: 3, and a look; here 1, 1, 1


@pytest.mark.parametrize("sampler", GREEDY, ids=repr)
def test_the_pipeline_gives_what_blocks_give(sampler):
    """The prompt is two whole blocks: where ours would begin, too. The passes are those of the slowest row in each block."""
    assert deterministic(sampler) or isinstance(sampler, LeastSureFirst)
    prompt = prompts(16, 1)
    made, passes = pipe(SamplerScheduler(sampler), prompt, gen_length=24)
    canvas = torch.cat([prompt, torch.full((1, 24), MASK)], dim=1)
    ours = by_windows(sampler, canvas, 16)
    assert torch.equal(made, ours[0])
    assert passes == ours[1]
    if not isinstance(sampler, SelfCorrect):
        inside = sample(Blocks(sampler, BLOCK), lambda x: Random()(x).logits, canvas, MASK)
        assert torch.equal(made, inside.tokens[:, 16:])
        assert passes == int(inside.forwards)


@pytest.mark.parametrize("length", [3, 13])
@pytest.mark.parametrize("sampler", GREEDY, ids=repr)
def test_where_a_prompt_ends_inside_a_block_its_rest_is_a_block(sampler, length):
    prompt = prompts(length, 3)
    made, _ = pipe(SamplerScheduler(sampler), prompt, gen_length=21)
    end = -(-(length + 21) // BLOCK) * BLOCK  # the last block is decoded whole, and cut
    canvas = torch.cat([prompt, torch.full((3, end - length), MASK)], dim=1)
    assert torch.equal(made, by_windows(sampler, canvas, length)[0][:, :21])


def by_windows(sampler, canvas, length):
    """Our own loop: each block with what stands before it, the model seeing nothing behind."""
    passes = 0
    for end in range(length // BLOCK * BLOCK + BLOCK, canvas.shape[1] + 1, BLOCK):
        done = sample(sampler, lambda x: Random()(x).logits, canvas[:, :end], MASK)
        canvas = torch.cat([done.tokens, canvas[:, end:]], dim=1)
        passes += int(done.forwards.max())
    return canvas[:, length:], passes


def test_samples_through_the_pipeline_follow_the_joint():
    """20,000 rows of one block, one token a pass; p < 1e-4 once in 10,000 seeds, and the seed is fixed."""

    def model(x, attention_mask, position_ids):
        return SimpleNamespace(logits=exact(x).clone())

    pipeline = LLaDA2Pipeline(model, SamplerScheduler(FirstHitting(), block_length=LENGTH))
    pipeline.set_progress_bar_config(disable=True)
    asked = {"gen_length": LENGTH, "mask_token_id": JOINT_MASK, "output_type": "seq"}
    start = torch.zeros(20_000, 0, dtype=torch.long)
    made = [pipeline(input_ids=start, generator=torch.Generator().manual_seed(i), **asked).sequences for i in (3, 3, 4)]
    observed = torch.bincount(made[0] @ torch.tensor([16, 4, 1]), minlength=JOINT.numel()).double()
    assert chi_square_p(observed) > 1e-4
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    "sampler", [ReMDM(num_steps=8), Psi(num_steps=8, eta=0.3), Gibbs(Psi(num_steps=5)), Editing(edit_threshold=0.2)], ids=repr
)
def test_samplers_that_change_their_minds_end_too(sampler):
    made, passes = pipe(SamplerScheduler(sampler), prompts(5), num_inference_steps=6)
    assert (made != MASK).all()
    assert passes >= 4 * 6 or isinstance(sampler, Editing)


def test_the_number_of_steps_is_the_pipelines():
    for steps in (2, 4):
        _, passes = pipe(SamplerScheduler(Confidence(num_steps=7)), prompts(8), gen_length=16, num_inference_steps=steps)
        assert passes == 2 * steps
    nested = SamplerScheduler(SelfCorrect(Gibbs(Psi(num_steps=3))))
    nested.set_timesteps(9)
    assert nested.sampler.sampler.sampler.num_steps == 9
    assert nested.timesteps.tolist() == list(range(8, -1, -1))


def test_a_mask_token_is_never_drawn():
    scheduler = SamplerScheduler(Threshold(threshold=0.5, temperature=0.0))
    assert (pipe(scheduler, prompts(4), Random(mask_logit=9.0))[0] != MASK).all()


def test_what_a_callback_writes_stays_and_what_it_masks_is_filled():
    def write(pipeline, step, timestep, tensors):
        block = tensors["block_x"].clone()
        if timestep == 0:
            block[:, -1] = 7
        if timestep == 1:
            block[:, -BLOCK] = MASK
        return {"block_x": block}

    made, _ = pipe(SamplerScheduler(Confidence(temperature=0.0)), prompts(8), gen_length=16, callback_on_step_end=write)
    assert (made[:, BLOCK - 1 :: BLOCK] == 7).all()
    assert (made != MASK).all()


SAVED = [Factor(factor=0.7, top_k=3), SelfCorrect(Confidence(schedule=Cosine()), passes=3), Gibbs(Psi(num_steps=4))]


@pytest.mark.parametrize("sampler", SAVED, ids=repr)
def test_a_scheduler_is_saved_and_loaded_as_diffusers_does(tmp_path, sampler):
    SamplerScheduler(sampler, block_length=16).save_pretrained(tmp_path)
    loaded = SamplerScheduler.from_pretrained(tmp_path)
    assert loaded.sampler == sampler
    assert loaded.config.block_length == 16
    again = SamplerScheduler.from_config(loaded.config, block_length=4)
    assert (again.sampler, again.config.block_length) == (sampler, 4)


def test_the_settings_of_a_sampler_may_be_given_as_a_config_has_them():
    assert SamplerScheduler("Factor").sampler == Factor()
    assert SamplerScheduler({"_component_": "Factor", "factor": 0.5}).sampler == Factor(factor=0.5)


OWN = Threshold(threshold=0.95, temperature=0.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SamplerScheduler(Threshold),
            r"sampler must be one, such as Threshold\(\), or .*; got <class",
        ),
        (lambda: SamplerScheduler(Blocks(OWN)), "the pipeline goes from block to block itself, .*; Blocks has no place there"),
        (lambda: SamplerScheduler(SelfCorrect(PerModality([OWN]))), "PerModality has no place there"),
        (lambda: SamplerScheduler(OWN, block_length=0), "block_length must be at least 1, got 0"),
        (
            lambda: SamplerScheduler({"_component_": "os.system"}),
            "sampler names 'os.system', which is none of the library's own",
        ),
        (
            lambda: SamplerScheduler({"_component_": "Factor", "factor": -1}),
            "sampler: Factor: factor must be at least 0, got -1",
        ),
        (lambda: SamplerScheduler({"_component_": "Cosine"}), "sampler: .*Cosine lacks step"),
        (lambda: SamplerScheduler(OWN).set_timesteps(0), "num_inference_steps must be at least 1, got 0"),
        (
            lambda: pipe(SamplerScheduler(OWN), prompts(3), threshold=0.8),
            "threshold=0.8 is asked of the pipeline, but its sampler's settings hold; Threshold has threshold=0.95: set it",
        ),
        (
            lambda: pipe(SamplerScheduler(OWN), prompts(3), temperature=0.5),
            "temperature=0.5 .* Threshold has temperature=0.0: set",
        ),
        (lambda: pipe(SamplerScheduler(OWN), prompts(3), editing_threshold=0.9), "Threshold has no such setting: leave it out"),
        (lambda: pipe(SamplerScheduler(OWN), prompts(3), minimal_topk=2), "minimal_topk=2 .* Threshold has no such setting"),
        (lambda: pipe(SamplerScheduler(Editing()), prompts(3), max_post_steps=4), "Editing has extra_steps=16: set it there"),
        (
            lambda: SamplerScheduler(OWN).step(torch.zeros(1, 4, 5), 0, torch.zeros(1, 4, dtype=torch.long)),
            "mask_token_id: this scheduler fills in mask tokens, and was not told which id they have",
        ),
    ],
)
def test_bad_settings_are_one_line(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_what_the_sampler_has_too_may_be_asked_of_the_pipeline():
    made = [pipe(SamplerScheduler(OWN), prompts(3), **asked)[0] for asked in ({}, {"threshold": 0.95, "temperature": 0.0})]
    assert torch.equal(*made)


def test_logits_that_are_nan_end_in_one_line():
    with pytest.raises(ValueError, match="nothing can be drawn at position 5 of row 0: the largest of its logits is nan"):
        pipe(SamplerScheduler(OWN), prompts(5), Random(scale=float("nan")))


def test_without_diffusers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.schedulers.scheduling_block_refinement", None)
    monkeypatch.delitem(sys.modules, "mdm.generation.diffusers_scheduler")
    with pytest.raises(ImportError, match=r"needs a diffusers that has LLaDA2Pipeline: pip install -U 'trimodal-mdm\[hub\]'"):
        importlib.import_module("mdm.generation.diffusers_scheduler")


def test_what_the_pipeline_shows_the_model():
    """The window up to the end of a block, blocks from position 0 on, and which positions are no context."""
    model = Random()
    pipe(SamplerScheduler(OWN), prompts(13), model)
    assert sorted({width for width, *_ in model.seen}) == [16, 24, 32, 40]
    for width, attention, positions in model.seen:
        assert attention.tolist() == [[int(i < 13 + 21) for i in range(width)]] * 4
        assert positions.tolist() == [list(range(width))] * 4
