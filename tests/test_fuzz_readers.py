"""Whatever is brought, a reader makes of it a usable sample, a counted `BadSample`, or an error of one line: nothing else.

About 15 seconds and always the same examples; `MDM_FUZZ=100` tries a hundred times as many, other ones each time.
"""

import io
import json
import os
import tarfile
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from components.data.bad import BadSample, drawn
from components.data.clips import read_audio, waveform
from components.data.hub import Convert
from components.data.images import read_image
from components.data.indexed import Mapped
from components.data.reading import decoded
from components.data.sources import Folder, Jsonl, hugging_face
from components.tokenizers.audio import Codec2Tokenizer
from components.tokenizers.image import GreyPatchTokenizer
from components.tokenizers.text import JsonTokenizer, TextTokenizer
from mdm.config import UserError
from mdm.generation.prompts import read_jsonl

TIMES = int(os.environ.get("MDM_FUZZ", "1"))
TEXT = TextTokenizer.train(["a handwritten seven, a spoken six"], 260)
IMAGE, AUDIO = GreyPatchTokenizer(8, 2, 4), Codec2Tokenizer()


def fuzz(examples):
    return settings(
        max_examples=examples * TIMES, deadline=None, derandomize=TIMES == 1, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():  # decoders warn of what they repair
        warnings.simplefilter("ignore")
        yield


def one_line(error):
    said = str(error)
    assert said.strip()
    assert "\n" not in said
    assert "Type-check" not in said, said


def made(call, *arguments, **named):
    """What a call returns; None where it ends in an error of one line. A panic of a library in Rust is no Exception."""
    try:
        return call(*arguments, **named)
    except (ValueError, UserError, FileNotFoundError) as error:
        one_line(error)
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error


def check(sample):
    """A sample is bad in one line, or each of its parts is what it should be, and a tokenizer takes it."""
    if isinstance(sample, BadSample):
        return one_line(sample)
    assert isinstance(sample, dict)
    if "text" in sample:
        assert sample["text"].strip()
        assert made(TEXT.encode, sample["text"]) is not None
    if "image" in sample:
        assert sample["image"].mode in ("L", "RGB")
        assert sample["image"].size == (8, 8)
        assert len(IMAGE.encode(sample["image"])) == 16
    if "audio" in sample:
        audio = sample["audio"]
        assert (audio.ndim, audio.dtype) == (1, np.float32)
        assert len(audio)
        assert np.isfinite(audio).all()
        assert len(AUDIO.encode(audio[:400]))


LITERALS = ("<|mdm_mask|>", "<|endoftext|>", "[MASK]", "<s>")


def json_tokenizer():
    """A `tokenizer.json` of bytes, with control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(list(LITERALS))
    with tempfile.TemporaryDirectory() as folder:
        made.save(f"{folder}/tokenizer.json")
        return JsonTokenizer(f"{folder}/tokenizer.json")


JSON = json_tokenizer()


# what is brought

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(["text", "prompt", "image", "audio", "other"])
rows = st.dictionaries(names, values | st.sampled_from(["a.png", "a.wav", "absent.png", ".", "", "a\0b", "\u2028"]), max_size=4)
lines = st.one_of(
    rows.map(json.dumps).map(str.encode),
    rows.map(lambda r: json.dumps(r, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    values.map(json.dumps).map(str.encode),
    st.binary(max_size=40),
)


@st.composite
def damaged(draw, whole):
    """Bytes as they are, cut, with a few of them changed, or others altogether."""
    data = draw(whole)
    how = draw(st.sampled_from(["whole", "whole", "cut", "changed", "changed", "other"]))
    if how == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if how == "changed" and data:
        changed = bytearray(data)
        for _ in range(draw(st.integers(1, 6))):
            at = draw(st.integers(0, len(data) - 1) | st.integers(0, min(len(data) - 1, 64)))  # a header is at the front
            changed[at] = draw(st.integers(0, 255))
        return bytes(changed)
    return draw(st.binary(max_size=200)) if how == "other" else data


MODES = (
    "1",
    "L",
    "P",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "LA",
    "PA",
    "RGBX",
    "RGBa",
    "La",
    "I;16",
    "I;16B",
)


@st.composite
def images(draw, smallest=0):
    """A PIL image of any mode and size, with or without transparency and EXIF."""
    mode, size = draw(st.sampled_from(MODES)), draw(st.tuples(*[st.integers(smallest, 20)] * 2))
    image = Image.new(mode, size, draw(st.sampled_from([0, 1])) if mode not in ("La", "RGBa", "PA", "LAB") else None)
    if draw(st.booleans()) and mode in ("L", "RGB", "F", "I;16", "I") and min(size):
        kind = {"F": np.float32, "I;16": np.uint16, "I": np.int32}.get(mode, np.uint8)
        shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
        image = Image.fromarray(draw(arrays.arrays(kind, shape)))
    if draw(st.booleans()):
        image.info["transparency"] = draw(st.integers(-1, 300) | st.binary(max_size=4) | st.tuples(*[st.integers(0, 255)] * 3))
    if draw(st.booleans()):
        exif = Image.Exif()
        exif[0x0112] = draw(st.integers(0, 20))
        image.info["exif"] = draw(st.just(exif.tobytes()) | st.binary(max_size=30))
    return image


@st.composite
def pictures(draw):
    """The bytes of an image in any format that takes it."""
    image, buffer = draw(images(smallest=1)), io.BytesIO()
    try:
        image.save(buffer, draw(st.sampled_from(["PNG", "TIFF", "GIF", "WEBP", "BMP", "JPEG", "PPM", "TGA", "ICO"])))
    except Exception:  # not every format takes every mode, every orientation, every colour that stands for transparent
        Image.new("RGBA", image.size, (9, 9, 9, 9)).save(buffer, draw(st.sampled_from(["PNG", "TIFF", "WEBP"])))
    return buffer.getvalue()


PATHS = st.none() | st.text(max_size=9)
FORMATS = [(k, s) for k in ("WAV", "FLAC", "OGG", "AIFF", "AU", "CAF", "W64") for s in soundfile.available_subtypes(k)]


@st.composite
def clips(draw):
    """The bytes of a clip of any format, width, rate and number of channels."""
    kind, subtype = draw(st.sampled_from(FORMATS))
    plain = subtype in ("FLOAT", "DOUBLE")  # other encoders crash at rates and numbers that are none
    rate, channels = draw(st.sampled_from([8000, 8001, 1, 2**31 - 1] if plain else [8000, 48000])), draw(st.integers(1, 9))
    numbers = None if plain else st.floats(-1, 1, width=32)
    samples = draw(arrays.arrays(np.float32, (draw(st.integers(0, 30)), channels), elements=numbers))
    buffer = io.BytesIO()
    try:
        soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    except Exception:
        return b""
    return buffer.getvalue()


# and what is made of it


@fuzz(150)
@given(
    st.lists(lines, min_size=1, max_size=5), st.sampled_from([b"\n", b"\r\n", b"\r"]), st.sampled_from([b"", b"\xef\xbb\xbf"])
)
def test_lines_of_json(parts, end, mark):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(mark + end.join(parts))
        Image.new("L", (9, 9)).save(Path(folder) / "a.png")
        for sample in drawn(made(Jsonl, str(path), size=8) or ()):
            check(sample)
        made(Jsonl, str(path), on_corrupt="refuse")
        made(read_jsonl, path)


@fuzz(200)
@given(
    damaged(
        st.tuples(st.text(max_size=30), st.sampled_from(["utf-8", "utf-16", "utf-32", "utf-8-sig"])).map(
            lambda t: t[0].encode(t[1])
        )
    )
)
def test_bytes_as_text(data):
    made(decoded, data, "a.txt")


runs = st.tuples(st.sampled_from([" ", "\n", "\u00a0", "a", "\U0001f600"]), st.sampled_from([2, 999, 100_001]))
pieces = (
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(LITERALS) | runs.map(lambda t: t[0] * t[1])
)


@fuzz(30)
@given(st.lists(pieces, min_size=1, max_size=4).map("".join))
@example(" " * 1_000_000)
def test_texts_come_back_and_hold_no_control_token(text):
    for tokenizer in (TEXT, JSON):
        codes = made(tokenizer.encode, text)
        assert tokenizer.decode(codes) == text
        assert set(codes.tolist()) <= set(range(260 if tokenizer is TEXT else 256))


@fuzz(150)
@given(images(), st.sampled_from([None, 1, 8]))
def test_images_of_every_mode(image, size):
    found = made(read_image, image, size)
    if found is not None:
        assert found.mode in ("L", "RGB")
        assert size is None or found.size == (size, size)
    made(IMAGE.encode, image)


@fuzz(250)
@given(damaged(pictures()))
def test_files_of_images(data):
    found = made(read_image, data, 8)
    if found is not None:
        check({"image": found})


@fuzz(250)
@given(damaged(clips()), st.sampled_from([8000, 24000]))
def test_files_of_clips(data, rate):
    found = made(read_audio, data, rate)
    if found is not None:
        check({"audio": found})


@fuzz(150)
@given(arrays.arrays(arrays.scalar_dtypes(), arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)))
def test_arrays_as_clips(array):
    found = made(waveform, array)
    if found is not None:
        check({"audio": found})
    made(AUDIO.encode, array)


@fuzz(100)
@given(
    st.lists(
        st.tuples(damaged(pictures()), st.none() | st.binary(max_size=20) | st.text(max_size=9).map(str.encode)), max_size=4
    )
)
def test_folders(files):
    with tempfile.TemporaryDirectory() as folder:
        for i, (picture, caption) in enumerate(files):
            (Path(folder) / f"{i}.png").write_bytes(picture)
            if caption is not None:
                (Path(folder) / f"{i}.txt").write_bytes(caption)
        for kind in ("image", "text"):
            source = made(Folder, folder, kind, size=8)
            assert source is None or len(source) <= len(files)
            for sample in drawn(source or ()):
                check(sample)
            made(Folder, folder, kind, on_corrupt="refuse")


@fuzz(150)
@given(
    values | st.binary(max_size=20),
    values | damaged(pictures()) | images() | st.fixed_dictionaries({"bytes": st.none() | pictures(), "path": PATHS}),
    values | damaged(clips()) | st.fixed_dictionaries({"bytes": st.none() | clips(), "path": PATHS}),
)
def test_rows_of_a_dataset(text, image, audio):
    convert = Convert({"text": "a", "image": "b", "audio": "c"}, 8, 8000)
    for row in ({"a": text, "b": image, "c": audio}, {"a": "x", "b": image, "c": audio}):
        for sample in drawn(Mapped([row], convert, "rows")):
            check(sample)


@fuzz(25)
@given(
    st.lists(
        st.tuples(st.sampled_from(["1", "2", "3", "2.1"]), st.sampled_from(["png", "txt"]), st.binary(max_size=9)), max_size=6
    ),
    st.booleans(),
    st.integers(0, 4000),
)
def test_webdatasets(files, cut, at):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        with tarfile.open(path, "w") as tar:
            for key, end, data in files:
                info = tarfile.TarInfo(f"{key}.{end}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        if cut:
            path.write_bytes(path.read_bytes()[:at])
        ask = {"text": "txt", "image": "png", "size": 8, "data_files": str(path), "streaming": True}
        source = made(hugging_face, "webdataset", **ask)
        for sample in made(list, drawn(source)) or () if source is not None else ():
            check(sample)
