"""Figures of an evaluation: entropies and bits by hand, and a pack whose NELBO is that of its documents."""

import math

import pytest
import torch
from torch.testing import assert_close

from components.maskers import FixedCountMasker, NextToken
from components.sequences import collate, task_sequence
from components.tokenizers.text import TextTokenizer
from components.vocabulary import Vocabulary
from mdm.config import UserError
from mdm.data.pipeline import micro_batch
from mdm.data.processor import Processor
from mdm.data.settings import LossSettings, StreamSettings
from mdm.evaluation.nelbo import forward_loss, num_bytes, task_bits, unigram_bits, write_samples
from mdm.hardware import Hardware
from mdm.models import builders

HERE = Hardware(torch.device("cpu"), 0, 1, False)


def test_unigram_bits_are_of_what_is_predicted(vocabulary):
    """Images of 0 0 1 2 and 0 0 0 3: five of eight are 0, the others one each. Neither prompts nor padding have a say."""
    rows = [
        task_sequence(vocabulary, "text_to_image", {"text": torch.tensor(t), "image": torch.tensor(i) + 7}, {"image": 4})
        for t, i in (([1, 2, 3, 4, 5], [0, 0, 1, 2]), ([6], [0, 0, 0, 3]))
    ]
    batch = collate([[r] for r in rows], [[0], [1]], vocabulary.pad_id, length=20)
    expected = -(5 / 8 * math.log2(5 / 8) + 3 / 8 * math.log2(1 / 8))
    assert unigram_bits([batch]) == pytest.approx(expected)
    assert unigram_bits([batch, batch]) == pytest.approx(expected)


def test_bits_of_a_task_are_over_its_content_tokens(vocabulary, make_batch):
    micro = micro_batch(make_batch(), FixedCountMasker(vocabulary.mask_id), LossSettings(), vocabulary)
    plan = {"text": [(micro, 3), (micro, 5)], "text_to_image": [(micro, 4)]}
    assert task_bits({"text": 16 * math.log(2), "text_to_image": math.log(2)}, plan) == pytest.approx(
        {"text": 2.0, "text_to_image": 0.25}
    )


def test_bytes_are_of_the_text_without_its_end():
    processor = Processor.build({"text": TextTokenizer.train(["a spoken nine"] * 20, 270)}, {"text": 30})
    texts = ["a spoken nine", "naïve"]
    rows = [processor.sequence("text", {"text": processor.encode("text", t)}) for t in texts]
    batch = collate([[r] for r in rows], [[0], [1]], processor.vocabulary.pad_id)
    assert num_bytes([batch], processor) == sum(len(t.encode()) for t in texts)


@pytest.mark.parametrize("predicts_next", [False, True])
def test_the_nelbo_of_a_pack_is_that_of_its_documents(vocabulary, predicts_next):
    """Also without structure between them, where the first token of one would be predicted from the last of the other."""
    if predicts_next:
        vocabulary = Vocabulary.of_text(size=9, mask=8, pad=7, end=6)
    model = builders.pico(vocab_size=vocabulary.size, autoregressive=predicts_next).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    texts = ([1, 2, 3, 0], [4, 5], [6, 6, 1])
    sequences = [task_sequence(vocabulary, "text", {"text": torch.tensor(t)}, {}) for t in texts]

    def nats(rows, indices, packed):
        batch = collate(rows, indices, vocabulary.pad_id, 24 if packed else None)
        masker = NextToken() if predicts_next else FixedCountMasker(vocabulary.mask_id)
        micro = micro_batch(batch, masker, LossSettings(reduction="token"), vocabulary, packed)
        with torch.no_grad():
            return forward_loss(model, micro, vocabulary, HERE).nelbo.sum()

    alone = sum(nats([[s]], [[i]], False) for i, s in enumerate(sequences))
    assert_close(nats([sequences], [[0, 1, 2]], True), alone, rtol=1e-5, atol=1e-5)
    assert_close(nats([[s] for s in sequences], [[0], [1], [2]], False), alone, rtol=1e-5, atol=1e-5)  # padded rows


def test_samples_that_cannot_be_made_are_one_line(tmp_path):
    """Broken weights, whose loss nobody has looked at yet."""
    processor = Processor.build({"text": TextTokenizer.train(["a spoken nine"] * 20, 257)}, {"text": 8})
    model = builders.pico(vocab_size=processor.vocabulary.size)
    model.init_weights(torch.Generator().manual_seed(0))
    data = {"texts": StreamSettings(tasks={"text": 1.0}, pack=16)}
    held_out = {"texts": [{"text": "a spoken nine"}]}
    write_samples(tmp_path, model, processor, data, held_out, HERE)
    assert list((tmp_path / "text").iterdir())
    with torch.no_grad():
        model.norm.scale.fill_(torch.nan)
    with pytest.raises(UserError, match=r"^samples of text cannot be made: sample: nothing can be drawn at position"):
        write_samples(tmp_path, model, processor, data, held_out, HERE)
