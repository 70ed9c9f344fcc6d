"""Pages, films, files and prompts of a modality that the library has never heard of: all that they know is what it says."""

import base64
import html
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from components.samplers import Ancestral, Blocks, Confidence, FirstHitting, LinearScale, PerModality
from components.tokenizers.audio import Codec2Tokenizer
from components.tokenizers.image import GreyPatchTokenizer
from components.tokenizers.modality import MASKED
from components.tokenizers.text import TextTokenizer
from mdm.config import UserError
from mdm.data.processor import Processor
from mdm.data.settings import StreamSettings
from mdm.generation.editing import edit
from mdm.generation.generate import generate
from mdm.generation.prompts import check_prompt, easiest, example, read_prompt, spelled_out, suffixes
from mdm.models import builders
from mdm.pages import comparison, examples, film, live, report, sliders
from mdm.pages.demo import Replay, bring, tabs
from mdm.pages.media import image_grid, next_number, save_outputs
from mdm.pages.sheet import sheet, spectrogram, words

BLUE = np.array(MASKED)


class Hand:
    """Lines from point to point on a grid of 4 x 4: two codes a point, as JSON."""

    codebooks = (4, 4)
    suffix = ".json"

    def encode(self, raw):
        return torch.tensor(raw, dtype=torch.long).flatten()

    def decode(self, codes):
        return codes.view(-1, 2).tolist()

    def save(self, folder):
        return {}

    def read(self, path):
        return json.loads(path.read_text())

    def write(self, raw, path):
        path.write_text(json.dumps(raw))

    def draw(self, raw):
        picture = Image.new("RGB", (40, 40), "white")
        ImageDraw.Draw(picture).line([(10 * x + 5, 10 * y + 5) for x, y in raw], fill="black", width=2)
        return picture

    def partial(self, codes, known):
        picture = self.draw([])
        for i, (x, y) in enumerate(codes.view(-1, 2).tolist()):
            colour = "black" if known[2 * i : 2 * i + 2].all() else MASKED
            ImageDraw.Draw(picture).rectangle([10 * x, 10 * y, 10 * x + 9, 10 * y + 9], fill=colour)
        return picture


class Tune(Hand):
    """The same heard: the higher the point, the higher the tone."""

    suffix = ".tune"

    def play(self, raw):
        return np.concatenate([np.sin(np.arange(400) * (1 + y) / 9) for _, y in raw] or [np.zeros(0)]).astype(np.float32), 8000


@pytest.fixture(scope="module")
def processor():
    text = TextTokenizer.train(["a drawn seven"] * 9, vocab_size=280)
    tokenizers = {"text": text, "hand": Hand(), "image": GreyPatchTokenizer(8, 2, 3), "audio": Codec2Tokenizer()}
    canvas = {"text": 8, "hand": 12, "image": 16, "audio": 8}
    return Processor.build(tokenizers, canvas, ["text_to_hand", "hand_to_text", "joint_hand_image", "joint_image_speech"])


@pytest.fixture(scope="module")
def model(processor):
    model = builders.nano(vocab_size=processor.vocabulary.size, max_length=64, width=32, num_layers=1, num_heads=2)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


SQUARE = [[0, 0], [3, 0], [3, 3], [0, 3]]


def test_a_sample_is_written_as_its_tokenizer_says_and_seen_on_a_page(processor, tmp_path):
    folder = tmp_path / "run" / "samples" / "text_to_hand"
    lines = save_outputs(folder, processor, [{"text": "a <b>"}, {"hand": SQUARE}], [{"hand": SQUARE}, {"text": "no.such.png"}])
    assert lines[0] == {"given_text": "a <b>", "hand": "0000.json", "hand_drawn": "0000_hand.png"}
    assert lines[1] == {"given_hand": "0001_given.json", "given_hand_drawn": "0001_given_hand.png", "text": "no.such.png"}
    assert json.loads((folder / "0000.json").read_text()) == SQUARE
    assert sorted(p.name for p in folder.glob("*.png")) == ["0000_hand.png", "0001_given_hand.png", "samples.png"]
    (tmp_path / "run" / "metrics.json").write_text("{}")
    comparison.page(tmp_path / "page.html", "t", {"run": tmp_path / "run"})
    page = (tmp_path / "page.html").read_text()
    assert page.count('<img class="sample"') == 2
    assert html.escape("a <b>") in page
    assert "<b>" not in page


