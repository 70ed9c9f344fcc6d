"""What is written on a command line: words stay words, a component goes by its short name."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml

from mdm.config import WORDS, UserError, find_config, instantiate, load, locate, names_modules, read_yaml
from mdm.config.spelling import typed
from mdm.recipe import load_recipe


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
    (tmp_path / "own_needy.py").write_text("import nowhere_to_be_found")
    for key in ("masker", "sampler", "model", "data.text.train", "tokenizers.image"):
        with pytest.raises(
            UserError, match=rf"{key}: unknown component 'absent.Mine'.*: No module named 'absent'; absent.py is "
        ):
            locate("absent.Mine", key)
    with pytest.raises(UserError, match=r"beside the config, in this folder \(.*\), and in PYTHONPATH=FOLDER$"):
        locate("absent.Mine", "masker")
    with pytest.raises(UserError, match=r"own_needy imports nowhere_to_be_found, which is not installed$"):
        locate("own_needy.Mine", "masker")
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


FAMILIES = {  # a key of each kind: a setting, one by name, one of a stream, an argument, one of a table of no type
    "pretrain": ["masker", "tokenizers.pen", "data.text.masker", "metric_logger", "masker.times"],
    "quickstart": ["judged.image.judge", "inference.image.sampler"],
    "generate": ["sampler", "guidance_scale"],
    "harness": ["sampler"],
    "evaluate": ["crossed.more.test"],
    "sweep_inference": ["modalities.image.untuned.sampler"],
    "tokenize_data": ["source"],
    "train_tokenizer": ["tokenizer"],
    "study": ["measure.mine"],
}


@pytest.mark.parametrize(("recipe", "key"), [(recipe, key) for recipe, keys in FAMILIES.items() for key in keys])
def test_a_component_is_named_alone_by_any_recipe_wherever_one_stands(recipe, key, tmp_path):
    """In any order with arguments of its own, on the command line; and in a file."""
    schema = load_recipe(recipe).Settings
    own = [f"{f.name}=x" for f in dataclasses.fields(schema) if f.name in ("checkpoint", "task", "output_dir")]
    own += ["crossed.more.judged=image"] if key.startswith("crossed") else []
    base = find_config(load_recipe(recipe).CONFIG)

    def at(path, *words):
        found = load(schema, path, [*own, *words])
        for part in key.split("."):
            found = found[part] if isinstance(found, dict) else getattr(found, part)
        return found

    name = "UniformTimes" if key.endswith("times") else "Confidence"
    node = {"_component_": name, "given": 8}
    assert at(base, f"{key}={name}", f"{key}.given=8") == at(base, f"{key}.given=8", f"{key}={name}") == node
    if key.startswith(("inference", "modalities", "set")) or "guidance" in key:
        return  # those who read the table take a word there
    inside = name
    for part in reversed(key.split(".")):
        inside = {part: inside}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"base": str(base), **inside}))
    assert at(tmp_path / "mine.yaml") == {"_component_": name}
    assert at(tmp_path / "mine.yaml", f"{key}.given=8") == node


def test_a_name_in_a_file_goes_under_what_is_laid_on_it_and_inside_others(tmp_path):
    (tmp_path / "low.yaml").write_text("sampler: Ancestral\nsource: Confidence")
    (tmp_path / "high.yaml").write_text("base: low.yaml\nsampler: {schedule: Cosine, temperature: 0.5}\nsource: Threshold")
    filled = load(Settings, tmp_path / "high.yaml", ["sampler.schedule=Polynomial", "sampler.schedule.power=2"])
    schedule = {"_component_": "Polynomial", "power": 2}
    assert filled.sampler == {"_component_": "Ancestral", "schedule": schedule, "temperature": 0.5}
    assert repr(instantiate(filled.sampler, "sampler").schedule) == "Polynomial(power=2)"
    assert filled.source == {"_component_": "Threshold"}
    (tmp_path / "high.yaml").write_text("sampler: {_component_: PerModality, samplers: [Confidence, Ancestral]}")
    assert len(instantiate(load(Settings, tmp_path / "high.yaml").sampler, "sampler").samplers) == 2


WRITTEN = [
    "FirstHitting",
    "Confidence top_p=0.9 num_steps=8 rank_tempered=true",
    "ReMDM variant=rescale eta=0.2 schedule=Cosine",
    "Blocks sampler=Confidence sampler.temperature=0.0 sampler.schedule=Cosine block_length=8",
    "SelfCorrect sampler=Psi sampler.eta=0.5 passes=4",
]


@pytest.mark.parametrize("line", WRITTEN)
def test_a_component_is_said_in_the_words_that_name_it(read, line):
    name, *keys = line.split()
    built = instantiate(read(f"sampler={name}", *(f"sampler.{key}" for key in keys)).sampler, "sampler")
    assert typed(built) == [name, *keys]


def test_a_component_of_ones_own_is_said_by_its_path():
    assert typed(Inner(caption="b")) == [f"{__name__}.Inner", "caption=b"]


def test_a_name_that_is_none_is_said_in_a_file_too(read):
    with pytest.raises(UserError, match=r"^sampler: 'Confidance' is not one of .* \(did you mean 'Confidence'\?\)"):
        read(yaml="sampler: Confidance")
    with pytest.raises(UserError, match=r"^canvas: keys and values stand there \(as canvas.KEY=VALUE\)"):
        read(yaml="canvas: Confidence")
    with pytest.raises(UserError, match=r"^inner.a: keys and values stand there \(as inner.a.KEY=VALUE\), got 'Confidence'"):
        read("inner.a=Confidence")


def test_a_module_that_a_name_in_place_of_a_component_is_of_belongs_to_the_config(tmp_path):
    (tmp_path / "pens.py").write_text("")
    (tmp_path / "c.yaml").write_text("sampler: pens.Own\nname: a.txt")
    assert names_modules(tmp_path / "c.yaml", read_yaml(tmp_path / "c.yaml")) == [tmp_path / "pens.py"]


WHOLE = {
    "5M": 5_000_000, "1.5B": 1_500_000_000, "2G": 2_000_000_000, "3T": 3_000_000_000_000, "12k": 12_000, "12K": 12_000,
    "5_000_000": 5_000_000, "5e6": 5_000_000, "1.5e3": 1500, "0.3k": 300, "-1k": -1000, "7": 7, "2.0": 2,
    "123456789012345.678k": 123_456_789_012_345_678,
}  # fmt: skip


@pytest.mark.parametrize("typed", WHOLE)
def test_a_whole_number_may_be_written_in_short(read, typed):
    assert read(f"number={typed}").number == read(yaml=f"number: {typed}").number == WHOLE[typed]
    assert read(f"canvas.text={typed}").canvas == read(yaml=f"canvas: {{text: {typed}}}").canvas == {"text": WHOLE[typed]}
    made = read("sampler=Confidence", f"sampler.num_steps={typed}").sampler
    assert made == {"_component_": "Confidence", "num_steps": WHOLE[typed]}
    assert read(f"name={typed}").name == typed  # words stay words


@pytest.mark.parametrize("typed", ["1.5", "0.3333k", "5X", "5MM", "M", "k5", "1e-3", "1e99", ".inf", "1.5.2M", "words"])
def test_what_is_no_whole_number_is_one_sentence(read, typed):
    for where in ({"yaml": f"number: {typed}"}, {}):
        with pytest.raises(UserError, match=r"^number: .* is no whole number; write it as 5000000, 5_000_000, 5e6 or 5M$"):
            read(*([] if where else [f"number={typed}"]), **where)


@pytest.mark.parametrize(("yaml", "key"), [("number: null", "number"), ("inner: {pen: null}", "inner.pen")])
def test_a_null_where_none_may_be_is_said_by_its_key(read, yaml, key):
    with pytest.raises(UserError, match=rf"^{key}: null is no value of it"):
        read(yaml=yaml)


def test_a_deeper_node_of_another_component_keeps_no_argument_of_the_one_that_stood_there():
    samples = "judged={image: {judge: {samples: {_component_: digits, split: judge}}}}"
    cfg = load(load_recipe("evaluate").Settings, find_config("evaluate"), ["checkpoint=x", samples])
    assert cfg.judged["image"].judge["samples"] == {"_component_": "digits", "split": "judge"}  # and no `warped`
    assert cfg.judged["image"].judge["_component_"].endswith("ImageJudge")
    assert cfg.judged["speech"].judge["samples"]["split"] == "judge"


MASKER = "sampler: {_component_: FixedCountMasker, times: {_component_: LowDiscrepancyTimes, group: 32}}"


@pytest.mark.parametrize("typed", ["5", "0", "true", "[Confidence]", "1.5"])
def test_what_takes_keys_and_values_is_told_so(read, typed):
    for key in ("sampler", "sampler.times", "canvas", "inner.a"):
        with pytest.raises(UserError, match=rf"^{key}: keys and values stand there \(as {key}.KEY=VALUE\), got"):
            read(f"{key}={typed}", yaml=MASKER + "\ncanvas: {text: 4}\ninner: {a: {caption: x}}")
    assert [read(f"anything={n}", yaml="anything: {a: 1}").anything for n in (5, 0)] == [5, 0]


@pytest.mark.parametrize("typed", ["[", "{", "*a", "!!python/object:os.system 5"])
def test_a_value_that_is_no_yaml_is_told_by_its_key(read, typed):
    with pytest.raises(UserError, match=r"^number: .* is not valid YAML: "):
        read(f"number={typed}")


def test_a_component_may_be_named_as_torchtune_does(read):
    """`masker._component_=X`: the node keeps its other keys."""
    found = read("sampler._component_=BernoulliMasker", "sampler.schedule=Linear", yaml=MASKER).sampler
    assert {"_component_", "schedule", "times"} <= set(found)
    assert (found["_component_"], found["schedule"]) == ("BernoulliMasker", {"_component_": "Linear"})


def test_a_table_of_arguments_is_spelled_by_the_component_that_stands_there(read):
    found = read("sampler={times: UniformTimes, pairs: true}", yaml=MASKER).sampler
    assert (found["times"], found["_component_"]) == ({"_component_": "UniformTimes"}, "FixedCountMasker")
    assert read("sampler={times: {group: 1k}}", yaml=MASKER).sampler["times"]["group"] == 1000
