"""On a GPU nothing may be left behind on the CPU, and nothing in a step may wait: shown on a device that is not there."""

import contextlib
import copy

import pytest
import torch
from PIL import Image

from components.maskers import BernoulliMasker
from components.samplers import (
    Ancestral,
    Blocks,
    Confidence,
    EntropyBounded,
    Factor,
    FirstHitting,
    PerModality,
    ReMDM,
    Threshold,
)
from components.sequences import collate
from components.tokenizers.image import GreyPatchTokenizer
from components.tokenizers.text import TextTokenizer
from mdm.data.pipeline import micro_batch
from mdm.data.processor import Processor
from mdm.data.settings import LossSettings
from mdm.evaluation.nelbo import forward_loss
from mdm.generation.generate import generate
from mdm.hardware import Hardware
from mdm.models import builders
from tests.elsewhere import DEVICE, elsewhere, move

HERE, THERE = Hardware(torch.device("cpu"), 0, 1, False), Hardware(DEVICE, 0, 1, False)
PROMPTS = [{"text": "a handwritten seven"}, {"text": "nine"}, {"text": "a"}]


@pytest.fixture(scope="module")
def processor():
    text = TextTokenizer.train(["a handwritten seven"] * 20, vocab_size=300)
    return Processor.build({"text": text, "image": GreyPatchTokenizer(8, 2, 3)}, {"text": 8, "image": 16})


@pytest.fixture(scope="module")
def model(processor):
    model = builders.nano(vocab_size=processor.vocabulary.size, max_length=64, width=32, num_layers=2, num_heads=2)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    monkeypatch.setattr(Hardware, "autocast", lambda self: contextlib.nullcontext())  # torch knows none for this device


def test_the_device_sees_what_a_gpu_would():
    with elsewhere() as waits:
        a = torch.ones(3, device=DEVICE)
        with pytest.raises(RuntimeError, match="two devices"):
            a + torch.ones(3)
        assert not waits
        a.sum().item(), a.cpu(), a[a > 0], a.nonzero()
        assert waits == ["aten::_local_scalar_dense", "aten::_to_copy", "aten::index", "aten::nonzero"]
        assert (a + torch.arange(3, device=DEVICE)).tolist() == [1, 2, 3]


@pytest.mark.parametrize("packed", [False, True])
def test_a_training_step_leaves_nothing_behind_and_waits_for_nothing(model, processor, packed):
    image = processor.encode("image", Image.new("L", (8, 8), 200))
    rows = [
        [processor.sequence("text_to_image", {"text": processor.encode("text", p["text"]), "image": image})] for p in PROMPTS
    ]
    batch = collate(rows, [[i] for i in range(len(rows))], processor.vocabulary.pad_id)
    micro = micro_batch(batch, BernoulliMasker(processor.vocabulary.mask_id), LossSettings(), processor.vocabulary, packed)
    here, there = copy.deepcopy(model), move(copy.deepcopy(model))

    def step(own, hw):
        loss = forward_loss(own, micro.to(hw.device), processor.vocabulary, hw).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0)
        return loss.detach(), norm

    want = step(here, HERE)
    with elsewhere() as waits:
        got = step(there, THERE)
        assert not waits
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b.here)
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad.here)


SAMPLERS = [
    Confidence(num_steps=4),
    Ancestral(num_steps=4),
    FirstHitting(),
    EntropyBounded(gamma=0.5),
    Threshold(threshold=0.5),
    Factor(factor=0.8),
    ReMDM(num_steps=4),
    PerModality((Confidence(num_steps=2), Threshold(threshold=0.5))),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_sampling_waits_once_a_pass(model, processor, sampler, scale):
    check(model, processor, sampler, scale, cache="off", waits_a_pass=1)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_a_cached_pass_waits_once_more(model, processor, cache, scale):
    check(model, processor, Blocks(Threshold(threshold=0.5), 4), scale, cache, waits_a_pass=2)


def check(model, processor, sampler, scale, cache, waits_a_pass):
    """The tokens are those of the CPU, and Python waits a few times for a whole generation, and so often a pass."""
    options = {"sampler": sampler, "guidance_scale": scale, "cache": cache, "seed": 1}
    want = generate(model, processor, "text_to_image", PROMPTS, **options)
    there = move(copy.deepcopy(model))
    with elsewhere() as waits:
        got = generate(there, processor, "text_to_image", PROMPTS, **options)
        assert len(waits) <= 6 + waits_a_pass * (int(want.forwards.max()) + 1)
    assert torch.equal(want.tokens, got.tokens)
    assert torch.equal(want.forwards, got.forwards)
