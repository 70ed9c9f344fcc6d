"""A processor asks the tokenizers what their modalities are like, and knows none of them by its name."""

import hashlib

import pytest
import torch

from components.sequences import task_sequence
from components.tokenizers.audio import Codec2Tokenizer
from components.tokenizers.image import GreyPatchTokenizer
from components.tokenizers.text import TextTokenizer
from components.vocabulary import Vocabulary
from mdm.config import UserError, find_config, instantiate, load
from mdm.data.pipeline import corpus, tokenizers
from mdm.data.processor import Processor
from mdm.data.rows import builder
from mdm.data.settings import StreamSettings, check_streams, check_tasks, check_tokenizers, name_tasks, tasks_of
from mdm.data.validation import shown_task
from mdm.evaluation.scored import ScoredTask
from mdm.recipe import load_recipe


class Pen:
    """Words of a letter and a digit for a move; `own`: what it says of itself beside its codes."""

    codebooks = (5, 3)

    def __init__(self, **own):
        vars(self).update(own)

    def encode(self, raw):
        return torch.tensor([[ord(word[0]) - 97, int(word[1])] for word in raw.split()]).flatten()

    def decode(self, codes):
        return " ".join(f"{chr(97 + letter)}{digit}" for letter, digit in codes.view(-1, 2).tolist())

    def save(self, folder):
        return {"_component_": f"{__name__}.Pen"}


def processor(tasks=(), canvas=None, **own):
    text = TextTokenizer.train(["a word"] * 9, vocab_size=260)
    return Processor.build({"pen": Pen(**own), "text": text}, {"pen": 8, "text": 4} if canvas is None else canvas, tasks)


def test_whether_a_canvas_may_end_is_asked_of_its_tokenizer():
    ends = {"pen": {}, "fixed": {"num_tokens": 8}, "both": {"num_tokens": 8, "may_end": True}, "neither": {"may_end": False}}
    assert {name: processor(**own).vocabulary.may_end("pen") for name, own in ends.items()} == {
        "pen": True, "fixed": False, "both": True, "neither": False,
    }  # fmt: skip
    quickstart = {"image": GreyPatchTokenizer(8, 2, 3), "audio": Codec2Tokenizer()}
    vocabulary = Processor.build(quickstart, {}).vocabulary
    assert [vocabulary.may_end(m) for m in ("image", "audio")] == [False, True]


def test_a_vocabulary_is_byte_for_byte_what_it_was(tmp_path):
    """As it was written when the twelve tasks were a closed table: the ids of a checkpoint mean what they meant."""
    cfg = load(load_recipe("pretrain").Settings, find_config("pretrain"))
    image = instantiate(cfg.tokenizers["image"], "tokenizers.image")
    tokenizers = {"text": Pen(codebooks=(1024,)), "image": image, "audio": Codec2Tokenizer()}
    Processor.build(tokenizers, {}, tasks_of(cfg)).vocabulary.save(tmp_path / "vocabulary.json")
    written = hashlib.sha256((tmp_path / "vocabulary.json").read_bytes()).hexdigest()
    assert written == "6e369e959a6784998378b1ba1ad8ff5f96dbd94e0ac919c24ffdb713f4a7c971"


def test_a_part_of_any_modality_stands_on_its_canvas_and_is_read_back():
    own = processor(["text_to_pen"])
    parts = {"text": own.encode("text", "a"), "pen": own.encode("pen", "a0 e2")}
    sequence = own.sequence("text -> pen", parts)
    assert sequence.tokens[0] == own.vocabulary.special("task:text_to_pen")
    assert len(sequence) == own.overhead("text->pen") + 4 + 8
    pen = sequence.tokens[sequence.maskable]
    assert (pen[4:] == own.vocabulary.end_id).all()
    assert own.decode("pen", pen) == "a0 e2"
    fits = builder("x", StreamSettings({"text_to_pen": 1.0}, on_long="cut"), own).prepare({"text": "a", "pen": "a0 " * 5})
    assert len(fits.sample["pen"]) == 8
    whole = builder("x", StreamSettings({"text_to_pen": 1.0}, on_long="skip"), processor(["text_to_pen"], num_tokens=8))
    with pytest.raises(ValueError, match=r"its pen of 10 tokens does not fit canvas.pen = 8"):
        whole.prepare({"text": "a", "pen": "a0 " * 5})


