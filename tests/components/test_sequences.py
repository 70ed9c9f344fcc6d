import pytest
import torch

from components.sequences import collate, content, response_sequence, task_sequence
from components.tasks import find_task
from components.vocabulary import Vocabulary


@pytest.fixture
def parts(vocabulary):
    return {
        "text": torch.tensor([1, 2]),
        "image": vocabulary.to_global("image", torch.tensor([0, 1, 2, 3])),
        "audio": vocabulary.to_global("audio", torch.tensor([1, 0, 2, 1])),
    }


CANVAS = {"text": 3, "image": 4, "audio": 6}


def test_layout_of_a_pair(vocabulary, parts):
    s = task_sequence(vocabulary, "text_to_image", parts, CANVAS)
    v = vocabulary
    expected = [v.special("task:text_to_image"), v.special("begin:text"), 1, 2, v.end_id, v.special("close:text")]
    expected += [v.special("begin:image"), *parts["image"].tolist(), v.special("close:image")]
    assert s.tokens.tolist() == expected
    assert s.prompt.nonzero()[:, 0].tolist() == [2, 3, 4]
    assert s.maskable.nonzero()[:, 0].tolist() == [7, 8, 9, 10]


@pytest.mark.parametrize("task", ["text_to_image", "text_to_speech", "image_to_text", "speech_to_text", "joint_text_image"])
def test_prompt_and_maskable_are_the_given_and_the_generated(vocabulary, parts, task):
    s = task_sequence(vocabulary, task, parts, CANVAS)
    for modality in find_task(task).modalities:
        own = s.modality == vocabulary.modalities.index(modality)
        assert int(own.sum()) == CANVAS[modality]
        assert (s.prompt[own] if modality in find_task(task).given else s.maskable[own]).all()
    assert not (s.prompt & s.maskable).any()
    assert not (s.maskable & (s.modality == -1)).any()


def test_end_fill_is_maskable_and_lies_inside_the_canvas(vocabulary, parts):
    s = task_sequence(vocabulary, "text_to_speech", parts, CANVAS)
    audio = s.tokens[s.modality == 2]
    assert audio.tolist() == [*parts["audio"].tolist(), vocabulary.end_id, vocabulary.end_id]
    assert s.maskable[s.modality == 2].all()
    assert vocabulary.id_ranges("audio", 6).tolist() == s.id_range[s.modality == 2].tolist()


def test_a_dropped_prompt_is_masks_and_is_not_counted(vocabulary, parts):
    s = task_sequence(vocabulary, "text_to_image", parts, CANVAS, drop_prompt=True)
    assert (s.tokens[s.prompt] == vocabulary.mask_id).all()
    assert not s.maskable[s.prompt].any()
    assert s.tokens[0] == vocabulary.special("task:text_to_image")
    assert torch.equal(s.tokens[s.maskable], parts["image"])  # what is generated stays


def test_an_absent_part_is_a_canvas_to_sample(vocabulary, parts):
    s = task_sequence(vocabulary, "text_to_image", {"text": parts["text"]}, CANVAS)
    assert (s.tokens[s.maskable] == vocabulary.mask_id).all()
    assert int(s.maskable.sum()) == 4


def test_packing_keeps_documents_and_positions_apart(vocabulary):
    sequences = [task_sequence(vocabulary, "text", {"text": torch.tensor(t)}, {}) for t in ([1, 2, 3], [4, 5])]
    batch = collate([sequences], [[7, 8]], vocabulary.pad_id, length=14)
    assert batch.document[0].tolist() == [7] * 6 + [8] * 5 + [-1] * 3
    assert batch.position[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 0, 0, 0]
    assert (batch.tokens[0, 11:] == vocabulary.pad_id).all()
    assert not batch.maskable[0, 11:].any()
    assert batch.num_tokens == 11
    assert not batch.one_document_per_row
    assert collate([[sequences[0]]], [[0]], vocabulary.pad_id).one_document_per_row


def test_the_content_of_a_document_does_not_depend_on_the_one_before_it():
    """A model from elsewhere has no boundary tokens: a document's end stands beside the next one's first token, an end too."""
    plain = Vocabulary.of_text(size=9, mask=8, pad=7, end=6)
    sequences = [task_sequence(plain, "text", {"text": torch.tensor(t)}, {}) for t in ([1, 6], [6, 6], [6, 2, 6])]
    batch = collate([sequences], [[0, 1, 2]], plain.pad_id, length=9)
    assert content(batch, plain.end_id)[0].long().tolist() == [1, 1, 1, 0, 1, 1, 1, 0, 0]


def test_of_a_response_sequence_the_response_and_its_fill_are_predicted(vocabulary):
    sequence = response_sequence(vocabulary, torch.tensor([1, 2, 3]), torch.tensor([4, 5]), length=4)
    end = vocabulary.end_id
    assert sequence.tokens[sequence.maskable].tolist() == [4, 5, end, end]
    assert sequence.tokens[sequence.prompt].tolist() == [1, 2, 3]
    dropped = response_sequence(vocabulary, torch.tensor([1, 2, 3]), torch.tensor([4, 5]), length=4, drop_prompt=True)
    assert dropped.tokens[dropped.prompt].tolist() == [vocabulary.mask_id] * 3
    assert dropped.tokens[dropped.maskable].tolist() == [4, 5, end, end]


def test_content_ends_with_the_first_end_token(vocabulary, parts):
    s = task_sequence(vocabulary, "text_to_speech", parts, {"text": 3, "audio": 8})
    batch = collate([[s]], [[0]], vocabulary.pad_id)
    assert int(content(batch, vocabulary.end_id).sum()) == 5  # four codes and the first of four end tokens


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v, p: task_sequence(v, "text_to_image", {}, CANVAS), "it is given text, and there is none"),
        (
            lambda v, p: task_sequence(v, "text_to_image", p, {"text": 1, "image": 4}),
            "text of 2 tokens does not fit its canvas of 1",
        ),
        (lambda v, p: task_sequence(v, "text_to_image", p, {"text": 3, "image": 5}), "image of 4 tokens does not fit"),
        (lambda v, p: task_sequence(v, "text_to_image", {"text": p["text"]}, {"text": 3}), "it needs a canvas length"),
        (lambda v, p: collate([[task_sequence(v, "text", p, {})]], [[0]], v.pad_id, length=2), "does not fit 2"),
    ],
)
def test_mistakes_are_named(vocabulary, parts, call, message):
    with pytest.raises(ValueError, match=message):
        call(vocabulary, parts)
