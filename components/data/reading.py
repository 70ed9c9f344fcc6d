"""What users bring: a source is opened here and lines and text are read; images.py and clips.py read images and audio.

    json_lines(path)    numbered values of a JSONL file; records end at \\n or \\r\\n alone
    read_text(path)     UTF-8, or UTF-16 and UTF-32 that say so by a byte order mark (which is dropped)

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

from upath import UPath

from components.copies import fetched
from components.data.bad import MACHINE, BadSample
from components.files import Unreachable, in_one_line
from components.places import AnyPath, place, read_bytes

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


NOT_FOUND = "file not found"


def read_text(path: str | AnyPath) -> str:
    """A text file, each of its line ends as \\n. Raises BadSample."""
    name = str(path)
    try:
        with opened(path, name) as file:
            data = file.read()
    except OSError as error:
        raise unreadable(name, "text", error) from error
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


def json_lines(path: str | AnyPath) -> Iterator[tuple[int, Any]]:
    """The values of a JSONL file with the numbers of their lines, from 1; each that is none as a BadSample in its place.

    A record ends at \\n or \\r\\n and nowhere else: U+2028, U+0085 and the like may stand inside a string. Empty lines are left
    out. Raises OSError where the file cannot be opened.
    """
    with fetched(path).open("rb") as file:
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


def name_for(source: Any, kind: str) -> str:
    """What a source is called in a BadSample: its path, or what kind of thing it is."""
    if isinstance(source, Mapping):
        return str(source.get("path") or kind)
    return str(source) if isinstance(source, (str, Path, UPath)) else kind


def opened(source: Any, name: str) -> io.BufferedReader | io.BytesIO:
    """A source to read from: of a dataset's undecoded row its bytes, or where they lie. Raises BadSample, OSError."""
    if isinstance(source, Mapping):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, (str, Path, UPath)):
        try:
            at = place(source)
            return at.open("rb") if isinstance(at, Path) else io.BytesIO(read_bytes(at))
        except FileNotFoundError as error:
            raise BadSample(name, NOT_FOUND) from error
    if isinstance(source, io.BytesIO):
        return io.BytesIO(source.getvalue())
    raise BadSample(name, "it is missing" if source is None else f"expected a file, got {type(source).__name__}")


def unreadable(name: str, kind: str, error: Exception) -> Exception:
    """A decoder's error as a BadSample; one of the machine stays what it is."""
    if isinstance(error, Unreachable) or (isinstance(error, OSError) and error.errno in MACHINE):
        return error
    reason = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error) or type(error).__name__
    return BadSample(name, f"it cannot be read as {kind}: {in_one_line(reason)}")
