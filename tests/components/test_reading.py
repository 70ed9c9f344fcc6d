"""What users bring, and what is made of it: a claim and its value for each kind (docs/what-you-can-bring.md lists them)."""

import io
import json

import numpy as np
import pytest
import soundfile
from PIL import Image
from torch.testing import assert_close

from components.data import clips
from components.data.bad import BadSample
from components.data.clips import read_audio, waveform
from components.data.images import read_image
from components.data.reading import checked_text, decoded, json_lines, read_text
from components.tokenizers.audio import Codec2Tokenizer
from components.tokenizers.image import GreyPatchTokenizer

WHITE = (255, 255, 255)


# lines and text


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_record_ends_at_a_line_end_alone(tmp_path, end):
    """str.splitlines also cuts at these, inside of a JSON string that may hold them."""
    inside = "a\u2028b\u2029c\x85d\x7fe"
    lines = [json.dumps({"text": inside}, ensure_ascii=False), "", json.dumps([1])]
    (tmp_path / "a.jsonl").write_bytes(end.join(lines).encode())
    assert list(json_lines(tmp_path / "a.jsonl")) == [(1, {"text": inside}), (3, [1])]
    (tmp_path / "c.jsonl").write_bytes(b'{"a":\r1}\n\xef\xbb\xbf2')  # nor at \r alone; and files may have been put together
    assert list(json_lines(tmp_path / "c.jsonl")) == [(1, {"a": 1}), (2, 2)]
    (tmp_path / "b.jsonl").write_bytes(b'"a\x0bb"\n"a\x0cb"\n2')  # JSON forbids them raw: one bad line each, not two
    found = list(json_lines(tmp_path / "b.jsonl"))
    assert [number for number, _ in found] == [1, 2, 3]
    assert [isinstance(value, BadSample) for _, value in found] == [True, True, False]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_text_is_read_by_its_byte_order_mark(tmp_path, encoding):
    text = "Käse \u2028 漢字 😀"
    mark = "" if encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32") else "\ufeff"
    (tmp_path / "a.txt").write_bytes((mark + text + "\r\nb\rc\n").encode(encoding))
    assert read_text(tmp_path / "a.txt") == text + "\nb\nc\n"
    (tmp_path / "a.jsonl").write_bytes((mark + json.dumps(text, ensure_ascii=False) + "\n3").encode(encoding))
    assert list(json_lines(tmp_path / "a.jsonl")) == [(1, text), (2, 3)]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("Käse".encode("latin-1"), "it is not UTF-8 (byte 0xe4 at 1); save it as UTF-8"),
        (b"\xff\xfeab\x00", "it is not UTF-16-LE (byte 0x00 at 4); save it as UTF-8"),
        (b"\xff\xfe\x00\x00a\x00\x00\xff", "it is not UTF-32-LE (byte 0x61 at 4); save it as UTF-8"),
        ("ab".encode("utf-16-le"), "it holds NUL characters: UTF-16 without a byte order mark, or no text; save it as UTF-8"),
    ],
)
def test_what_is_no_text_is_named_with_its_encoding(data, why):
    with pytest.raises(BadSample) as bad:
        decoded(data, "a.txt")
    assert str(bad.value) == f"a.txt: {why}"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (None, "text must be a string, got null"),
        (3, "text must be a string, got int"),
        (["a"], "text must be a string, got list"),
        ("", "text is empty"),
        (" \n\u3000", "text is empty"),
        ("a\ud800", r"text holds half a character ('\ud800', a lone surrogate)"),
        (b"\xe4", "it is not UTF-8 (byte 0xe4 at 0); save it as UTF-8"),
    ],
)
def test_what_is_no_text_of_a_sample_says_why(value, why):
    with pytest.raises(BadSample) as bad:
        checked_text(value, "row 3")
    assert str(bad.value) == f"row 3: {why}"