def test_what_is_heard_has_a_player_and_what_is_both_has_both(processor, tmp_path):
    both = Processor.build({"tune": Tune()}, {"tune": 8})
    (line,) = save_outputs(tmp_path, both, [{}], [{"tune": SQUARE}])
    assert line == {"tune": "0000.tune", "tune_drawn": "0000_tune.png", "tune_played": "0000_tune.wav"}
    shown = comparison.made({**line, "folder": tmp_path})
    assert shown.count("<img") == shown.count("<audio") == 1
    (line,) = save_outputs(tmp_path, processor, [{}], [{"audio": np.zeros(320, dtype=np.float32)}])
    assert line == {"audio": "0000.wav"}
    assert 'src="data:audio/' in comparison.made({**line, "folder": tmp_path})


def test_two_modalities_of_one_kind_of_file_do_not_write_over_each_other(tmp_path):
    two = Processor.build({"left": GreyPatchTokenizer(8, 2, 3), "right": GreyPatchTokenizer(8, 2, 3)}, {})
    dark, light = Image.new("L", (8, 8), 0), Image.new("L", (8, 8), 255)
    (line,) = save_outputs(tmp_path, two, [{}], [{"left": dark, "right": light}])
    assert line == {"left": "0000.png", "right": "0000_right.png"}
    assert np.asarray(Image.open(tmp_path / "0000.png")).max() == 0
    assert np.asarray(Image.open(tmp_path / "0000_right.png")).min() == 255


@pytest.mark.parametrize("name", ['x.png"onerror="alert(1)', "data:image/png<script>,x.png", "a b.png", "../x.wav"])
def test_whatever_a_line_says_is_escaped(tmp_path, name):
    shown = comparison.made({"text": name, "folder": tmp_path})
    assert "<img" not in shown
    assert "<script" not in shown
    assert '"onerror' not in shown


@pytest.mark.parametrize("task", ["text_to_hand", "joint_hand_image"])
def test_a_film_shows_a_half_made_one_as_its_tokenizer_draws_it(model, processor, task):
    prompts = [{"text": "a"} if task == "text_to_hand" else {}] * 3
    made = generate(model, processor, task, prompts, guidance_scale=0.0, film=True)
    frames = [film.frame(processor, made.batch, step.tokens) for step in made.steps]
    assert len({f.size for f in frames}) == 1
    blue = [(np.abs(np.asarray(f).astype(int) - BLUE).sum(-1) < 20).mean() for f in frames]
    assert blue[0] > 0.02
    assert blue[-1] == 0


def test_the_canvas_on_the_page_is_drawn_and_coloured_by_confidence(model, processor):
    seen = []
    prompts = [{"text": "a"}]
    generate(
        model, processor, "text_to_hand", prompts, guidance_scale=0.0, watch=lambda step, batch: seen.append((batch, step))
    )
    first, last = (live.canvas(processor, *moment, 0) for moment in (seen[0], seen[-1]))
    assert first.count('class="masked"') == 12
    assert first.count("<tr>") == 2  # codebooks
    assert 'src="data:image/png' in first
    assert 'class="masked"' not in last


class Plain:
    """Pairs of numbers: no files, no look, no sound."""

    codebooks = (9,)

    def encode(self, raw):
        return torch.tensor([3 * a + b for a, b in raw])

    def decode(self, codes):
        return [divmod(c, 3) for c in codes.tolist()]

    def save(self, folder):
        return {}


def test_a_modality_that_says_nothing_of_itself_is_filmed_and_watched_as_it_prints(tmp_path):
    text = TextTokenizer.train(["two pairs"] * 9, vocab_size=280)
    plain = Processor.build({"text": text, "plain": Plain()}, {"text": 8, "plain": 4}, ["text_to_plain", "plain_to_text"])
    model = builders.nano(plain.vocabulary.size, max_length=32, width=48, num_layers=1)
    seen = []
    generate(
        model,
        plain,
        "text_to_plain",
        [{"text": "two"}],
        guidance_scale=0.0,
        watch=lambda step, batch: seen.append((batch, step)),
    )
    batch, last = seen[-1]
    tokens = batch.tokens.clone()
    tokens[batch.maskable] = plain.vocabulary.to_global("plain", torch.tensor([0, 4, 8, 1]))
    assert film.text_with_gaps(plain, "plain", tokens[batch.maskable]) == "[(0, 0), (1, 1), (2, 2), (0, 1)]"
    assert film.frame(plain, batch, tokens).width > 0
    assert "(1, 1)" in live.canvas(plain, batch, replace(last, tokens=tokens), 0)
    (tmp_path / "a.json").write_text("[[1, 1]]")
    with pytest.raises(UserError, match=r"\(plain is given as words: its tokenizer reads no files\)$"):
        read_prompt({"plain": str(tmp_path / "a.json")}, "plain_to_text", plain, "prompt")


