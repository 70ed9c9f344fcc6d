"""What users bring, read in one place: lines, text, images and audio, whatever file, row or array they come in.

    json_lines(path)            numbered values of a JSONL file; records end at \\n or \\r\\n alone
    read_text(path)             UTF-8, or UTF-16 and UTF-32 that say so by a byte order mark (which is dropped)
    read_image(source, size)    as a viewer shows it: upright, on white, 8 bits, grey (L) or colour (RGB)
    read_audio(source, rate)    mono, float32 in [-1, 1], at the rate asked for
    waveform(array)             the same of an array: integers are scaled from their own range

A source is a path, bytes, an undecoded row of a dataset ({"bytes", "path"}), or what is decoded already. What cannot be used is
a `BadSample` of one line: nothing that a decoder raises comes through.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from components.data.bad import MACHINE, BadSample
from components.resampling import resample

BACKGROUND = 255
"""What shows through a transparent pixel: white, as in a viewer."""

MAX_SAMPLES = 2**29
"""Numbers in a clip, all channels together (2 GiB as float32): what claims more is left out before memory is taken."""

RATES = (100, 1_000_000)
"""Sample rates that a recording can have, in Hz."""

MAX_PEAK = 10.0
"""A float waveform is in [-1, 1], a little over where a decoder overshoots; this far over it, it is integers as floats."""

CANCELS = 1e-3
"""Channels cancel where their mean keeps less of their energy than this (-30 dB; of n unrelated ones it keeps 1 / n)."""

cancelled: set[str] = set()
"""The clips so far whose channels cancel, by name."""

BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def decoded(data: bytes, name: str) -> str:
    """Bytes as text, by their byte order mark or else as UTF-8. Raises BadSample that says what they are not."""
    mark, encoding = next(((m, e) for m, e in BOMS if data.startswith(m)), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        at = error.start + len(mark)
        raise BadSample(name, f"it is not {encoding.upper()} (byte 0x{data[at]:02x} at {at}); save it as UTF-8") from error
    if "\0" in text:
        raise BadSample(name, "it holds NUL characters: UTF-16 without a byte order mark, or no text; save it as UTF-8")
    return text


def read_text(path: str | Path) -> str:
    """A text file, each of its line ends as \\n. Raises BadSample."""
    name = str(path)
    try:
        with _opened(path, name) as file:
            data = file.read()
    except OSError as error:
        raise _unreadable(name, "text", error) from error
    return decoded(data, name).replace("\r\n", "\n").replace("\r", "\n")


def checked_text(value: Any, name: str, key: str = "text") -> str:
    """A text of a sample: a string that says something. Raises BadSample."""
    if isinstance(value, bytes):
        value = decoded(value, name)
    if not isinstance(value, str):
        raise BadSample(name, f"{key} must be a string, got {'null' if value is None else type(value).__name__}")
    if not value.strip():
        raise BadSample(name, f"{key} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadSample(name, f"{key} holds half a character ({value[error.start]!a}, a lone surrogate)") from error
    return value


def json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """The values of a JSONL file with the numbers of their lines, from 1; each that is none as a BadSample in its place.

    A record ends at \\n or \\r\\n and nowhere else: U+2028, U+0085 and the like may stand inside a string. Empty lines are left
    out. Raises OSError where the file cannot be opened.
    """
    with Path(path).open("rb") as file:
        lines: Iterable[bytes] = file
        if file.peek(4).startswith(tuple(mark for mark, encoding in BOMS if encoding != "utf-8")):
            try:
                lines = io.BytesIO(decoded(file.read(), str(path)).encode())
            except BadSample as bad:
                yield 1, bad
                return
        for number, line in enumerate(lines, 1):
            name = f"{path}, line {number}"
            try:
                text = decoded(line, name).rstrip("\r\n")  # a mark may begin each of several files put together
                if not text.strip():
                    continue
                value = json.loads(text)
            except BadSample as bad:
                value = bad
            except RecursionError:
                value = BadSample(name, "it is nested too deeply")
            except json.JSONDecodeError as error:
                value = BadSample(name, f"it is not JSON: {error.msg} at character {error.pos + 1}")
            except ValueError as error:  # a number of thousands of digits
                value = BadSample(name, f"it is not JSON: {error}")
            yield number, value


def read_image(source: Any, size: int | None = None, name: str | None = None) -> Image.Image:
    """An image as a viewer shows it, of mode L or RGB; its central square at `size` pixels where a size is asked for.

    - turned upright by its EXIF orientation; of several frames the first
    - transparency (an alpha channel, a palette's, a colour that stands for it) on a white background
    - 16-bit grey is scaled from 0..65535; 32-bit integers and floats from the first of the ranges [0, 1] (floats), [0, 255] and
      [0, 65535] that holds them all, else from their own lowest (or 0) to their highest
    - grey stays grey; all else (palettes, CMYK, YCbCr, ...) becomes RGB before it is resized

    name: what a BadSample is called; None is the path

    Raises BadSample: no image, a truncated one, no pixels, NaN, or more pixels than Pillow's `Image.MAX_IMAGE_PIXELS` (89 M).
    """
    name = name or _name(source, "image")
    try:
        if isinstance(source, Image.Image):
            image = _flat(source, name)
        else:
            with _opened(source, name) as file, Image.open(file) as opened:
                image = _flat(opened, name)
    except BadSample:
        raise
    except UnidentifiedImageError as error:
        raise BadSample(name, "it is no image of a known format") from error
    except Exception as error:  # decoders of many formats
        raise _unreadable(name, "image", error) from error
    return image if size is None else fit(image, size)


def _flat(image: Image.Image, name: str) -> Image.Image:
    """L or RGB, upright and opaque."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise BadSample(name, f"it has {image.width} x {image.height} pixels, more than the limit of {limit:,}")
    if min(image.size) < 1:
        raise BadSample(name, "it has no pixels")
    image.load()
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        image = ImageOps.exif_transpose(image) if turned else image
    except Exception:  # an EXIF block that cannot be read turns nothing
        pass
    if image.mode in ("I", "F") or sixteen:
        return _eight_bits(image, sixteen, name)
    if image.has_transparency_data:
        grey = image.mode in ("1", "L", "LA", "La")
        picture = image.convert("LA").convert("RGBA") if grey else image.convert("RGBA")
        white = Image.new("RGBA", image.size, (BACKGROUND, BACKGROUND, BACKGROUND, 255))
        return Image.alpha_composite(white, picture).convert("L" if grey else "RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _eight_bits(image: Image.Image, sixteen: bool, name: str) -> Image.Image:
    """A grey image of more than 8 bits, scaled from its range to 0..255."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise BadSample(name, "it holds NaN or infinite pixels")
    low, high = min(values.min(), 0.0), values.max()
    if sixteen:
        low, high = 0.0, 65535.0
    elif low == 0:
        ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        high = next((r for r in ranges if high <= r), high)
    grey = (values - low) / max(high - low, 1e-30) * 255
    if image.info.get("transparency") is not None:
        grey = np.where(values == image.info["transparency"], BACKGROUND, grey)
    return Image.fromarray(np.rint(grey).clip(0, 255).astype(np.uint8))


def fit(image: Image.Image, size: int) -> Image.Image:
    """The central square of an image at `size` pixels."""
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


def square(raw: Any, size: int, mode: str) -> Image.Image:
    """An image as a tokenizer takes it: as a viewer shows it, of that size, in mode L or RGB. Raises ValueError."""
    image = read_image(raw, name="image tokenizer")
    if image.size != (size, size):
        raise ValueError(f"image tokenizer: expected {size}x{size} pixels, got {image.width}x{image.height}")
    return image.convert(mode)


def read_audio(source: Any, sample_rate: int, name: str | None = None) -> np.ndarray:
    """A clip as mono float32 at `sample_rate` Hz: the mean of its channels.

    Where the channels cancel in their mean, the loudest alone is taken; such clips are counted in `cancelled`, and printed.

    Raises BadSample: no audio, no samples, NaN, a sample rate that is none, more than `MAX_SAMPLES`.
    """
    import soundfile

    name = name or _name(source, "audio")
    try:
        with _opened(source, name) as stream, soundfile.SoundFile(stream) as file:
            rate, parts, count = file.samplerate, [], 0
            if not RATES[0] <= rate <= RATES[1]:
                raise BadSample(name, f"its sample rate is {rate} Hz; rates are {RATES[0]:,} to {RATES[1]:,}")
            grows = max(1.0, sample_rate / rate)
            while count * grows <= MAX_SAMPLES:  # in parts: a header may claim any length
                parts.append(file.read(2**20, dtype="float32", always_2d=True))
                count += parts[-1].size
                if len(parts[-1]) < 2**20:
                    break
    except BadSample:
        raise
    except Exception as error:  # decoders of many formats
        raise _unreadable(name, "audio", error) from error
    if count * grows > MAX_SAMPLES:
        raise BadSample(name, f"it is longer than {MAX_SAMPLES:,} samples")
    return resample(waveform(_mono(np.concatenate(parts), name), name), rate, sample_rate)


def duration(source: Any, name: str | None = None) -> float:
    """Seconds of a clip, by its header. Raises BadSample."""
    import soundfile

    name = name or _name(source, "audio")
    try:
        with _opened(source, name) as stream:
            return soundfile.info(stream).duration
    except BadSample:
        raise
    except Exception as error:
        raise _unreadable(name, "audio", error) from error


def _mono(channels: np.ndarray, name: str) -> np.ndarray:
    """Samples x channels -> their mean, or the loudest channel where the mean is next to nothing."""
    mean = channels.mean(axis=1)
    energy = np.square(channels, dtype=np.float64).mean(axis=0) if channels.shape[1] > 1 and len(channels) else np.zeros(1)
    if not np.square(mean, dtype=np.float64).sum() < CANCELS * energy.mean() * len(channels):  # NaN is for `waveform`
        return mean
    if name not in cancelled:
        cancelled.add(name)
        if len(cancelled) in (1, 10, 100, 1000, 10_000, 100_000):
            print(f"channels cancel in their mean, one is taken: {len(cancelled)} clip(s) so far, now {name}")
    return channels[:, int(energy.argmax())]


def waveform(raw: Any, name: str = "audio") -> np.ndarray:
    """A mono clip in an array as float32: floats as they are, integers of up to 32 bits scaled from their range to [-1, 1].

    Raises BadSample: two-dimensional, empty, of another dtype (bool, complex, int64, ...), NaN, or far outside [-1, 1].
    """
    if isinstance(raw, (str, bytes, Mapping)) or not hasattr(raw, "__array__"):
        raise BadSample(name, f"a waveform is an array of numbers, got {type(raw).__name__}")
    array = np.asarray(raw)
    if array.ndim != 1:
        raise BadSample(name, f"a waveform has one dimension, got shape {array.shape}; mix its channels, e.g. raw.mean(axis=1)")
    if len(array) == 0:
        raise BadSample(name, "the waveform is empty")
    if array.dtype.kind in "iu" and array.dtype.itemsize <= 4:
        half = 2.0 ** (8 * array.dtype.itemsize - 1)
        array = ((array.astype(np.float64) - (half if array.dtype.kind == "u" else 0)) / half).astype(np.float32)
    elif array.dtype.kind != "f":
        raise BadSample(name, f"a waveform is float, or integer of at most 32 bits, got {array.dtype}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise BadSample(name, "it holds NaN or infinite samples")
    peak = float(np.abs(array).max())
    if peak > MAX_PEAK:
        raise BadSample(name, f"it peaks at {peak:.4g}, and a float waveform is in [-1, 1]; integers keep their dtype")
    return array


def _name(source: Any, kind: str) -> str:
    if isinstance(source, Mapping):
        return str(source.get("path") or kind)
    return str(source) if isinstance(source, (str, Path)) else kind


def _opened(source: Any, name: str) -> io.BufferedIOBase:
    """A source to read from: of a dataset's undecoded row its bytes, or where they lie. Raises BadSample, OSError."""
    if isinstance(source, Mapping):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, str) and "://" in source:  # of a streamed dataset
        import fsspec

        with fsspec.open(source, "rb") as file:
            return io.BytesIO(file.read())
    if isinstance(source, (str, Path)):
        if not Path(source).exists():
            raise BadSample(name, "file not found")
        return Path(source).open("rb")
    if isinstance(source, io.BytesIO):
        return io.BytesIO(source.getvalue())
    raise BadSample(name, "it is missing" if source is None else f"expected a file, got {type(source).__name__}")


def _unreadable(name: str, kind: str, error: Exception) -> Exception:
    """A decoder's error as a BadSample; one of the machine stays what it is."""
    if isinstance(error, OSError) and error.errno in MACHINE:
        return error
    reason = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error) or type(error).__name__
    return BadSample(name, f"it cannot be read as {kind}: {' '.join(str(reason).split())}")
