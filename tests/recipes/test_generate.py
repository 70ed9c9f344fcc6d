"""`mdm generate` as a user runs it, on an untrained model: every task, prompts from a file, edits, films, and mistakes."""

import json
import wave

import numpy as np
import pytest
from PIL import Image

from components.tasks import KNOWN, find_task
from components.tokenizers.clips import write_wav
from mdm.config import UserError, find_config, load
from mdm.generation.editing import infill
from mdm.generation.generate import generate
from mdm.models.folder import load_model
from mdm.recipe import load_recipe

TEXTS = {"text": "a seven"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A picture and a clip of a user's."""
    folder = tmp_path_factory.mktemp("files")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)).save(folder / "picture.png")
    write_wav(folder / "clip.wav", np.sin(np.arange(1280) / 5) * 0.5, 8000)
    return folder


def make(untrained, output_dir, *overrides):
    """The recipe in this process: as `mdm generate`, without an interpreter of its own."""
    recipe = load_recipe("generate")
    common = [f"checkpoint={untrained}", f"output_dir={output_dir}", "device=cpu", "precision=fp32"]
    cfg = load(recipe.Settings, find_config("generate"), [*common, *overrides])
    recipe.validate(cfg)
    recipe.main(cfg)
    return [json.loads(line) for line in (output_dir / "outputs.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", KNOWN)
def test_every_task_writes_what_it_generates(untrained, files, tmp_path, task):
    values = {"text": "a seven", "image": files / "picture.png", "audio": files / "clip.wav"}
    prompt = [f"prompt.{m}={values[m]}" for m in find_task(task).given]
    lines = make(untrained, tmp_path / "out", f"task={task}", "count=2", *prompt)
    assert len(lines) == 2
    for line in lines:
        assert set(find_task(task).generated) <= set(line)
        for modality in ("image", "audio"):
            if modality in find_task(task).generated:
                assert (tmp_path / "out" / line[modality]).stat().st_size > 40


def test_prompts_come_from_a_file_and_each_is_sampled_count_times(untrained, tmp_path):
    (tmp_path / "many.jsonl").write_text('{"text": "a seven"}\n\n{"text": "nine"}\n')
    lines = make(
        untrained, tmp_path / "out", "task=text_to_image", f"prompts={tmp_path / 'many.jsonl'}", "count=3", "batch_size=2"
    )
    assert [line["given_text"] for line in lines] == ["a seven"] * 3 + ["nine"] * 3
    assert len(list((tmp_path / "out").glob("0*.png"))) == 6


WRITTEN = {
    "a text to go on with": ("text", {"prompt": "The value"}, ["length=9"]),
    "a text to go on with, at its own length": ("text", {"prompt": "The value of"}, []),
    "a text from nothing": ("text", {}, ["length=20"]),
    "a text with gaps": ("text", {"edit": "The [mask:5] of the [mask] is"}, []),
    "a caption by its name": ("text_to_image", {"text": "a seven"}, []),
    "the one thing that is given": ("text_to_image", {"prompt": "a seven"}, []),
    "an image to read": ("image_to_text", {"prompt": "{picture}"}, ["length=6"]),
    "an edit with a caption": ("text_to_image", {"text": "a nine", "edit": "{picture}", "region": "0,4,8,8"}, []),
    "a clip in part": ("text_to_speech", {"prompt": "a nine", "edit": "{clip}", "region": "0.05-"}, []),
}


@pytest.mark.parametrize("case", WRITTEN, ids=lambda c: c.replace(" ", "_"))
def test_a_line_of_a_file_and_the_same_words_on_the_command_line_are_one_prompt(untrained, files, tmp_path, case):
    task, keys, more = WRITTEN[case]
    keys = {k: v.format(picture=files / "picture.png", clip=files / "clip.wav") for k, v in keys.items()}
    (tmp_path / "one.jsonl").write_text(json.dumps(keys) + "\n")
    words = [f"{k if k in ('prompt', 'edit', 'region') else 'prompt.' + k}={v}" for k, v in keys.items()]
    common = [f"task={task}", "count=2", *more]
    typed = make(untrained, tmp_path / "typed", *common, *words)
    read = make(untrained, tmp_path / "read", *common, f"prompts={tmp_path / 'one.jsonl'}")
    assert typed == read
    noisy = "samples.png" if any("audio" in line for line in typed) else None  # codec2's decoder draws noise of its own
    for file in (tmp_path / "typed").iterdir():
        other = tmp_path / "read" / file.name
        assert file.name == noisy or file.stat().st_size == other.stat().st_size
        assert file.name == noisy or file.suffix == ".wav" or file.read_bytes() == other.read_bytes()


def test_a_text_from_nothing_and_one_gone_on_with_are_those_of_the_api(untrained, tmp_path):
    """As `generate` makes them: on a canvas of `length`; and the prompt's tokens with as many masks behind them."""
    model, processor = load_model(untrained)
    expected = generate(model, processor, "text", [{}] * 3, seed=4, length=20).outputs
    lines = make(untrained, tmp_path / "a", "task=text", "length=20", "count=3", "seed=4")
    assert [line["text"] for line in lines] == [o["text"] for o in expected]
    expected = generate(model, processor, "text", [{"text": infill(processor, "The value[mask:9]")}] * 3, seed=4).outputs
    lines = make(untrained, tmp_path / "b", "task=text", "prompt=The value", "length=9", "count=3", "seed=4")
    assert [line["text"] for line in lines] == [o["text"] for o in expected]


def test_lines_of_several_kinds_do_not_change_one_another(untrained, tmp_path):
    """Each has its own length: a text with gaps keeps it beside one from nothing."""
    lines = [{"edit": "The [mask:5] statement"}, {}, {"prompt": "The [mask] is"}]
    (tmp_path / "many.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    gaps, _, on = make(untrained, tmp_path / "all", "task=text", f"prompts={tmp_path / 'many.jsonl'}", "count=1")
    (alone,) = make(untrained, tmp_path / "one", "task=text", "edit=The [mask:5] statement", "count=1")
    assert gaps["text"] == alone["text"]
    assert on["text"].startswith("The [mask] is")  # what is gone on with is text, gaps and all


def test_what_an_earlier_command_wrote_stays(untrained, tmp_path, capsys):
    arguments = ["task=text_to_image", "prompt=a seven", "count=2", "film=true"]
    make(untrained, tmp_path, *arguments)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(before) == {"0000.png", "0001.png", "film.gif", "samples.png", "outputs.jsonl"}
    assert "what was there stays" not in capsys.readouterr().out
    lines = make(untrained, tmp_path, *arguments, "seed=1")
    said = capsys.readouterr().out
    assert "as 0002 and on: what was there stays" in said
    assert f"Look at {tmp_path / 'samples_0002.png'} and {tmp_path / 'film_0002.gif'}\n" in said
    assert [line["image"] for line in lines] == ["0000.png", "0001.png", "0002.png", "0003.png"]
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(after) - set(before) == {"0002.png", "0003.png", "film_0002.gif", "samples_0002.png"}
    assert {name for name in before if before[name] != after[name]} == {"outputs.jsonl"}
    assert after["outputs.jsonl"].startswith(before["outputs.jsonl"])


def test_what_is_made_is_exact_in_its_file_and_large_in_one_picture(untrained, tmp_path, capsys):
    """The file is read back to the pixel; the picture says which is which, and where it is is printed."""
    make(untrained, tmp_path / "out", "task=text_to_image", "prompt=a seven", "count=3")
    assert f"\nLook at {tmp_path / 'out' / 'samples.png'}\n" in capsys.readouterr().out
    own = np.asarray(Image.open(tmp_path / "out" / "0001.png"))
    whole = np.asarray(Image.open(tmp_path / "out" / "samples.png").convert("L"))
    assert own.shape == (8, 8)
    large = own.repeat(16, axis=0).repeat(16, axis=1)
    places = np.lib.stride_tricks.sliding_window_view(whole, large.shape)
    assert (places == large).all(axis=(2, 3)).sum() >= 1
    lines = make(untrained, tmp_path / "back", "task=image_to_text", f"prompt={tmp_path / 'out' / '0001.png'}")
    assert lines[0]["given_image"].endswith("0001.png")
    assert (tmp_path / "back" / "samples.png").is_file()  # what was read, and as what


GREEDY = "sampler={_component_: components.samplers.Confidence, num_steps: 2, temperature: 0.0}"


def test_greedy_samples_are_one_unless_more_are_asked_for(untrained, files, tmp_path, capsys):
    """As a task is read by default: four times the same line told nobody anything."""
    asked = ["task=image_to_text", f"prompt={files / 'picture.png'}"]
    (line,) = make(untrained, tmp_path / "one", *asked)
    assert "alike" not in capsys.readouterr().out
    lines = make(untrained, tmp_path / "three", *asked, "count=3")
    told = capsys.readouterr().out
    assert "image_to_text is sampled greedily: the 3 samples of a prompt are all alike" in told
    assert f"text: {line['text']}  (x3)" in told
    assert lines == [line] * 3  # all are kept
    assert len(make(untrained, tmp_path / "image", "task=text_to_image", "prompt=a seven", GREEDY)) == 1
    assert len(make(untrained, tmp_path / "drawn", "task=text_to_image", "prompt=a seven")) == 4


def test_samples_that_agree_are_printed_once_and_counted():
    told = load_recipe("generate").told
    lines = [{"given_image": "a.png", "text": word} for word in ("nine", "seven", "seven", "one", "one", "one")]
    assert told(lines, 6) == ["text: one  (x3)", "text: seven  (x2)", "text: nine"]
    assert told(lines, 3) == ["text: seven  (x2)", "text: nine", "text: one  (x3)"]  # of each prompt by itself
    assert told([{"image": f"000{i}.png"} for i in range(2)], 2) == ["image: 0000.png", "image: 0001.png"]


def test_edits_of_every_modality(untrained, files, tmp_path):
    (line,) = make(untrained, tmp_path / "t", "task=text", "edit=The [mask:3] statement", "count=1")
    assert line["text"].startswith("The")
    assert line["text"].endswith(" statement")
    (tmp_path / "many.jsonl").write_text(
        json.dumps({"text": "a seven", "edit": str(files / "picture.png"), "region": "0,4,8,8"}) + "\n"
    )
    make(untrained, tmp_path / "i", "task=text_to_image", f"prompts={tmp_path / 'many.jsonl'}", "count=2")
    _, processor = load_model(untrained)
    given = np.asarray(Image.open(files / "picture.png").resize((8, 8)))
    a, b = (np.asarray(Image.open(tmp_path / "i" / f"{i:04d}.png")) for i in range(2))
    assert (a[:4] == b[:4]).all()
    assert a[:4].shape == given[:4].shape
    make(untrained, tmp_path / "s", "task=text_to_speech", "prompt=a seven", f"edit={files / 'clip.wav'}", "region=0.05-0.1")
    with wave.open(str(tmp_path / "s" / "0000.wav")) as clip:
        assert clip.getnframes() == 1280  # its length is given
    assert processor.tokenizers["audio"].sample_rate == 8000


@pytest.mark.parametrize("task", ["text_to_image", "text_to_speech", "text", "joint_text_image"])
def test_a_film_has_a_frame_for_every_pass_and_the_first(untrained, tmp_path, task):
    prompt = ["prompt=a seven"] if find_task(task).given else []
    sampler = "sampler={_component_: components.samplers.Ancestral, num_steps: 5}"
    make(untrained, tmp_path, f"task={task}", "film=true", "count=2", "stop_at_end=false", sampler, *prompt)
    with Image.open(tmp_path / "film.gif") as film:
        assert 4 <= film.n_frames <= 6  # a pass that unmasks nothing adds no frame to a GIF
        first = np.asarray(film.convert("RGB")).copy()
        film.seek(film.n_frames - 1)
        last = np.asarray(film.convert("RGB"))
    blue = np.array([120, 170, 215])
    assert (np.abs(first.astype(int) - blue).sum(-1) < 20).mean() > 0.02
    assert (np.abs(last.astype(int) - blue).sum(-1) < 20).sum() == 0


def test_an_arrow_is_the_task_of_its_name(untrained, tmp_path):
    named, arrow = (
        make(untrained, tmp_path / name, f"task={task}", "prompt=a seven", "count=1")
        for name, task in (("a", "text_to_image"), ("b", "text -> image"))
    )
    assert named == arrow
    assert (tmp_path / "a" / "0000.png").read_bytes() == (tmp_path / "b" / "0000.png").read_bytes()


def test_caches_work_from_the_command(untrained, tmp_path):
    inner = "{_component_: components.samplers.Confidence, num_steps: 2}"
    blocks = f"sampler={{_component_: components.samplers.Blocks, block_length: 4, sampler: {inner}}}"
    for cache in ("prefix", "dual"):
        lines = make(untrained, tmp_path / cache, "task=text_to_image", "prompt=a seven", blocks, f"cache={cache}")
        assert len(lines) == 4


def test_defaults_beside_the_model_are_used(untrained, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("image: {sampler: {_component_: components.samplers.Ancestral, num_steps: 3}}\n")
    make(untrained, tmp_path / "a", "task=text_to_image", "prompt=a seven", f"defaults={tmp_path / 'mine.yaml'}")
    assert "3.0 forward passes a sample" in capsys.readouterr().out


MISTAKES = {
    "an arrow without quotes": (["task=text-"], "task: 'text-' is no task: write an arrow in quotes (\"text->image\")"),
    "no task": ([], "task: name one, e.g. task=text_to_image; it has text, text_to_image"),
    "a task misspelt": (["task=text_to_speach", "prompt=a"], "the model has no speach, only text, image, audio (did you mean"),
    "a modality that the model lacks": (["task=text_to_smell"], "the model has no smell, only text, image, audio"),
    "a task that it was made without": (["task=audio->text,image", "prompt=a"], "the model was made before that task, or"),
    "no prompt": (["task=text_to_image"], "task text_to_image is given text (a text), and there is none; write prompt=..."),
    "one part of two": (
        ["task=text_image_to_speech", "prompt.text=a"],
        "is given image (the path of a file), and there is none; write prompt.image=...",
    ),
    "no file": (["task=image_to_text", "prompt=absent.png"], "image file not found: absent.png"),
    "one prompt for two parts": (["task=text_image_to_speech", "prompt=a"], "write prompt.text=... prompt.image=..."),
    "a part that is not given": (
        ["task=text_to_image", "prompt.audio=a.wav"],
        "'audio' has no place here; task text_to_image is given",
    ),
    "region without edit": (["task=text_to_image", "prompt=a", "region=0,0,4,4"], "a region needs an edit"),
    "edit of another modality": (
        ["task=text_to_image", "prompt=a", "edit=x"],
        "the task generates image, so an edit takes a region (image); got region=None",
    ),
    "a region that is none": (
        ["task=text_to_image", "prompt=a", "edit={picture}", "region=0,1"],
        "prompt: region '0,1': left,top,right,bottom in pixels, inside 0..8, and not empty",
    ),
    "region outside": (["task=text_to_image", "prompt=a", "edit={picture}", "region=0,0,9,9"], "inside 0..8"),
    "a length beside an edit": (
        ["task=text", "edit=The [mask] is", "length=9"],
        "whose length is that of its text and its gaps",
    ),
    "a length of an image": (
        ["task=text_to_image", "prompt=a", "length=9"],
        "length=9: task text_to_image generates image, whose length is fixed",
    ),
    "a negative length": (["task=text", "length=-4"], "length must be at least 1, got -4"),
    "no sample": (["task=text", "count=0"], "count must be at least 1, got 0"),
    "a negative seed": (["task=text", "seed=-1"], "seed must be at least 0, got -1"),
    "a prompt beside an edit": (["task=text", "prompt=a", "edit=The [mask]"], "task text is given nothing; write no prompt"),
    "edit without a gap": (["task=text", "edit=The statement"], "has no gap; write [mask]"),
    "guidance of nothing": (["task=text", "guidance_scale=1"], "task text is given nothing that could be left out"),
    "negative guidance": (["task=text_to_image", "prompt=a", "guidance_scale=-1"], "guidance_scale must be at least 0"),
    "cache without blocks": (
        ["task=text_to_image", "prompt=a", "cache=dual"],
        "does not decode in blocks; set sampler=... to Blocks",
    ),
    "unknown cache": (
        ["task=text_to_image", "prompt=a", "cache=all"],
        "cache 'all' is not one of auto, exact, off, prefix, dual",
    ),
    "graphs without a GPU": (
        ["task=text", "compile=graphs", "device=cpu"],
        "compile: graphs records CUDA graphs, and there is no CUDA device",
    ),
    "unknown compile": (["task=text", "compile=max"], "compile: 'max' is not one of auto, true, false, graphs"),
    "zero steps": (
        ["task=text_to_image", "prompt=a", "sampler={_component_: components.samplers.Ancestral, num_steps: 0}"],
        "sampler: Ancestral: num_steps must be at least 1, got 0",
    ),
    "a block that does not divide": (
        [
            "task=text_to_image",
            "prompt=a",
            "sampler={_component_: components.samplers.Blocks, block_length: 5, "
            "sampler: {_component_: components.samplers.FirstHitting}}",
        ],
        "block_length 5 does not divide the 16 positions to generate",
    ),
    "a prompt that is too long": (["task=text_to_image", "prompt=" + "many words " * 9], "does not fit its canvas of 24"),
    "a text that is too long": (["task=text", "length=200"], "203 positions, but the model has 128"),
    "no such file of prompts": (["task=text_to_image", "prompts=absent.jsonl"], "prompts: file not found: absent.jsonl"),
    "no such defaults": (["task=text_to_image", "prompt=a", "defaults=absent.yaml"], "config file not found: absent.yaml"),
}


@pytest.mark.parametrize("case", MISTAKES, ids=lambda c: c.replace(" ", "_"))
def test_a_mistake_is_one_sentence(untrained, files, tmp_path, case):
    arguments, message = MISTAKES[case]
    with pytest.raises(UserError) as error:
        make(untrained, tmp_path, *(a.format(picture=files / "picture.png") if "{picture}" in a else a for a in arguments))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("\n\n{", "line 3 of"),
        ("\n{}", "prompts: line 2: task text_to_image is given text"),
        ("{", "line 1 of"),
        ('{"text": 3}', "must be like"),
        ('{"txt": "a"}', "'txt' has no place here"),
        ("", "holds no line"),
        (
            json.dumps({"text": "a"}) + "\n" + json.dumps({"text": "many words " * 9}),
            "prompts: line 2: text of .* canvas of 24",
        ),
    ],
)
def test_a_line_that_is_no_prompt_is_named(untrained, tmp_path, line, message):
    (tmp_path / "many.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        make(untrained, tmp_path, "task=text_to_image", f"prompts={tmp_path / 'many.jsonl'}")


def test_the_command_takes_film_as_a_flag(untrained, run, tmp_path):
    done = run(
        "generate",
        f"checkpoint={untrained}",
        f"output_dir={tmp_path}",
        "task=text_to_image",
        "prompt=a seven",
        "--film",
        "count=1",
    )
    assert (tmp_path / "film.gif").is_file()
    assert "forward passes a sample" in done.stdout
