"""Logits in bfloat16: whoever takes probabilities of them takes those of the same numbers in float64, to float32's digits."""

import pytest
import torch
from torch.testing import assert_close

from components.likelihood import ordered
from components.losses import loss_from_hidden, loss_from_logits, positions_by_range
from components.precision import precise
from components.samplers import Confidence, guided, sample
from components.samplers.drawing import Drawing, invert, top_p_filter
from components.samplers.ranking import entropy, rank
from components.vocabulary import Vocabulary

VOCAB, MASK = 200, 199
LOGITS = (6 * torch.randn(4, 40, VOCAB, generator=torch.Generator().manual_seed(0))).bfloat16()
EXACT = LOGITS.double()
UNIFORM = torch.rand(4, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
NONE = torch.zeros(4, 40, dtype=torch.float64)


def given(tokens):
    """The logits of these rows, whatever is asked."""
    return LOGITS[: len(tokens)]


def test_float32_and_float64_stay_what_they_are():
    single, double = torch.randn(3), torch.randn(3, dtype=torch.float64)
    assert precise(single) is single
    assert precise(double) is double
    assert precise(torch.randn(3).half()).dtype == torch.float32


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}], ids=repr)
def test_confidence_is_the_probability_in_float64(settings):
    token, probability = Drawing(**settings).draw(LOGITS, UNIFORM)
    assert_close(probability, EXACT.softmax(-1).gather(-1, token[..., None])[..., 0], rtol=1e-5, atol=1e-7)
    same = token == Drawing(**settings).draw(EXACT, UNIFORM)[0]
    assert same.double().mean() > 0.99  # a uniform number may lie within float32's rounding of a border


def test_drawing_and_filtering_are_those_of_float64():
    assert (invert(LOGITS, UNIFORM) == invert(EXACT, UNIFORM)).double().mean() > 0.99
    assert torch.equal(top_p_filter(LOGITS, 0.8).isfinite(), top_p_filter(EXACT, 0.8).isfinite())


@pytest.mark.parametrize("by", ["probability", "margin", "entropy"])
def test_ranking_is_that_of_float64(by):
    assert_close(rank(by, LOGITS, NONE, NONE), rank(by, EXACT, NONE, NONE), rtol=1e-5, atol=1e-6)
    assert entropy(LOGITS).dtype == torch.float64


def test_guided_logits_are_not_rounded_again():
    prompt = torch.zeros(2, 40, dtype=torch.bool)
    prompt[:, 0] = True
    got = guided(given, prompt, MASK, 1.7)(torch.zeros(2, 40, dtype=torch.long))
    assert_close(got.double(), EXACT[:2] + 1.7 * (EXACT[:2] - EXACT[2:]), rtol=1e-6, atol=1e-5)


def test_a_likelihood_of_forty_tokens_is_that_of_float64():
    tokens = torch.randint(0, MASK, (4, 40), generator=torch.Generator().manual_seed(2))
    want = EXACT[..., :MASK].log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert_close(ordered(given, tokens[:1], MASK, batch_size=1), want[:1], rtol=1e-6, atol=0)


def test_a_sampler_is_given_float32():
    seen = []

    class Watching(Confidence):
        def step(self, logits, state):
            seen.append(logits.dtype)
            return super().step(logits, state)

    start = torch.full((4, 40), MASK)
    made = sample(Watching(num_steps=1, temperature=0.0), given, start, MASK)
    assert seen == [torch.float32]
    assert_close(made.confidence, EXACT[..., :MASK].softmax(-1).amax(-1), rtol=1e-5, atol=0)
    sample(Watching(num_steps=1), lambda tokens: EXACT, start, MASK)
    assert seen[-1] == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("max_logits", [2**27, 300], ids=["at once", "in chunks"])
def test_losses_are_taken_in_float32_or_more(dtype, max_logits):
    """The logits are products in the hidden states' own precision; from there on nothing is lost."""
    vocabulary = Vocabulary.build({"text": (VOCAB,)}, ["text"])
    g = torch.Generator().manual_seed(3)
    hidden, unembedding = torch.randn(1, 40, 8, generator=g).to(dtype), torch.randn(vocabulary.size, 8, generator=g).to(dtype)
    targets, every = torch.randint(0, VOCAB, (1, 40), generator=g), torch.ones(1, 40)
    text = torch.zeros(1, 40, dtype=torch.long)
    positions = positions_by_range(targets, every.bool(), text, every, every, vocabulary, bucket=1)
    logits = vocabulary.restrict(hidden @ unembedding.T, text)
    want = -logits.double().log_softmax(-1).gather(-1, targets[..., None]).sum()
    digits = 1e-12 if dtype == torch.float64 else 1e-6
    sums = loss_from_hidden(hidden, unembedding, positions, vocabulary, max_logits)
    for loss in (sums.loss, sums.nelbo.sum(), loss_from_logits(logits, targets, every.bool(), every)):
        assert loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert_close(loss.double(), want, rtol=digits, atol=0)
