"""Tasks: a name for each, a task for each name, an arrow for those who like it, and a line for every mistake."""

import itertools
import random

import pytest

from components.tasks import KNOWN, Task, check_modality, find_task, formed, name_of
from components.vocabulary import Vocabulary

NAMES = ("text", "image", "audio", "pen", "smell", "a", "touch2", "too", "joints", "Tö")


def test_the_name_of_any_task_finds_it_again():
    rng = random.Random(0)
    for _ in range(1000):
        modalities = rng.sample(NAMES, rng.randint(1, 5))
        given = rng.randint(0, len(modalities) - 1)
        task = Task(tuple(modalities[:given]), tuple(modalities[given:]))
        assert find_task(name_of(task)) == task


def test_no_two_tasks_share_a_name():
    few = [
        Task(order[:given], order[given:])
        for count in (1, 2, 3, 4)
        for order in itertools.permutations(("audio", "b", "text", "c"), count)
        for given in range(count)
    ]
    assert len({name_of(task) for task in few}) == len(few)


@pytest.mark.parametrize(
    ("given", "generated", "name", "aliases"),
    [
        ((), ("pen",), "pen", ("-> pen", "->pen", " -> pen ")),
        (("text",), ("pen",), "text_to_pen", ("text->pen", "text -> pen")),
        (("text", "pen"), ("audio",), "text_pen_to_speech", ("text, pen -> speech", "text,pen->audio", "text_pen_to_audio")),
        (("audio",), ("text",), "speech_to_text", ("audio -> text", "audio_to_text")),
        ((), ("text", "pen"), "joint_text_pen", ("-> text, pen",)),
        (("text",), ("pen", "audio"), "text_to_pen_speech", ("text -> pen, audio",)),
        ((), ("audio",), "speech", ("audio", "-> speech")),
    ],
)
def test_every_way_to_write_a_task_has_one_name(given, generated, name, aliases):
    for written in (name, *aliases):
        assert find_task(written) == Task(given, generated)
        assert name_of(find_task(written)) == name


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("text_to_text", "'text_to_text' is no task: text stands twice"),
        ("text_speech_to_audio", "audio stands twice"),
        ("-> text, text", "text stands twice"),
        ("text ->", "it generates nothing"),
        ("->", "it generates nothing"),
        ("text, -> pen", "a modality's name is letters and digits, .*; got ''"),
        ("text -> pen -> image", "got 'pen -> image'"),
        ("to_pen", "nothing stands before to"),
        ("text_to", "nothing stands behind to"),
        ("text_to_", "got ''"),
        ("text_to_pen_to_image", "got 'to'"),
        ("joint_to_pen", "got 'joint'"),
        ("joint_text", "write GIVEN_to_GENERATED"),
        ("text_pen", r"write GIVEN_to_GENERATED \(text_to_image\), joint_A_B \(joint_text_image\), or one modality \(text\)"),
        ("instruct", "got 'instruct'"),
        ("", "got ''"),
        ("text-", r"'text-' is no task: write an arrow in quotes \(\"text->image\"\); without, the shell makes"),
        ("-", "write an arrow in quotes"),
        ("text>pen", "write an arrow in quotes"),
    ],
)
def test_what_is_no_task_is_one_line_that_says_why(written, why):
    with pytest.raises(ValueError, match=why) as told:
        find_task(written)
    assert "\n" not in str(told.value)
    assert str(told.value).startswith(f"{written!r} is no task: ")


@pytest.mark.parametrize("name", ["x" * 10**6, "text_to_" + "_".join(f"a{i}" for i in range(10**5))])
def test_a_name_without_end_is_cited_in_short(name):
    with pytest.raises(ValueError, match=r"^'.{40}'\.\.\. is no task: it has [\d,]+ characters$"):
        find_task(name)


@pytest.mark.parametrize("name", ["to", "joint", "speech", "instruct", "pen_strokes", "", "2d", "a b", "a-b", "a,b", "a->b"])
def test_a_modality_has_a_name_that_tasks_can_be_made_of(name):
    with pytest.raises(ValueError, match="a modality's name is letters and digits, and not to, joint, instruct or speech; got"):
        check_modality(name)
    with pytest.raises(ValueError, match="a modality's name is letters and digits"):
        Vocabulary.build({name: (3,)}, [])


def test_the_tasks_of_a_vocabulary_are_those_of_always_and_then_a_config_s_own():
    assert formed(("text", "image", "audio")) == list(KNOWN)
    assert formed(("image", "text")) == ["text", "text_to_image", "image_to_text", "joint_text_image"]
    own = ["text -> pen", "text_to_smell", "text_to_image", "pen_to_text", "text_to_pen"]
    assert formed(("pen", "text"), own) == ["text", "text_to_pen", "pen_to_text"]
    assert formed(("pen",)) == []
    vocabulary = Vocabulary.build({"text": (3,), "pen": (2,)}, ["pen"], formed(("pen", "text"), own))
    assert vocabulary.tasks == ("text", "text_to_pen", "pen_to_text")
