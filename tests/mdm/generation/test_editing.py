"""What is edited: the codes that stay tell nothing of what was there, and the region is what a viewer or a listener means."""

import numpy as np
import pytest
import torch
from PIL import Image

from components.tokenizers.audio import Codec2Tokenizer
from components.tokenizers.audio_neural import NeuralAudioTokenizer, interleave
from components.tokenizers.fsq import FSQAutoencoder, FSQConfig, FSQImageTokenizer
from components.tokenizers.image import GreyPatchTokenizer
from components.tokenizers.image_vq import VQImageTokenizer
from components.tokenizers.modality import Region
from components.tokenizers.text import TextTokenizer
from mdm.data.processor import Processor
from mdm.generation.editing import edit, infill, second_half
from tests.components.test_learned_tokenizers import AUDIO, IMAGES


def fsq(**config):
    torch.manual_seed(0)
    return FSQAutoencoder(FSQConfig(width=8, levels=(8, 5, 5), books=2, **config)).eval().requires_grad_(False)


def neural(order, family="dac"):
    torch.manual_seed(0)
    return NeuralAudioTokenizer(None, family, order=order, config=AUDIO[family])


def vq(family):
    torch.manual_seed(0)
    return VQImageTokenizer(None, 32, family, config=IMAGES[family])


IMAGE_TOKENIZERS = {
    "grey": lambda: GreyPatchTokenizer(32, 2, 3),
    "vq": lambda: vq("vq"),
    "emu3": lambda: vq("emu3"),
    "fsq": lambda: FSQImageTokenizer(fsq(kind="image", patch=2, size=32, channels=3)),
}
AUDIO_TOKENIZERS = {
    "codec2": Codec2Tokenizer,
    "frames": lambda: neural("frames"),
    "delay": lambda: neural("delay"),
}


def processor(**tokenizers):
    return Processor.build(tokenizers, {})


def inpaint(own, image, box):
    return edit(own, "image", image, ",".join(map(str, box)))


def respeak(own, audio, start, stop=None):
    return edit(own, "audio", audio, f"{start}-{'' if stop is None else stop}")


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", IMAGE_TOKENIZERS)
def test_what_was_in_the_box_is_in_no_code_of_an_image(kind, mode):
    own = processor(image=IMAGE_TOKENIZERS[kind]())
    rng = np.random.default_rng(0)
    one = rng.integers(0, 256, (32, 32, 3)[: 3 if mode == "RGB" else 2], dtype=np.uint8)
    other = one.copy()
    other[8:19, 4:20] = rng.integers(0, 256, other[8:19, 4:20].shape)
    a, b = (inpaint(own, Image.fromarray(x), (4, 8, 20, 19)) for x in (one, other))
    assert torch.equal(a.region, b.region)
    assert torch.equal(a.tokens[~a.region], b.tokens[~b.region])
    assert not torch.equal(
        a.tokens[~a.region], own.encode("image", Image.new(mode, (32, 32)))[~a.region]
    )  # of the rest, they do


def test_patches_of_several_codes_are_drawn_anew_whole():
    own = processor(image=IMAGE_TOKENIZERS["fsq"]())
    region = inpaint(own, Image.new("RGB", (32, 32)), (2, 0, 4, 3)).region.view(16, 16, 2)
    assert region.nonzero().tolist() == [[0, 1, 0], [0, 1, 1], [1, 1, 0], [1, 1, 1]]


def test_codes_of_single_patches_stay_what_they_are():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32), dtype=np.uint8))
    own = processor(image=GreyPatchTokenizer(32, 2, 3))
    made = inpaint(own, image, (3, 3, 9, 9))
    assert torch.equal(made.tokens[~made.region], own.encode("image", image)[~made.region])


def test_the_blank_is_the_mean_of_the_rest_or_grey():
    own = processor(image=GreyPatchTokenizer(4, 1, 256))
    image = Image.fromarray(np.array([[10, 10, 0, 0], [20, 20, 0, 0], [10, 10, 0, 0], [20, 20, 0, 0]], dtype=np.uint8))
    assert inpaint(own, image, (2, 0, 4, 4)).tokens.view(4, 4)[:, 2:].unique().tolist() == [15]
    assert inpaint(own, image, (0, 0, 4, 4)).tokens.unique().tolist() == [128]


@pytest.mark.parametrize("stop", [0.33, None])
@pytest.mark.parametrize("kind", AUDIO_TOKENIZERS)
def test_what_was_in_the_span_is_in_no_code_of_a_clip(kind, stop):
    own = processor(audio=AUDIO_TOKENIZERS[kind]())
    rate = own.tokenizers["audio"].sample_rate
    rng = np.random.default_rng(0)
    one = 0.3 * rng.standard_normal(int(0.5 * rate)).astype(np.float32)
    other, span = one.copy(), slice(int(0.21 * rate), None if stop is None else int(stop * rate))
    other[span] = 0.3 * rng.standard_normal(len(other[span]))
    a, b = (respeak(own, x, 0.21, stop) for x in (one, other))
    assert torch.equal(a.region, b.region)
    assert torch.equal(a.tokens[~a.region], b.tokens[~b.region])
    assert not torch.equal(a.tokens[~a.region], own.encode("audio", 0 * one)[~a.region])
    assert one[span].any()  # the caller's clip is not silenced


