"""What is asked of a modality beside its codes: what its tokenizer says, and what holds where it says nothing."""

import numpy as np
import pytest
import torch
from PIL import Image

from components.tokenizers.audio import Codec2Tokenizer
from components.tokenizers.fsq import FSQAutoencoder, FSQConfig, FSQImageTokenizer, FSQMelTokenizer
from components.tokenizers.image import GreyPatchTokenizer
from components.tokenizers.modality import (
    MASKED,
    Drawn,
    Edited,
    Filed,
    Played,
    check_answers,
    fixed_length,
    is_words,
    may_end,
    partial,
    second_half,
    suffix,
)
from components.tokenizers.text import TextTokenizer


class Plain:
    """A modality of two codebooks, of which nothing else is known."""

    codebooks = (4, 10)

    def encode(self, raw):
        return torch.tensor(raw)

    def decode(self, codes):
        return codes.tolist()

    def save(self, folder):
        return {}


def fsq(kind, **config):
    return FSQAutoencoder(FSQConfig(kind=kind, patch=2, width=8, books=2, **config)).eval()


def test_a_modality_that_says_nothing_is_words_of_any_length():
    plain = Plain()
    assert (fixed_length(plain), may_end(plain), suffix(plain), is_words(plain)) == (None, True, None, True)
    assert second_half(plain, [1, 2, 3, 4, 0, 1]).codes.tolist() == [False, False, True, True, True, True]


def test_what_the_librarys_own_say():
    for tokenizer in (GreyPatchTokenizer(8, 2, 3), FSQImageTokenizer(fsq("image"))):
        assert (fixed_length(tokenizer) is not None, may_end(tokenizer), suffix(tokenizer)) == (True, False, ".png")
        assert isinstance(tokenizer, Drawn)
        assert isinstance(tokenizer, Edited)
        assert not isinstance(tokenizer, Played)
    for tokenizer in (Codec2Tokenizer(), FSQMelTokenizer(fsq("mel"))):
        assert (fixed_length(tokenizer), may_end(tokenizer), suffix(tokenizer)) == (None, True, ".wav")
        assert isinstance(tokenizer, Played)
        assert isinstance(tokenizer, Edited)
        assert not isinstance(tokenizer, Drawn)
    text = TextTokenizer.train(["a b"], 256)
    assert is_words(text)
    assert not isinstance(text, (Filed, Drawn, Played, Edited))


def test_files_are_read_as_they_were_written(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8))
    tokenizer = GreyPatchTokenizer(8, 1, 256)
    tokenizer.write(image, tmp_path / "a.png")
    assert tokenizer.read(tmp_path / "a.png") == tokenizer.draw(image) == image
    wave, codec = np.sin(np.arange(1280) / 5).astype(np.float32) * 0.5, Codec2Tokenizer()
    codec.write(wave, tmp_path / "a.wav")
    assert np.abs(codec.read(tmp_path / "a.wav") - wave).max() < 1e-4
    heard, rate = codec.play((wave * 32767).astype(np.int16))
    assert rate == 8000
    assert np.abs(heard - wave).max() < 1e-4
    assert len(codec.play(np.zeros(0))[0]) == 0  # a model may end a clip at once


@pytest.mark.parametrize(
    ("methods", "message"),
    [({}, "lacks read and write"), ({"read": lambda self, path: path}, "lacks write")],
)
def test_files_that_cannot_be_read_or_written_are_said_in_a_line(methods, message):
    tokenizer = type("Marks", (Plain,), {"suffix": ".marks", **methods})()
    with pytest.raises(
        ValueError, match=rf"^tests\.components\.test_modality\.Marks has files \(suffix = '.marks'\), and {message}$"
    ):
        suffix(tokenizer)