def test_a_length_is_that_of_the_words_or_of_the_one_modality_that_has_none_of_its_own():
    own = processor(["text_to_pen", "joint_text_pen", "pen_to_text"], draw=lambda raw: None)  # so that it is no words
    assert own.stretched("text_to_pen", 6) == {"pen": 6, "text": 4}
    assert own.stretched("joint_text_pen", 3) == {"pen": 8, "text": 3}
    assert own.stretched("pen_to_text", None) == {"pen": 8, "text": 4}
    with pytest.raises(ValueError, match=r"canvas.pen must be a positive multiple of 2 \(codebooks\), got 7"):
        own.stretched("text_to_pen", 7)
    with pytest.raises(ValueError, match=r"length=6: task text_to_pen generates pen, whose length is fixed"):
        processor(["text_to_pen"], num_tokens=8).stretched("text_to_pen", 6)
    with pytest.raises(ValueError, match=r"generates text and pen, each with a length of its own"):
        processor(["joint_text_pen"]).stretched("joint_text_pen", 6)


def test_a_canvas_is_as_long_as_its_tokenizer_says():
    with pytest.raises(ValueError, match=r"canvas.pen = 8, and its tokenizer makes 6 tokens of each"):
        processor(num_tokens=6)


def test_a_rate_is_asked_of_whatever_has_one():
    own = processor(sample_rate=100)
    own.check_rate({"pen": "a0", "sample_rate": 100})
    own.check_rate({"text": "a", "sample_rate": 8000})
    with pytest.raises(ValueError, match="pen at 50 Hz, but the pen tokenizer takes 100 Hz"):
        own.encode_sample({"pen": "a0", "sample_rate": 50})


def test_a_processor_grows_by_tasks_and_its_ids_stay():
    old = processor(["text_to_pen"])
    same = old.grown({}, {}, ["text_to_pen", "text"])
    assert same.vocabulary == old.vocabulary
    new = old.grown({}, {}, ["text_to_pen", "pen", "pen_to_text"])
    assert new.vocabulary.tasks == (*old.vocabulary.tasks, "pen", "pen_to_text")
    assert all(new.vocabulary.special(name) == old.vocabulary.special(name) for name in old.vocabulary.specials)
    assert new.vocabulary.size == old.vocabulary.size + 2
    image = old.grown({"image": GreyPatchTokenizer(8, 2, 3)}, {}, ["image_to_pen"])
    assert image.vocabulary.tasks == (
        "text",
        "text_to_pen",
        "text_to_image",
        "image_to_text",
        "joint_text_image",
        "image_to_pen",
    )
    assert not image.vocabulary.may_end("image")


def test_a_text_model_from_elsewhere_gets_no_task_token_while_it_knows_text_alone():
    elsewhere = Processor(Vocabulary.of_text(300, 299, 298, 297), {"text": old_text()}, {})
    assert elsewhere.grown({}, {}, ["text"]).vocabulary == elsewhere.vocabulary
    assert elsewhere.grown({"pen": Pen()}, {}, ["text_to_pen"]).vocabulary.tasks == ("text", "text_to_pen")


def old_text():
    return TextTokenizer.train(["a word"] * 9, vocab_size=260)


def test_a_stream_is_shown_by_what_it_makes_of_text_or_of_nothing():
    assert shown_task({"pen_to_text": 1, "text_to_pen": 1}) == "text_to_pen"
    assert shown_task({"image_to_text": 1, "text_to_image": 1, "joint_text_image": 1}) == "text_to_image"
    assert shown_task({"pen_to_image": 1, "pen": 1}) == "pen"
    assert shown_task({"pen_to_image": 1, "joint_pen_image": 1}) == "pen_to_image"
    assert shown_task({"instruct": 1}) == "instruct"