@pytest.mark.parametrize("order", ["frames", "delay"])
def test_the_frames_that_are_heard_in_the_span_are_spoken_anew(order):
    """The oracle: the codes' own frame numbers, laid out as the codes are. A frame of this DAC has 512 samples of 16 kHz."""
    own = processor(audio=neural(order))
    audio = np.zeros(10 * 512 - 100, dtype=np.float32)
    frames = interleave(torch.arange(10).expand(3, 10), order, -1)
    some = respeak(own, audio, 3.5 * 512 / 16000, 6 * 512 / 16000)
    assert torch.equal(some.region, (frames >= 3) & (frames < 6))
    assert torch.equal(some.on_canvas(len(frames) + 3), torch.cat([some.region, torch.zeros(3, dtype=torch.bool)]))
    last = respeak(own, audio, 9 * 512 / 16000, len(audio) / 16000)
    assert torch.equal(last.region, frames == 9)  # what pads the other books behind it is given
    whole = respeak(own, audio, 0.0, len(audio) / 16000)
    assert torch.equal(whole.region, frames >= 0)
    ending = respeak(own, audio, 8 * 512 / 16000)
    before = torch.arange(len(frames)) < int((frames == 8).nonzero()[0])
    assert torch.equal(ending.region, ~(before | ((frames >= 0) & (frames < 8))))  # and to a new end: it is not
    assert ending.on_canvas(len(frames) + 3)[-3:].all()


@pytest.mark.parametrize("family", AUDIO)
def test_a_codec_says_how_many_samples_a_frame_has(family):
    own = neural("frames", family)
    one, more = (len(own.encode(np.zeros(n * own.frame_samples, np.float32))) // own.books for n in (10, 25))
    assert more - one == 15


def test_a_clip_that_ends_within_a_frame_is_cut_where_its_frames_are():
    """330 samples are two frames of 320; the second begins at sample 320, not at the half."""
    own = processor(audio=Codec2Tokenizer())
    assert respeak(own, np.zeros(330), 300 / 8000, 310 / 8000).region.view(2, 4)[:, 0].tolist() == [True, False]
    assert respeak(own, np.zeros(640), 0.07999).region.view(2, 4)[:, 0].tolist() == [False, True]  # not quite at the end


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: inpaint(p, Image.new("RGBA", (32, 32)), (0, 0, 4, 4)), "an image of mode RGBA; it can be L or RGB"),
        (lambda p: inpaint(p, Image.new("L", (31, 32)), (0, 0, 4, 4)), "expected 32x32 pixels, got 31x32"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(processor(image=GreyPatchTokenizer(32, 2, 3)))


@pytest.mark.parametrize("gap", ["[mask:999999999999]", "[mask:1000000] [mask:1000000]", "[mask:" + "9" * 5000 + "]"])
def test_a_gap_of_more_tokens_than_any_model_has_takes_no_memory(gap):
    own = Processor.build({"text": TextTokenizer.train(["a b"], 256)}, {})
    with pytest.raises(ValueError, match="its gaps have more than 1,048,576 tokens"):
        infill(own, f"a {gap}")
    assert int(infill(own, "a [mask:6] [mask]").region.sum()) == 7


@pytest.mark.parametrize("region", ["0-inf", "nan-1", "0-1e300", "1e400-", "0-1-2", "-", "a,b,c,d", "1,2,3", "quarter"])
def test_a_region_is_of_numbers(region):
    own = processor(image=GreyPatchTokenizer(32, 2, 3), audio=Codec2Tokenizer())
    with pytest.raises(ValueError, match=r"left,top,right,bottom in pixels, inside 0\.\.32, and not empty"):
        edit(own, "image", Image.new("L", (32, 32)), region)
    if region == "-":
        assert edit(own, "audio", np.zeros(640), region).region.all()
        return
    with pytest.raises(ValueError, match=r"start-stop in seconds, inside 0-0\.08, not empty"):
        edit(own, "audio", np.zeros(640), region)


def test_every_modality_has_a_second_half():
    own = processor(image=GreyPatchTokenizer(32, 2, 3), audio=Codec2Tokenizer(), text=TextTokenizer.train(["a b"], 256))
    image, clip = Image.new("L", (32, 32)), np.zeros(4 * 320)
    assert second_half(own, "image", image).region.view(16, 16)[:, 0].tolist() == [False] * 8 + [True] * 8
    heard = second_half(own, "audio", clip)
    assert (heard.region.view(4, 4)[:, 0].tolist(), heard.open_end) == ([False, False, True, True], True)
    assert torch.equal(edit(own, "audio", clip, "half").tokens, heard.tokens)
    words = second_half(own, "text", "ab ")
    assert (words.region.tolist(), words.open_end) == ([False, True, True], True)


class Marks:
    """A modality of a user's: its samples are lists of numbers."""

    codebooks = (5, 7)

    def encode(self, raw):
        return torch.tensor(raw, dtype=torch.long)

    def decode(self, codes):
        return codes.tolist()

    def save(self, folder):
        return {}


def test_what_cannot_be_edited_is_said_in_a_line():
    with pytest.raises(
        ValueError, match=r"^marks cannot be edited: tests\.mdm\.generation\.test_editing\.Marks has no region$"
    ):
        edit(processor(marks=Marks()), "marks", [1, 2], "0-1")

    class Short(Marks):
        def region(self, raw, where):
            return Region(raw, torch.ones(3, dtype=torch.bool))

    with pytest.raises(ValueError, match="the region of marks is of 3 codes, and what it leaves has 2"):
        edit(processor(marks=Short()), "marks", [1, 2], "0-1")
