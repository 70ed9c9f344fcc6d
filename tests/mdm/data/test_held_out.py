"""A share of a source that is held out: said once in a stream, and two sources of the same node."""

import pytest

from mdm.config import UserError
from mdm.data.settings import StreamSettings, hold_out

FOLDER = {"_component_": "Folder", "path": "data", "kind": "text"}


def test_a_stream_that_holds_out_has_two_sources_of_one_node():
    data = {"a": StreamSettings({"text": 1.0}, train=FOLDER, held_out=0.2), "b": StreamSettings({"text": 1.0}, train=FOLDER)}
    for _ in range(2):  # settings may be checked twice
        hold_out(data)
        assert data["a"].train == {**FOLDER, "split": "train", "held_out": 0.2}
        assert data["a"].validation == {**FOLDER, "split": "validation", "held_out": 0.2}
    assert (data["b"].train, data["b"].validation) == (FOLDER, None)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ({"train": FOLDER, "validation": FOLDER}, "data.a.held_out: there is a validation source; take out one of them"),
        ({"train": FOLDER, "held_out": 10}, "data.a.held_out must be a share between 0 and 1, got 10"),
        ({"train": {"_component_": "digits", "split": "train"}}, "digits cannot be split; name a source at data.a.validation"),
        ({"train": {"_component_": "hugging_face", "path": "x"}}, r'validation; split "train\[:90%\]" and "train\[90%:\]"'),
        ({"train": None}, "data.a.train: expected a _component_, got None"),
    ],
)
def test_what_cannot_be_held_out_is_said(stream, message):
    with pytest.raises(UserError, match=message):
        hold_out({"a": StreamSettings({"text": 1.0}, **{"held_out": 0.1, **stream})})
