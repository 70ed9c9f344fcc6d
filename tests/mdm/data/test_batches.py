"""What a run makes of its data: batches that grow, rows that need a mask or none, and held-out samples with equal noise."""

import numpy as np
import pytest
import torch

from components.maskers import FixedCountMasker
from components.sequences import collate
from components.tokenizers.audio import Codec2Tokenizer
from components.tokenizers.image import GreyPatchTokenizer
from components.tokenizers.text import TextTokenizer
from mdm.data.pipeline import micro_batch, streams
from mdm.data.processor import Processor
from mdm.data.settings import BatchSettings, LossSettings, StreamSettings
from mdm.data.validation import validation_batches


@pytest.fixture(scope="module")
def processor():
    text = TextTokenizer.train(["a handwritten seven", "nine"] * 20, vocab_size=300)
    tokenizers = {"text": text, "image": GreyPatchTokenizer(8, 2, 3), "audio": Codec2Tokenizer()}
    return Processor.build(tokenizers, {"text": 6, "image": 16, "audio": 16})


def test_the_batch_grows_at_its_shares_of_the_horizon():
    batch = BatchSettings(logical=8, micro=4, physical=16, ramp={0.25: 32, 0.5: 64})
    assert [batch.at(share) for share in (0.0, 0.24, 0.25, 0.49, 0.5, 1.0)] == [16, 16, 32, 32, 64, 64]
    assert BatchSettings(logical=8, micro=4).at(0.7) == 8


def test_tasks_are_drawn_by_their_shares_and_prompts_dropped_by_chance(processor):
    """Of 400 rows: shares within 5 standard errors sqrt(p (1 - p) / 400), which are 0.11 and 0.075."""
    data = {"digits": StreamSettings(tasks={"text_to_image": 3.0, "image_to_text": 1.0})}
    codes = torch.zeros(16, dtype=torch.long)
    masker = {"digits": FixedCountMasker(processor.vocabulary.mask_id)}
    (stream,) = streams(data, {"digits": [{"text": "nine", "image": codes}]}, processor, masker, seed=0, prompt_dropout=0.1)
    parts = {"text": processor.encode("text", "nine"), "image": processor.encode("image", codes)}
    rng = np.random.default_rng(0)
    rows = [stream.build(parts, rng)[0] for _ in range(400)]
    drawn = [int(row.tokens[0]) == processor.vocabulary.special("task:text_to_image") for row in rows]
    assert np.mean(drawn) == pytest.approx(0.75, abs=0.11)
    dropped = [bool((row.tokens[row.prompt] == processor.vocabulary.mask_id).all()) for row in rows]
    assert np.mean(dropped) == pytest.approx(0.1, abs=0.075)


@pytest.mark.parametrize(
    ("texts", "packed", "whole"),
    [(["nine", "nine"], False, True), (["nine", "a handwritten seven"], False, False), (["nine", "nine"], True, False)],
)
def test_rows_need_a_mask_where_they_hold_padding_or_may_hold_several_documents(processor, texts, packed, whole):
    rows = [[processor.text_sequence(processor.text_document({"text": t}))] for t in texts]
    batch = collate(rows, [[0], [1]], processor.vocabulary.pad_id)
    masker = FixedCountMasker(processor.vocabulary.mask_id)
    assert micro_batch(batch, masker, LossSettings(), processor.vocabulary, packed).whole_rows is whole


def test_a_document_ends_with_the_end_token(processor):
    ids = processor.text_document({"text": "nine"})
    assert ids.tolist() == [*processor.encode("text", "nine").tolist(), processor.vocabulary.end_id]


def test_a_canvas_holds_what_stands_before_its_first_end(processor):
    nine, seven = (processor.encode("text", t) for t in ("nine", "seven"))
    end = torch.tensor([processor.vocabulary.end_id])
    assert processor.decode("text", torch.cat([nine, end, seven, end])) == "nine"


def test_a_clip_of_another_rate_is_refused(processor):
    clip = torch.zeros(800).numpy()
    assert len(processor.encode_sample({"audio": clip, "sample_rate": 8000})["audio"]) == 12
    with pytest.raises(ValueError, match="audio at 16000 Hz, but the audio tokenizer takes 8000 Hz"):
        processor.encode_sample({"audio": clip, "sample_rate": 16000})


def test_held_out_samples_have_noise_of_their_own_and_are_counted_by_their_content(processor):
    """Five captions of one token, in batches of two, twice: of each canvas of six the token and its end are content."""
    data = {"words": StreamSettings(tasks={"image_to_text": 1.0})}
    image = torch.zeros(16, dtype=torch.long)
    source = [{"text": "nine", "image": image}] * 5
    plan = validation_batches(data, {"words": source}, processor, samples=5, batch_size=2, repeats=2)
    batches = plan["image_to_text"]
    assert [tokens for _, tokens in batches] == [4] * 5
    assert torch.cat([micro.noisy.clean.document[:, 0] for micro, _ in batches]).tolist() == list(range(10))
    counts = [count for micro, _ in batches for count in micro.noisy.mask.sum(dim=1).tolist()]
    assert {counts.count(k) for k in range(1, 7)} == {1, 2}  # 10 times in 6 equal parts, evenly: low discrepancy over all
    again = validation_batches(data, {"words": source}, processor, samples=5, batch_size=2, repeats=2)
    assert all(torch.equal(a.noisy.mask, b.noisy.mask) for (a, _), (b, _) in zip(batches, again["image_to_text"], strict=True))
