"""What is written on a command line: words stay words, a component goes by its short name."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from mdm.config import WORDS, UserError, instantiate, load, locate


@dataclass
class Inner:
    caption: str = "a {}"
    sampler: dict[str, Any] | None = None


@dataclass
class Settings:
    prompt: Any = field(default=None, metadata=WORDS)
    edit: str | None = None
    name: str = "x"
    number: int = 1
    anything: Any = None
    sampler: dict[str, Any] | None = None
    source: dict[str, Any] = field(default_factory=dict)
    canvas: dict[str, int | None] = field(default_factory=dict)
    inner: dict[str, Inner] = field(default_factory=dict)


@pytest.fixture
def read(tmp_path):
    def read(*arguments, yaml="number: 2"):
        (tmp_path / "c.yaml").write_text(yaml)
        return load(Settings, tmp_path / "c.yaml", arguments)

    return read


TEXTS = ["007", "no", "12:30", "[mask:6]", "1e3", " two  spaces ", "{a: b}", "'q'"]


@pytest.mark.parametrize("typed", [*TEXTS, "null", "", "${x}", "$5 \\${y}", "a=b", "~", "???"])
def test_words_are_taken_as_they_are_typed(read, typed):
    assert read(f"prompt={typed}").prompt == typed
    assert read(f"prompt.text={typed}", "prompt.image=a.png").prompt == {"text": typed, "image": "a.png"}


@pytest.mark.parametrize("typed", TEXTS)
def test_text_of_any_setting_is_text(read, typed):
    filled = read(f"name={typed}", f"edit={typed}", f"inner.a.caption={typed}", yaml="inner: {a: {caption: x}}")
    assert (filled.name, filled.edit, filled.inner["a"].caption) == (typed, typed, typed)
    source = "source: {_component_: components.data.digits.digits, split: train}"
    assert read(f"source.caption={typed}", yaml=source).source["caption"] == typed


def test_an_argument_of_what_is_null_is_refused_by_name(read):
    """`mdm generate ... sampler.num_steps=4` where no sampler is named."""
    settings = read("sampler.num_steps=4")
    with pytest.raises(UserError, match=r"sampler: it needs a _component_ .*; it has num_steps"):
        instantiate(settings.sampler, "sampler")
    assert read("sampler=Confidence", "sampler.num_steps=4").sampler["num_steps"] == 4


def test_a_name_that_a_file_of_ones_own_does_not_have_is_said_as_such(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_file.py").write_text("x = 1")
    (tmp_path / "own_broken.py").write_text("def f(:\n")
    with pytest.raises(UserError, match=r"masker: unknown component 'own_file.Mine'.*: own_file has no Mine$"):
        locate("own_file.Mine", "masker")
    with pytest.raises(UserError, match=r"unknown component 'own_broken.f'.*: invalid syntax \(own_broken.py, line 1\)"):
        locate("own_broken.f", "masker")


def test_null_empties_what_may_be_absent_and_interpolation_goes_on(read):
    assert read("edit=null", yaml="edit: a").edit is None
    assert read("name=${number}").name == "2"
    assert read("anything=007").anything == 7
    assert read("anything=no").anything is False


def test_words_of_a_file_are_quoted(read):
    assert read(yaml="prompt: '007'").prompt == "007"
    assert read(yaml="prompt: {text: a, image: b.png}").prompt == {"text": "a", "image": "b.png"}
    assert read(yaml="prompt: null").prompt is None
    with pytest.raises(UserError, match=r"prompt: .*c\.yaml says 7, and it is words; write them in quotes"):
        read(yaml="prompt: 007")
    with pytest.raises(UserError, match=r"prompt\.text: .* says False"):
        read(yaml="prompt: {text: no}")


def test_a_component_goes_by_its_short_name(read):
    assert read("sampler=Confidence", "sampler.num_steps=3").sampler == {"_component_": "Confidence", "num_steps": 3}
    before = "sampler: {_component_: components.samplers.Ancestral, schedule: {_component_: components.schedules.Cosine}}"
    assert read("sampler=Confidence", yaml=before).sampler == {"_component_": "Confidence"}
    changed = read("sampler.schedule=Linear", yaml=before).sampler
    assert changed["schedule"] == {"_component_": "Linear"}
    assert repr(instantiate(changed, "sampler")).startswith("Ancestral(temperature=1.0")
    assert read("source=mine.Own").source == {"_component_": "mine.Own"}
    assert read("sampler=null", yaml=before).sampler is None
    with pytest.raises(UserError, match=r"sampler: 'Confidance' is not one of .* \(did you mean 'Confidence'\?\)"):
        read("sampler=Confidance")
    with pytest.raises(UserError, match="canvas"):  # holds no component
        read("canvas=Confidence", yaml="canvas: {text: 4}")


@pytest.mark.parametrize(("yaml", "key"), [("number: null", "number"), ("inner: {pen: null}", "inner.pen")])
def test_a_null_where_none_may_be_is_said_by_its_key(read, yaml, key):
    with pytest.raises(UserError, match=rf"^{key}: null is no value of it"):
        read(yaml=yaml)