def test_lines_that_are_no_json_are_named_in_their_place(tmp_path):
    lines = [b"{", b"1", b'"\xff"', b"[" * 100_000, b"9" * 5000, b"{'a': 1}", b"2"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = dict(json_lines(tmp_path / "a.jsonl"))
    assert {number for number, value in found.items() if isinstance(value, BadSample)} == {1, 3, 4, 5, 6}
    assert (found[2], found[7]) == (1, 2)
    assert str(found[1]).startswith(f"{tmp_path / 'a.jsonl'}, line 1: it is not JSON: Expecting property name")
    assert found[3].why == "it is not UTF-8 (byte 0xff at 1); save it as UTF-8"
    assert found[4].why == "it is nested too deeply"
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe1\x00\n")  # UTF-16 cut in the middle: no line can be told from another
    ((number, bad),) = json_lines(tmp_path / "a.jsonl")
    assert (number, str(bad)) == (1, f"{tmp_path / 'a.jsonl'}: it is not UTF-16-LE (byte 0x0a at 4); save it as UTF-8")


# images


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def corners(width=4, height=2):
    """Black, but for its upper left corner, which is white."""
    image = Image.new("RGB", (width, height))
    image.putpixel((0, 0), WHITE)
    return image


@pytest.mark.parametrize(
    ("orientation", "corner"),
    [(1, (0, 0)), (2, (3, 0)), (3, (3, 1)), (4, (0, 1)), (5, (0, 0)), (6, (1, 0)), (7, (1, 3)), (8, (0, 3))],
)
def test_a_photo_stands_upright(orientation, corner):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "TIFF", "WEBP"):
        data = saved(corners(), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
        image = read_image(data)
        assert image.size == ((2, 4) if orientation > 4 else (4, 2))
        assert image.getpixel(corner) == WHITE
        assert np.asarray(image).sum() == 3 * 255
        with Image.open(io.BytesIO(data)) as opened:  # the same through the API, and turned once only
            assert_close(np.asarray(read_image(read_image(opened))), np.asarray(image))


def test_exif_that_cannot_be_read_turns_nothing():
    assert read_image(saved(corners(), exif=b"Exif\0\0MM\0\x2a\0\0\0\xff")).getpixel((0, 0)) == WHITE


def black_digit(mode):
    """A black pixel, one half transparent, one that is nothing."""
    levels = np.zeros((1, 3, 4), np.uint8)
    levels[0, :, 3] = 255, 128, 0
    image = Image.fromarray(levels)
    return image.convert("LA").convert("La") if mode == "La" else image.convert(mode)


@pytest.mark.parametrize(("mode", "made"), [("RGBA", "RGB"), ("LA", "L"), ("RGBa", "RGB"), ("La", "L"), ("PA", "RGB")])
def test_a_black_digit_on_nothing_is_seen_on_white(mode, made):
    image = read_image(black_digit(mode))
    assert image.mode == made
    assert np.asarray(image).reshape(1, 3, -1)[0, :, 0].tolist() == [0, 127, 255]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF"])
def test_transparency_in_a_file_is_white(kind):
    image = read_image(saved(black_digit("RGBA"), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})))
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (0, 0, 0)
    assert image.getpixel((2, 0)) == WHITE


@pytest.mark.parametrize(("mode", "made"), [("L", "L"), ("1", "L"), ("RGB", "RGB"), ("P", "RGB"), ("I;16", "L")])
def test_a_colour_that_stands_for_transparent_is_white(mode, made):
    image = Image.new("L", (2, 1))
    image.putpixel((1, 0), 60)
    if mode == "I;16":
        image = Image.fromarray(np.array([[0, 60 * 257]], np.uint16))
    elif mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([0, 0, 0, 60, 60, 60])
        image.putpixel((1, 0), 1)
    elif mode == "1":
        image = Image.fromarray(np.array([[False, True]]))
    data = saved(image.convert("RGB") if mode == "RGB" else image, transparency=(0, 0, 0) if mode == "RGB" else 0)
    found = read_image(data)
    assert found.mode == made
    assert np.asarray(found).reshape(2, -1)[:, 0].tolist() == [255, 255 if mode == "1" else 60]


def test_a_palette_may_have_a_transparency_for_each_colour():
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0] * 3)
    image.putdata([0, 1, 2])
    assert np.asarray(read_image(saved(image, transparency=bytes([255, 128, 0]))))[0, :, 0].tolist() == [0, 127, 255]