def test_a_half_made_image_shows_what_is_known_and_blue():
    tokenizer = GreyPatchTokenizer(4, 2, 3)
    white = tokenizer.encode(Image.new("L", (4, 4), 255))
    pixels = np.asarray(partial(tokenizer, white, torch.tensor([True, False, False, True])))
    assert (pixels[:2, :2] == 255).all()
    assert (pixels[2:, 2:] == 255).all()
    assert (pixels[:2, 2:] == MASKED).all()
    assert (pixels[2:, :2] == MASKED).all()
    books = FSQImageTokenizer(fsq("image", size=4))  # a patch of two codes is known where both are
    known = torch.tensor([True, True, True, False, False, True, False, False])
    blue = (np.asarray(partial(books, torch.zeros(8, dtype=torch.long), known)) == MASKED).all(-1)
    assert blue[::2, ::2].tolist() == [[False, True], [True, True]]


def test_half_made_codes_are_a_grid_where_nothing_else_is_known():
    """A column for each frame, two rows for each codebook: grey by code, blue where unknown, white where there is none."""
    picture = partial(Plain(), torch.tensor([3, 9, 1]), torch.tensor([True, False, True]))
    assert picture.size == (2, 4)
    pixels = np.asarray(picture)[::2]
    assert pixels.tolist() == [[[170] * 3, [70] * 3], [list(MASKED), [255] * 3]]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"codebooks": ()}, r"codebooks of .*Marks must be a tuple of sizes of at least 1, got \(\)"),
        ({"codebooks": (4.5,)}, r"codebooks of .* got \(4.5,\)"),
        ({"codebooks": 4}, "codebooks of .* got 4"),
        ({"codebooks": (4, 0)}, r"codebooks of .* got \(4, 0\)"),
        ({"num_tokens": 0}, "num_tokens of .*Marks must be a whole number of at least 1, got 0"),
        ({"num_tokens": "8"}, "num_tokens of .* got '8'"),
        ({"may_end": "no"}, "may_end of .*Marks must be True or False, got 'no'"),
        ({"suffix": "/../../x"}, "suffix of .*Marks must be like '.png', got '/../../x'"),
        ({"suffix": ""}, "suffix of .* got ''"),
        ({"suffix": "png"}, "suffix of .* got 'png'"),
        ({"suffix": 7}, "suffix of .* got 7"),
    ],
)
def test_an_answer_that_is_none_is_said_in_a_line(answer, message):
    check_answers(Plain())
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_answers(type("Marks", (Plain,), answer)())


def test_the_second_half_is_that_of_whoever_can_be_edited():
    codec, wave = Codec2Tokenizer(), np.sin(np.arange(640)).astype(np.float32)
    half = second_half(codec, wave)
    assert half.codes.tolist() == [False] * 4 + [True] * 4
    assert half.open_end
    assert not half.raw[320:].any()  # what is made anew is not told


def test_what_is_seen_heard_or_in_a_file_is_no_words():
    methods = {"draw": lambda self, raw: raw, "play": lambda self, raw: raw}
    for name, method in methods.items():
        assert not is_words(type("Marks", (Plain,), {name: method})())
    both = {"read": lambda self, path: path, "write": lambda self, raw, path: None, "suffix": ".a"}
    assert not is_words(type("Marks", (Plain,), both)())


def test_the_grey_of_a_code_is_its_share_of_its_own_codebook():
    pixels = np.asarray(partial(Plain(), torch.tensor([2, 5]), torch.tensor([True, True])))[::2]
    assert pixels[:, 0, 0].tolist() == [20 + 200 * 2 // 4, 20 + 200 * 5 // 10]


def test_a_span_that_begins_behind_the_clip_is_refused_and_a_loud_clip_is_cut_at_the_top(tmp_path):
    codec = Codec2Tokenizer()
    with pytest.raises(ValueError, match=r"region '0.1-0.2': start-stop in seconds, inside 0-0.08, not empty"):
        codec.region(np.zeros(640, dtype=np.float32), "0.1-0.2")
    codec.write(np.full(640, 1.5, dtype=np.float32), tmp_path / "a.wav")
    assert codec.read(tmp_path / "a.wav").min() > 0.99


def test_a_box_takes_every_patch_that_it_touches_and_no_other():
    codes = GreyPatchTokenizer(8, 2, 3).region(Image.new("L", (8, 8), 255), "3,0,5,2").codes
    assert codes.view(4, 4).tolist() == [[False, True, True, False], *[[False] * 4] * 3]