def test_the_demo_has_a_tab_for_each_modality_that_is_made_and_opens_on_a_drawn_one(processor):
    making, editing = tabs(processor)
    assert sorted((t.title, t.task) for t in making[:2]) == [
        ("Text to hand", "text_to_hand"),
        ("Text to image", "text_to_image"),
    ]
    assert sorted(t.title for t in making[2:]) == ["Text", "Text to speech"]
    # a hand has no region
    assert sorted(t.title for t in editing) == ["Part of the image", "Part of the speech", "Text with gaps"]


def test_the_demo_shows_what_the_model_learned_and_nothing_else(processor):
    """A tab for each task, the drawn ones first, from words if they can; of a model of words alone there is one."""
    learned = ["text", "hand_to_text", "joint_image_speech", "text_to_hand"]
    making, editing = tabs(processor, learned)
    assert [t.title for t in making] == ["Text to hand", "Image and speech", "Text", "Hand to text"]
    assert [t.task for t in making] == ["text_to_hand", "joint_image_speech", "text", "hand_to_text"]
    assert [t.title for t in editing] == ["Text with gaps"]  # no task makes an image alone
    alone = Processor.build({"text": processor.tokenizers["text"]}, {}, ["text"])
    assert [[t.title for t in some] for some in tabs(alone)] == [["Text"], ["Text with gaps"]]


def test_a_sample_of_each_stream_is_kept_for_the_demo_and_read_by_task(processor, tmp_path):
    """Beside the model, not in it: whoever gets the model gets none of the data. What is no example is passed over."""
    data = {
        "drawn": StreamSettings({"text_to_hand": 1.0, "hand_to_text": 1.0, "joint_hand_image": 0.0}),
        "coded": StreamSettings({"text_to_image": 1.0}),
        "broken": StreamSettings({"text_to_speech": 1.0}),
        "lines": StreamSettings({"text": 1.0}, pack=8),
    }
    codes = processor.tokenizers["text"].encode("a coded one")
    held_out = {"drawn": [{"text": "a drawn seven", "hand": SQUARE, "label": 7}]}
    sources = {"drawn": [], "coded": [{"text": codes, "image": torch.zeros(16, dtype=torch.long)}], "broken": [], "lines": [3]}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    examples.write(tmp_path, processor, data, held_out, sources)
    found = examples.read(tmp_path, processor)
    assert found["text_to_hand"] == {"text": "a drawn seven"}
    assert json.loads(Path(found["hand_to_text"]["hand"]).read_text()) == SQUARE
    assert found["text_to_image"] == {"text": "a coded one"}
    assert set(found) == {"text_to_hand", "hand_to_text", "text_to_image"}
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["config.json"]
    lines = [
        '{"tasks": ["text_to_hand"], "text": 3}',
        "3",
        '{"tasks": ["hand_to_text", 4, "-"], "hand": "../model/config.json"}',
    ]
    (tmp_path / "examples" / "examples.jsonl").write_text("\n".join(lines) + "\n")
    assert examples.read(tmp_path / "model", processor) == {}


SETTINGS = {"num_steps": 8, "temperature": 1.0, "top_p": 1.0}


def test_a_slider_begins_at_the_tuned_setting_and_changes_what_is_moved_alone():
    tuned = Confidence(num_steps=3, rank_by="random", top_p=0.95)
    assert sliders.settings(tuned) == SETTINGS | {"num_steps": 3, "top_p": 0.95}
    assert sliders.chosen(sliders.TUNED, tuned, sliders.settings(tuned)) == tuned
    assert sliders.chosen(sliders.TUNED, tuned, sliders.settings(tuned) | {"num_steps": 9}) == replace(tuned, num_steps=9)
    both = PerModality([Ancestral(num_steps=5), FirstHitting(top_p=0.8)])
    moved = sliders.chosen(sliders.TUNED, both, sliders.settings(both) | {"temperature": 0.5, "num_steps": 7})
    assert moved.samplers == [Ancestral(num_steps=7, temperature=0.5), FirstHitting(top_p=0.8, temperature=0.5)]
    inside = Blocks(Confidence(num_steps=100), 4)
    assert sliders.settings(inside)["num_steps"] == 64  # where the slider ends: not moved, it changes nothing
    assert sliders.chosen(sliders.TUNED, inside, sliders.settings(inside)) == inside
    assert sliders.chosen("ancestral", tuned, SETTINGS | {"num_steps": 5, "top_p": 0.7}) == Ancestral(num_steps=5, top_p=0.7)
    assert not sliders.fixed_passes(FirstHitting())
    assert sliders.fixed_passes(inside)
    assert (sliders.number(0.25), sliders.number(LinearScale(2.0, 1.0))) == (0.25, 2.0)