def test_sixteen_bits_are_scaled_from_their_range():
    ramp = (np.arange(16) * 4369).astype(np.uint16).reshape(4, 4)  # 0 .. 65535
    expected = np.arange(16).reshape(4, 4) * 17
    for kind in ("PNG", "TIFF", "PPM"):
        assert_close(np.asarray(read_image(saved(Image.fromarray(ramp), kind))), expected.astype(np.uint8))
    dark = Image.fromarray((ramp // 300).astype(np.uint16))  # a dark one is dark: the range is the format's, not its own
    assert np.asarray(read_image(saved(dark))).max() == 1
    big_endian = Image.frombytes("I;16B", (4, 4), ramp.astype(">u2").tobytes())
    assert_close(np.asarray(read_image(big_endian)), expected.astype(np.uint8))


@pytest.mark.parametrize(
    ("values", "grey"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 51.0, 255.0]], np.float32), [0, 51, 255]),
        (np.array([[0.0, 257.0, 65535.0]], np.float32), [0, 1, 255]),
        (np.array([[-1.0, 0.0, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 5e8, 1e9]], np.float32), [0, 128, 255]),
        (np.array([[1e9, 2e9, 2e9]], np.float32), [128, 255, 255]),
        (np.array([[-5.0, -5.0, -5.0]], np.float32), [0, 0, 0]),
        (np.array([[0, 1, 255]], np.int32), [0, 1, 255]),
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[0, 2**30, 2**31 - 1]], np.int32), [0, 128, 255]),
    ],
)
def test_numbers_of_no_known_range_are_scaled_from_the_first_that_holds_them(values, grey):
    found = np.asarray(read_image(Image.fromarray(values)))[0]
    assert np.abs(found.astype(int) - grey).max() <= 0, found


@pytest.mark.parametrize("mode", ["P", "CMYK", "YCbCr", "HSV", "1"])
def test_a_mode_is_converted_before_it_is_resized(mode):
    """A checkerboard at half its size is grey with LANCZOS; the nearest neighbour in a palette leaves it black or white."""
    squares = np.indices((16, 16)).sum(axis=0) % 2 * 255
    board = Image.fromarray(np.repeat(squares[..., None], 3, axis=2).astype(np.uint8)).convert(mode)
    small = np.asarray(read_image(board, 8).convert("L"))
    assert np.abs(small.astype(int) - 127).max() < 40
    assert read_image(board).mode == ("L" if mode == "1" else "RGB")
    if mode == "CMYK":
        assert_close(np.asarray(read_image(saved(board, "TIFF"))), np.asarray(board.convert("RGB")))


def test_grey_stays_grey_colour_becomes_rgb_and_a_plain_image_keeps_its_pixels():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert_close(np.asarray(read_image(saved(Image.fromarray(grey)), 8)), grey)
    colour = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert_close(np.asarray(read_image(Image.fromarray(colour), 8)), colour)


def test_an_image_is_cropped_to_its_central_square():
    image = read_image(Image.fromarray(np.repeat([[0, 0, 200, 200, 0, 0]], 2, axis=0).astype(np.uint8)), 2)
    assert np.asarray(image).tolist() == [[200, 200], [200, 200]]


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP"])
def test_of_several_frames_the_first_is_taken(kind):
    frames = [Image.new("RGB", (4, 4), (v, v, v)) for v in (0, 255, 128)]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
    assert read_image(data).getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [35, 25], ids=["pillow_refuses", "pillow_warns"])
def test_an_image_of_too_many_pixels_is_named(tmp_path, monkeypatch, side):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    Image.new("L", (side, side)).save(tmp_path / "big.png")
    with pytest.raises(BadSample, match=r"big\.png: .*(exceeds limit of 1200|25 x 25 pixels, more than the limit of 600)"):
        read_image(tmp_path / "big.png")
    Image.new("L", (24, 25)).save(tmp_path / "fits.png")
    assert read_image(tmp_path / "fits.png").size == (24, 25)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (b"", "image: it is no image of a known format"),
        (b"RIFFgarbage", "image: it is no image of a known format"),
        (
            saved(corners(64, 64), "BMP")[:800],
            "image: it cannot be read as image: image file is truncated (11 bytes not processed)",
        ),
        (None, "image: it is missing"),
        ({"bytes": None, "path": None}, "image: it is missing"),
        ({"bytes": b"x", "path": "a.png"}, "a.png: it is no image of a known format"),
        ({"bytes": b"", "path": "a.png"}, "a.png: it is no image of a known format"),
        ("absent.png", "absent.png: file not found"),
        (7, "image: expected a file, got int"),
        (Image.fromarray(np.array([[0, np.nan]], np.float32)), "image: it holds NaN or infinite pixels"),
        (Image.new("L", (0, 4)), "image: it has no pixels"),
    ],
)
def test_what_is_no_image_is_one_line(source, why):
    with pytest.raises(BadSample) as bad:
        read_image(source)
    assert str(bad.value).split("(")[0] == why.split("(")[0]


