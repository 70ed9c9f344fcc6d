"""The bound of a model of blocks by row, and its autoregressive mode in one pass, against passes of their own."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from components.sequences import collate
from components.tokenizers.text import TextTokenizer
from components.types import Batch
from components.visibility import FINISHED, NOISY, Places
from mdm.config import UserError
from mdm.data.processor import Processor
from mdm.evaluation.block_likelihood import autoregressive_nats, block_nelbo
from mdm.evaluation.harness import HarnessModel
from mdm.models import builders


@pytest.fixture(scope="module")
def processor():
    return Processor.build({"text": TextTokenizer.train(["a handwritten seven"] * 20, vocab_size=270)}, {})


def model_of(processor, size, causal=True):
    model = builders.model(processor.vocabulary.size, 64, 32, 2, 2, blocks={"text": size}, causal=causal)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


def batch_of(processor, *texts):
    rows = [processor.text_sequence(processor.encode("text", text)) for text in texts]
    return collate([[row] for row in rows], [[i] for i in range(len(rows))], processor.vocabulary.pad_id)


def test_the_autoregressive_mode_is_the_chain_rule_of_the_baselines_model(processor):
    model, batch = model_of(processor, 4), batch_of(processor, "a handwritten seven", "seven")
    plain = builders.model(processor.vocabulary.size, 64, 32, 2, 2, autoregressive=True)
    plain.load_state_dict(model.state_dict())
    logits = processor.vocabulary.restrict(plain.eval()(batch.tokens), batch.id_range).log_softmax(-1)
    nats = -logits.gather(-1, batch.tokens[..., None])[..., 0].masked_fill(~batch.maskable, 0.0)
    assert_close(autoregressive_nats(model, batch, processor.vocabulary), nats.double().sum(dim=1), atol=1e-4, rtol=1e-5)
    with pytest.raises(ValueError, match=r"only blocks that are trained with model.causal=true"):
        autoregressive_nats(model_of(processor, 4, causal=False), batch, processor.vocabulary)


@pytest.mark.parametrize("causal", [False, True])
def test_the_bound_of_each_row_is_that_of_all_masks_of_its_blocks(processor, causal):
    """Three tokens in blocks of 2 and 1, enumerated; low-discrepancy draws come near it, within five of their errors."""
    model, batch = model_of(processor, 2, causal), batch_of(processor, "nev", "een")
    vocabulary = processor.vocabulary
    for row in range(2):
        where = batch.maskable[row].nonzero()[:, 0].tolist()
        want = 0.0
        for block in [where[:2], where[2:4], where[4:6]] if len(where) > 4 else [where[:2], where[2:]]:
            for k in range(1, len(block) + 1):
                subsets = list(itertools.combinations(block, k))
                for chosen in subsets:
                    z = batch.tokens[row, : block[-1] + 1].clone()
                    z[list(chosen)] = vocabulary.mask_id
                    index = torch.arange(len(z))[None]
                    before = torch.tensor([[0] * where[0] + [1 + i // 2 for i in range(len(z) - where[0])]])
                    places = Places(torch.zeros_like(index), index, before, torch.where(index < block[0], FINISHED, NOISY))
                    logits = model.unembedding(model.hidden(z[None], model.sees(places), index))[0]
                    logits = vocabulary.restrict(logits, batch.id_range[row, : len(z)]).log_softmax(-1)
                    nats = -sum(logits[i, batch.tokens[row, i]] for i in chosen)
                    want += float(nats) * len(block) / k / len(subsets) / len(block)
        found = block_nelbo(model, batch, vocabulary, draws=512)
        assert abs(float(found.nats[row]) - want) < 5 * float(found.error[row]) + 1e-4


def test_the_harness_scores_and_continues_with_blocks(processor):
    """By the bound, exactly left to right, and the blocks of a row counted as in training."""
    model = model_of(processor, 4)
    context, continuation = processor.encode("text", "a hand").tolist(), processor.encode("text", "written").tolist()
    exact = HarnessModel(model, processor, likelihood="left_to_right")
    tokens, scored = exact.row(context, continuation)
    sequence = processor.text_sequence(torch.tensor([*context, *continuation]))
    zeros = torch.zeros_like(tokens)
    batch = Batch(tokens, sequence.modality[None], sequence.id_range[None], scored, zeros, torch.arange(tokens.shape[1])[None])
    assert exact.log_likelihood(tokens, scored) == pytest.approx(
        -float(autoregressive_nats(model, batch, processor.vocabulary)), abs=1e-4
    )
    bound = HarnessModel(model, processor, draws=8, seed=3)
    want = block_nelbo(model, batch, processor.vocabulary, draws=8, seed=3)
    assert bound.log_likelihood(tokens, scored) == pytest.approx(-float(want.nats), abs=1e-4)
    assert len(bound.continued([context], 6, bound.default_sampler(6, temperature=0.0))[0]) == 6
    with pytest.raises(UserError, match="only blocks that are trained with"):
        HarnessModel(model_of(processor, 4, causal=False), processor, likelihood="left_to_right").loglikelihood(
            [SimpleNamespace(args=("a ", "nine"), task_name="t", doc_id=0)], disable_tqdm=True
        )