def stream(*tasks, **more):
    return StreamSettings(
        dict.fromkeys(tasks, 1.0), train={"_component_": "components.data.digits.digits", "split": "test"}, **more
    )


def test_tasks_are_called_by_their_names_once_and_early():
    data = {"a": stream("text->pen", "pen_to_text"), "b": stream("instruct"), "c": stream("-> text", pack=32)}
    check_streams(data)
    assert [list(s.tasks) for s in data.values()] == [["text_to_pen", "pen_to_text"], ["instruct"], ["text"]]
    with pytest.raises(UserError, match=r"^data.a.tasks: text_to_pen stands twice, once as 'text->pen'$"):
        name_tasks({"a": stream("text_to_pen", "text->pen")})
    with pytest.raises(UserError, match=r"^data.a.tasks: 'text-' is no task: write an arrow in quotes"):
        name_tasks({"a": stream("text-")})


def test_the_tasks_of_a_config_are_those_of_its_streams_and_then_of_its_judges():
    class Config:
        data = {"a": stream("text_to_pen"), "b": stream("instruct")}
        judged = {"pen": type("Judged", (), {"write": "text_to_pen", "read": "pen_to_text", "complete": None})}
        crossed = {"pen_to_speech": ScoredTask(), "heard": ScoredTask(task="speech_to_pen")}

    assert tasks_of(Config) == ["text_to_pen", "pen_to_text", "pen_to_speech", "speech_to_pen"]


@pytest.mark.parametrize(
    ("tokenizers", "canvas", "message"),
    [
        (["text", "image"], {}, r"task text_to_smell of data.x needs tokenizers.smell; there are text, image"),
        (["text", "smell"], {"text": 4}, r"task text_to_smell of data.x needs canvas.smell, its length in tokens"),
        (
            ["text", "smell"],
            {"text": 4, "smell": 64},
            r"task text_to_smell of data.x takes 73 positions \(canvases: text",
        ),
    ],
)
def test_a_task_needs_its_tokenizers_and_canvases(tokenizers, canvas, message):
    with pytest.raises(UserError, match=message):
        check_tasks({"x": stream("text_to_smell")}, dict.fromkeys(tokenizers), canvas, 64)


def test_a_tokenizer_stands_under_a_name_that_tasks_can_be_made_of():
    with pytest.raises(UserError, match=r"^tokenizers: a modality's name is letters and digits, .*; got 'pen_strokes'$"):
        check_tokenizers({"pen_strokes": {"_component_": f"{__name__}.Pen"}})


def test_a_task_is_part_of_the_row_whatever_it_is_called():
    """The same sequence by every name of the task, with its token: it would be left out where the vocabulary had another."""
    own = processor(["text_to_pen"])
    parts = {"text": own.encode("text", "a")}
    rows = [task_sequence(own.vocabulary, name, parts, own.canvas).tokens for name in ("text_to_pen", "text->pen")]
    assert torch.equal(*rows)


def test_words_of_any_name_train_their_own_tokenizer():
    """Under another name than text, which other samples have too."""
    sources = {"a": [{"title": "mountain " * 9, "text": "valley " * 9}, {"text": "river " * 9}], "b": [{"pen": "a0 b1"}]}
    nodes = {name: {"_component_": "TextTokenizer.train", "vocab_size": 300} for name in ("title", "text")}
    built = tokenizers(nodes, lambda modality: corpus(sources, modality))
    lengths = {name: [len(built[name].encode(word)) for word in ("mountain", "valley", "river")] for name in built}
    assert lengths == {"title": [1, 6, 5], "text": [8, 1, 1]}


def test_a_canvas_is_of_whole_frames():
    with pytest.raises(ValueError, match=r"canvas.pen must be a positive multiple of 2 \(codebooks\), got 7"):
        Processor.build({"text": old_text(), "pen": Pen()}, {"pen": 7})