# audio


def clip(samples, rate=8000, kind="WAV", subtype=None):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


TONE = (0.5 * np.sin(np.arange(800) * 0.3)).astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "subtype", "error"),
    [
        ("WAV", "PCM_U8", 1 / 100),
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "PCM_32", 1e-7),
        ("WAV", "FLOAT", 0.0),
        ("WAV", "DOUBLE", 0.0),
        ("FLAC", "PCM_16", 1e-4),
        ("OGG", "VORBIS", 0.1),
        ("MP3", None, None),
    ],
)
def test_every_format_and_width_is_the_same_clip(kind, subtype, error):
    found = read_audio(clip(TONE, kind=kind, subtype=subtype), 8000)
    assert found.dtype == np.float32
    if error is not None:
        assert_close(found, TONE, rtol=0, atol=error)
    assert 0.3 < np.abs(found).max() < 0.7


def test_channels_are_mixed_and_rates_resampled():
    stereo = np.stack([TONE, np.zeros_like(TONE)], axis=1)
    assert_close(read_audio(clip(stereo, subtype="FLOAT"), 8000), TONE / 2)
    assert len(read_audio(clip(TONE, 16000), 8000)) == 400


def test_of_channels_that_cancel_one_is_taken_and_counted(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(clips, "cancelled", set())
    for i in range(12):
        soundfile.write(tmp_path / f"{i}.wav", np.stack([TONE, -TONE], axis=1), 8000, subtype="FLOAT")
        for _ in range(2):  # epochs
            assert_close(read_audio(tmp_path / f"{i}.wav", 8000), TONE)
    assert len(clips.cancelled) == 12
    printed = capsys.readouterr().out.splitlines()
    assert [line.rsplit(", ", 1)[0] for line in printed] == [
        f"channels cancel in their mean, one is taken: {n} clip(s) so far" for n in (1, 10)
    ]
    assert printed[0].endswith("0.wav")
    nearly = np.stack([0.9 * TONE, -TONE], axis=1)  # 0.0028 of its energy is left: it is heard
    assert_close(read_audio(clip(nearly, subtype="FLOAT"), 8000), -TONE * 0.05, rtol=0, atol=1e-6)
    louder = np.stack([0.98 * TONE, -TONE], axis=1)  # and 0.0001: the louder one
    assert_close(read_audio(clip(louder, subtype="FLOAT"), 8000), -TONE, rtol=0, atol=1e-6)
    assert_close(read_audio(clip(np.zeros((80, 2))), 8000), np.zeros(80, np.float32))  # silence cancels nothing
    assert len(clips.cancelled) == 13


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (np.array([0, 16384, -32768, 32767], np.int16), [0, 0.5, -1, 32767 / 32768]),
        (np.array([0, 2**30, -(2**31)], np.int32), [0, 0.5, -1]),
        (np.array([128, 192, 0, 255], np.uint8), [0, 0.5, -1, 127 / 128]),
        (np.array([0, 64, -128], np.int8), [0, 0.5, -1]),
        (np.array([32768, 49152, 0], np.uint16), [0, 0.5, -1]),
        (np.array([0, 0.5, -1.2], np.float64), [0, 0.5, -1.2]),
        (np.array([0, 0.5], np.float16), [0, 0.5]),
    ],
)
def test_arrays_are_scaled_from_their_own_range(raw, expected):
    found = waveform(raw)
    assert found.dtype == np.float32
    assert_close(found, np.array(expected, np.float32))


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (np.zeros((800, 2)), "a waveform has one dimension, got shape (800, 2); mix its channels, e.g. raw.mean(axis=1)"),
        (np.float32(1), "a waveform has one dimension, got shape ()"),
        (np.zeros(0), "the waveform is empty"),
        (np.array([0, np.nan]), "it holds NaN or infinite samples"),
        (np.array([0, -np.inf]), "it holds NaN or infinite samples"),
        (np.array([0, 1e300]), "it holds NaN or infinite samples"),
        (np.zeros(3, bool), "a waveform is float, or integer of at most 32 bits, got bool"),
        (np.zeros(3, complex), "a waveform is float, or integer of at most 32 bits, got complex128"),
        (np.zeros(3, np.int64), "a waveform is float, or integer of at most 32 bits, got int64"),
        (np.array(["a"]), "a waveform is float, or integer of at most 32 bits, got <U1"),
        (np.array([0.0, 12000.0]), "it peaks at 1.2e+04, and a float waveform is in [-1, 1]; integers keep their dtype"),
        ([0.0, 0.1], "a waveform is an array of numbers, got list"),
        ("a.wav", "a waveform is an array of numbers, got str"),
    ],
)
def test_an_array_that_is_no_clip_is_one_line(raw, why):
    with pytest.raises(BadSample) as bad:
        waveform(raw, "audio tokenizer")
    assert str(bad.value).startswith(f"audio tokenizer: {why}")