def test_samples_on_the_page_are_numbered_and_their_codes_lie_without_gaps(model, processor):
    seen = []
    generate(
        model, processor, "text_to_image", [{"text": "a"}] * 3, guidance_scale=0.0,
        watch=lambda step, batch: seen.append((batch, step)),
    )  # fmt: skip
    page = live.page(processor, *seen[-1])
    assert [page.count(f"<b>{i}</b>") for i in (1, 2, 3, 4)] == [1, 1, 1, 0]
    data = base64.b64decode(page.split("base64,")[1].split('"')[0])
    assert Image.open(io.BytesIO(data)).size == (192, 192)
    assert "border:0!important" in live.STYLE
    again = Replay(seen[-1][0], [step for _, step in seen])
    assert again.page(processor, 0).count('class="masked"') == 3 * 16
    assert f"Pass 0 of {len(seen) - 1}" in again.page(processor, 0)
    assert again.page(processor, 99).startswith(page)  # the last one


def test_a_file_of_a_prompt_is_read_by_its_tokenizer(processor, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(SQUARE))
    (tmp_path / "b.json").write_text("{")
    prompt = {"hand": str(tmp_path / "a.json")}
    check_prompt(prompt, "hand_to_text", suffixes(processor), "prompt")
    assert read_prompt(prompt, "hand_to_text", processor, "prompt") == {"hand": SQUARE}
    assert bring(processor, "hand", str(tmp_path / "a.json")) == SQUARE
    with pytest.raises(UserError, match=r"^prompt: .*b\.json: Expecting property name"):
        read_prompt({"hand": str(tmp_path / "b.json")}, "hand_to_text", processor, "prompt")
    with pytest.raises(UserError, match=r"prompt: hand file not found: absent\.json"):
        check_prompt({"hand": "absent.json"}, "hand_to_text", suffixes(processor), "prompt")
    assert example("runs/x", "hand_to_text", files=suffixes(processor)) == (
        "mdm generate checkpoint=runs/x task=hand_to_text prompt=FILE.json"
    )


def test_an_edit_is_of_the_first_modality_that_takes_file_and_region(processor, tmp_path):
    Image.new("L", (8, 8), 255).save(tmp_path / "a.png")
    Codec2Tokenizer().write(np.zeros(640, dtype=np.float32), tmp_path / "a.wav")
    (tmp_path / "a.json").write_text(json.dumps(SQUARE))

    def read(task, file, region):
        return read_prompt({"edit": str(tmp_path / file), "region": region}, task, processor, "prompt")

    assert set(read("joint_image_speech", "a.png", "0,4,8,8")) == {"image"}
    assert set(read("joint_image_speech", "a.wav", "0.04-")) == {"audio"}
    assert set(read("joint_hand_image", "a.png", "half")) == {"image"}  # a hand cannot be edited
    with pytest.raises(UserError, match=r"region '0.04-': left,top,right,bottom in pixels.*; .*a\.png: .*as audio"):
        read("joint_image_speech", "a.png", "0.04-")
    with pytest.raises(ValueError, match=r"^hand cannot be edited: tests\.mdm\.pages\.test_any_modality\.Hand has no region$"):
        edit(processor, "hand", SQUARE, "0-1")
    with pytest.raises(UserError, match=r"^prompt: hand cannot be edited: .*Hand has no region"):
        read("joint_hand_image", "a.json", "0-1")


class Pair:
    """Two codes a sample, of two codebooks, and nothing else is known: a list."""

    codebooks = (4, 10)

    def encode(self, raw):
        return torch.tensor(raw)

    def decode(self, codes):
        return codes.tolist()

    def save(self, folder):
        return None


