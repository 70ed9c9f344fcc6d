"""What a model was trained on, beside its weights: it is written, grows, is carried, and says what was never learned."""

import shutil
from types import SimpleNamespace

import pytest

from mdm.config import UserError
from mdm.data.settings import StreamSettings
from mdm.training import record


@pytest.fixture
def folder(tmp_path):
    """As much of a model's folder as is asked for."""

    def make(name):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "config.json").write_text("{}")
        return tmp_path / name

    return make


def config(checkpoint=None, **streams):
    data = {name: StreamSettings(dict.fromkeys(tasks, 1.0) | {"image": 0.0}) for name, tasks in streams.items()}
    return SimpleNamespace(data=data, **({"checkpoint": str(checkpoint)} if checkpoint else {}))


def test_a_task_that_was_never_learned_is_named_with_those_that_were(folder):
    model = folder("a")
    record.write(model / "model", config(digits=["text_to_image", "image_to_text"], lines=["text"]), 2_500_000)
    own = record.of(model)
    assert own.learned == ["text_to_image", "image_to_text", "text"]  # a share of 0 teaches nothing
    assert own.warning("text_to_image", "text") is None
    assert own.warning("text_to_speech", "text") == (
        "the model was never trained on text_to_speech. It learned text_to_image, image_to_text, text"
    )
    assert own.line() == "trained on 2.50 M tokens of digits (text to image, image to text), lines (text)"


def test_a_model_that_learned_both_at_once_may_answer_either_way_and_that_is_said(folder):
    both, one = folder("both"), folder("one")
    record.write(both / "model", config(pairs=["joint_text_image"]), 1)
    own = record.of(both)
    assert "text_to_image; joint_text_image is of the same modalities, so it may answer. It" in own.warning("text_to_image")
    assert "may answer" not in own.warning("text_to_speech")
    record.write(one / "model", config(pairs=["text_to_image"]), 1)
    assert "may answer" not in record.of(one).warning("joint_text_image")


def test_finetuning_adds_to_what_was_learned_and_instructions_are_text(folder):
    a, b = folder("a"), folder("b")
    record.write(a / "model", config(digits=["text_to_image"]), 1_000_000)
    record.write(b / "model", config(a, talk=["instruct"]), 200_000)
    assert record.of(b).learned == ["text_to_image", "text"]
    assert record.of(b).warning("text") is None
    assert record.of(b).line() == (
        "trained on 1.00 M tokens of digits (text to image), then on 0.20 M tokens of talk (instruct)"
    )


def test_of_a_model_that_does_not_say_what_it_learned_nothing_is_missing(folder):
    """One from before this file, and whatever was finetuned from it."""
    a, b = folder("a"), folder("b")
    assert record.of(a).warning("text_to_image") is None
    record.write(b / "model", config(a, digits=["text_to_image"]), 1_000_000)
    assert record.of(b).warning("text_to_speech") is None
    assert record.of(b).line().startswith(f"began with {a}"[:40])


@pytest.mark.parametrize(
    "held",
    [
        "{",
        "[]",
        "{}",
        '{"base": 3, "trainings": []}',
        '{"base": null, "trainings": [3]}',
        '{"base": null, "trainings": [{"tokens": -1, "streams": {}}]}',
        '{"base": null, "trainings": [{"tokens": %s, "streams": {}}]}' % ("9" * 400),
        '{"base": null, "trainings": [{"tokens": 1, "streams": {"path": "text"}}]}',
        '{"base": null, "trainings": [{"tokens": 1, "streams": {"path": [[]]}}]}',
        '{"base": null, "trainings": [{"tokens": 1, "streams": {"path": ["no-task"]}}]}',
        '{"base": null, "trainings": [{"tokens": 1, "streams": {"path": ["text->image"]}}]}',
    ],
)
def test_a_file_that_holds_something_else_is_refused_in_one_line(folder, held):
    model = folder("a")
    (model / "model" / record.FILE).write_text(held)
    with pytest.raises(UserError, match=r"training\.json") as error:
        record.of(model)
    assert "\n" not in str(error.value)


def test_it_goes_where_the_model_goes(folder, tmp_path):
    a, b = folder("a"), folder("b")
    record.write(a / "model", config(digits=["text_to_image"]), 1)
    record.carry(a, b / "model")
    assert record.of(b) == record.of(a)
    record.carry(shutil.copytree(folder("c"), tmp_path / "d"), b / "model")  # one that says nothing, over one that did
    assert record.of(b).learned is None