def header(data, at, value):
    """A WAV file with four bytes of its header changed."""
    return data[:at] + value.to_bytes(4, "little") + data[at + 4 :]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (b"", "it cannot be read as audio: Format not recognised."),
        (clip(TONE)[:20], "it cannot be read as audio"),
        (clip(np.zeros(0)), "the waveform is empty"),
        (clip(np.array([0.1, np.nan]), subtype="FLOAT"), "it holds NaN or infinite samples"),
        (clip(np.array([[0.1, np.nan], [0.2, 0.3]]), subtype="FLOAT"), "it holds NaN or infinite samples"),
        (header(clip(TONE), 24, 3), "its sample rate is 3 Hz; rates are 100 to 1,000,000"),
        (header(clip(TONE), 24, 2**31 - 2), "its sample rate is 2147483646 Hz; rates are 100 to 1,000,000"),
        (None, "it is missing"),
    ],
)
def test_what_is_no_clip_is_one_line(source, why):
    with pytest.raises(BadSample) as bad:
        read_audio(source, 8000)
    assert str(bad.value).startswith(f"audio: {why}")


def test_a_clip_is_measured_before_it_takes_the_memory(monkeypatch):
    monkeypatch.setattr(clips, "MAX_SAMPLES", 1000)
    assert len(read_audio(clip(TONE), 8000)) == 800
    for stereo_or_rate in (clip(np.stack([TONE, TONE], axis=1)), clip(TONE, 4000)):
        with pytest.raises(BadSample, match="it is longer than 1,000 samples"):
            read_audio(stereo_or_rate, 8000)
    assert len(read_audio(header(clip(TONE), 40, 2**31), 8000)) == 800  # what its header claims is not there


# tokenizers take the same


def test_an_image_tokenizer_sees_what_a_viewer_sees():
    tokenizer = GreyPatchTokenizer(8, 1, 17)
    levels = np.rint(np.arange(64).reshape(8, 8) % 17 / 16 * 255).astype(np.uint8)
    codes = tokenizer.encode(Image.fromarray(levels))
    assert codes.tolist() == (np.arange(64) % 17).tolist()
    sixteen = Image.fromarray(levels.astype(np.uint16) * 257)
    turned = Image.fromarray(levels).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    on_nothing = Image.merge("LA", (Image.new("L", (8, 8)), Image.fromarray(255 - levels)))
    for image in (sixteen, Image.open(io.BytesIO(saved(turned, exif=exif))), on_nothing):
        assert tokenizer.encode(image).tolist() == codes.tolist()
    with pytest.raises(ValueError, match="image tokenizer: it holds NaN"):
        tokenizer.encode(Image.fromarray(np.full((8, 8), np.nan, np.float32)))


def test_an_audio_tokenizer_hears_integers_as_the_floats_they_stand_for():
    tokenizer = Codec2Tokenizer()
    pcm = np.rint(TONE * 32768).astype(np.int16)
    assert tokenizer.encode(pcm).tolist() == tokenizer.encode(pcm.astype(np.float32) / 32768).tolist()
    for raw, why in ((np.zeros((800, 2), np.int16), "one dimension"), (np.full(9, np.nan), "NaN")):
        with pytest.raises(ValueError, match=f"audio tokenizer: .*{why}"):
            tokenizer.encode(raw)