def test_codes_that_are_no_words_are_shown_as_codes():
    """A token alone says nothing where a frame is several: neither page nor film decodes one."""
    own = Processor.build({"pair": Pair()}, {"pair": 4}, ["pair"])
    small = builders.nano(vocab_size=own.vocabulary.size, max_length=64, width=32, num_layers=1, num_heads=2)
    small.init_weights(torch.Generator().manual_seed(0))
    seen = []
    made = generate(small, own, "pair", [{}], watch=lambda step, batch: seen.append((batch, step)), film=True)
    assert isinstance(made.outputs[0]["pair"], list)
    frames = [film.frame(own, made.batch, step.tokens) for step in made.steps]
    assert MASKED in {colour for _, colour in frames[0].getcolors()}
    assert max(frame.width for frame in frames) < 200  # a column a frame, and no line of text
    assert live.canvas(own, *seen[0], 0).count('class="masked"') == 4


def fails(*names):
    def fail(self, *given):
        raise KeyError("boom\nand more")

    return type("Hand", (Hand,), dict.fromkeys(names, fail))()


@pytest.mark.parametrize("name", ["write", "draw"])
def test_what_a_tokenizer_cannot_write_is_one_line_and_leaves_nothing(name, tmp_path):
    own = Processor.build({"hand": fails(name)}, {"hand": 4})
    with pytest.raises(UserError, match=r"^output_dir .*: cannot write the outputs: KeyError: 'boom\\nand more'"):
        save_outputs(tmp_path, own, [{}], [{"hand": SQUARE}])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["read", "encode", "region"])
def test_what_a_tokenizer_cannot_read_is_one_line(name, tmp_path):
    own = Processor.build(
        {"text": TextTokenizer.train(["a"] * 9, 257), "hand": fails(name)}, {"hand": 4}, ["hand_to_text", "hand"]
    )
    (tmp_path / "a.json").write_text(json.dumps(SQUARE))
    path = str(tmp_path / "a.json")
    prompt, task = ({"edit": path, "region": "half"}, "hand") if name == "region" else ({"hand": path}, "hand_to_text")
    with pytest.raises(UserError, match=r"^prompt: (\S+a\.json: )?KeyError: 'boom\\nand more'") as told:
        read_prompt(prompt, task, own, "prompt")
    assert "\n" not in str(told.value)


def test_what_cannot_be_decoded_or_saved_is_one_line(tmp_path):
    own = Processor.build({"hand": fails("decode")}, {"hand": 4}, ["hand"])
    small = builders.nano(vocab_size=own.vocabulary.size, max_length=64, width=32, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match=r"^hand cannot be decoded: KeyError: 'boom\\nand more'"):
        generate(small, own, "hand", [{}])
    for tokenizer, why in ((Pair(), "it gives None, and not the _component_"), (fails("save"), "KeyError: 'boom")):
        with pytest.raises(UserError, match=rf"^tokenizers\.hand cannot be saved: {why}"):
            Processor.build({"hand": tokenizer}, {"hand": 4}).save(tmp_path)


def test_nothing_is_drawn_behind_the_end_of_a_half_made_one(processor):
    vocabulary = processor.vocabulary
    ids = torch.cat(
        [vocabulary.to_global("hand", torch.tensor([1, 2, 3])), torch.tensor([vocabulary.end_id, vocabulary.mask_id])]
    )
    codes, known = film.half_made(processor, "hand", ids)
    assert (codes.tolist(), known.tolist()) == ([1, 2], [True, True])  # a whole frame, and the end stands within the second


def test_a_canvas_says_what_is_given_and_what_has_ended(processor):
    vocabulary = processor.vocabulary
    ids = torch.cat([vocabulary.to_global("audio", torch.arange(4)), torch.full((12,), vocabulary.end_id)])
    page = live.codes(processor, "audio", ids, torch.tensor([0.0, *[0.5] * 15]))
    assert page.count('<td title="end"></td>') == 12
    assert page.count('style="background:#ddd" title="given"') == 1
    assert page.count("<tr>") == 4  # a row for each codebook: a clip is no square, though 16 codes were one


def test_a_film_rests_on_its_last_picture():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]
    shown = Image.open(io.BytesIO(film.gif(frames, 100)))
    durations = [shown.seek(i) or shown.info["duration"] for i in range(3)]
    assert durations == [100, 100, 600]


def test_outputs_are_numbered_behind_lines_and_files(tmp_path):
    (tmp_path / "outputs.jsonl").write_text("{}\n{}\n")
    assert next_number(tmp_path) == 2
    (tmp_path / "0006_given.png").write_bytes(b"")
    assert next_number(tmp_path) == 7


def test_one_coloured_picture_colours_the_grid():
    grid = image_grid([Image.new("L", (8, 8)), Image.new("RGB", (8, 8), "red")], 2, scale=1)
    assert grid.mode == "RGB"
    assert grid.getpixel((16, 8)) == (255, 0, 0)
    assert grid.getpixel((3, 8)) == (176, 176, 176)  # a frame: what is white ends somewhere


@pytest.mark.parametrize("size", [8, 32, 500])
def test_no_picture_is_shown_as_small_as_it_is_and_none_is_cut(size, tmp_path):
    """On the sheet, in a gallery and in a film: framed, pixels of one size, a large one smaller."""
    own = Processor.build({"text": TextTokenizer.train(["a"] * 9, 257), "image": GreyPatchTokenizer(size, 2, 3)}, {"text": 8})
    picture = Image.new("L", (size, size), 255)
    save_outputs(tmp_path, own, [{"text": "a"}] * 2, [{"image": picture}] * 2)
    assert Image.open(tmp_path / "0000.png").size == (size, size)
    whole = np.asarray(Image.open(tmp_path / "samples.png").convert("L"))
    frames = ((whole[:, 1:] == 176) & (whole[:, :-1] == 255)).sum(axis=0)  # the left and the right edge of each
    assert (frames >= 128).sum() == 4
    shown = comparison.made({"image": "0000.png", "folder": tmp_path})
    assert ('style="width:128px' in shown) == (size < 128)
    ids = torch.full(((size // 2) ** 2,), own.vocabulary.mask_id)
    assert film.panel(own, "image", ids, 6).width >= 96


def test_a_sheet_shows_what_was_given_beside_what_was_made(processor):
    """What is heard is a spectrogram, empty clips and texts say so; of words alone there is nothing to look at."""
    tone = np.sin(np.arange(4000) * 2 * np.pi * 1000 / 8000).astype(np.float32)
    assert sheet(processor, [{}], [{"text": "a"}]) is None
    alone, both = (sheet(processor, [given], [{"hand": SQUARE}]) for given in ({"text": "a"}, {"audio": tone, "text": "a"}))
    assert both.width > alone.width + 96
    loud = np.asarray(spectrogram(tone, 8000).convert("L")).mean(axis=1)
    assert abs(int(loud.argmin()) - 72) <= 2  # of 96 rows up to 4 kHz, 1 kHz is three quarters down
    assert words({"audio": tone[:0], "text": ""}, "(empty)") == "(empty) (empty)"
    many = [{"hand": SQUARE}] * 101
    assert sheet(processor, [{}] * 101, many).height < sheet(processor, [{"text": "a"}] * 100, many[:100]).height + 40


def test_a_modality_and_the_first_task_that_makes_it_alone_look_alike():
    looks = report._looks(["train_bits/text", "train_bits/hand", "bits/text_to_hand", "bits/hand", "bits/hand_to_text_image"])
    assert looks == {"text": ("C0", "-"), "hand": ("C1", "--"), "text_to_hand": ("C1", "--")}


def test_the_demo_makes_from_words_what_it_can_and_takes_no_clip_without_end(processor, tmp_path):
    own = Processor.build({"hand": Hand(), "text": processor.tokenizers["text"]}, {}, ["hand_to_text", "text_to_hand"])
    assert [t.task for t in tabs(own)[0]] == ["text_to_hand", "text"]  # and not hand_to_text
    Codec2Tokenizer().write(np.zeros(61 * 8000, dtype=np.float32), tmp_path / "long.wav")
    with pytest.raises(ValueError, match="audio of 61 seconds; at most 60 are taken"):
        bring(processor, "audio", str(tmp_path / "long.wav"))


def test_of_the_tasks_of_a_model_one_is_shown_that_takes_no_file():
    assert easiest(["hand_to_text", "text_to_hand"]) == "text_to_hand"
    assert easiest(["hand", "text_to_hand"]) == "text_to_hand"
    assert easiest(["hand_to_text"]) == "hand_to_text"
    assert "trust=true" in example("runs/x", "text_to_hand", foreign=[Hand()])
    assert "trust" not in example("runs/x", "text_to_hand")


def test_a_part_that_is_given_twice_is_refused():
    with pytest.raises(UserError, match=r"task hand_to_text is given hand; write prompt\.hand="):
        spelled_out({"prompt": "a", "hand": "b"}, "hand_to_text", "prompt")
