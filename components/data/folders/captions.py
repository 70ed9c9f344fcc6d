"""Which caption goes with which file of a folder: of a file beside it, of its own folder's name, or of a table.

    beside                  a.png, a.txt
    folder                  red_circle/a.png: "red circle"
    captions.csv            a.png,a red circle       (or tabs, or LJSpeech's a|a red circle; with names of columns, or without)

A caption is a string, or the path of the text file that holds it; None is no caption at all.
"""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import PureWindowsPath

from components.data.bad import BadSample
from components.data.folders.listing import SUFFIXES, Kind
from components.data.reading import NOT_FOUND, checked_text, read_text
from components.places import AT_START, AnyPath, exists, within

TABLES = (".csv", ".tsv", ".txt")
FILE_COLUMNS = ("file_name", "file", "filename", "image", "audio", "path", "image_path", "audio_path", "clip", "id", "name")
TEXT_COLUMNS = ("text", "caption", "transcript", "transcription", "sentence", "description", "prompt", "label", "title")
"""What the columns of a table may be called; the first that it has is taken."""

Caption = str | AnyPath | None


def spoken(name: str) -> str:
    """A name of a class or a folder as a caption: its underscores are spaces."""
    return name.replace("_", " ")


def captioned(
    root: AnyPath, files: Sequence[AnyPath], captions: str | None, columns: Mapping[str, str] | None = None
) -> list[tuple[AnyPath, Caption]]:
    """Samples of a folder: each a file and its caption.

    captions: beside, folder, None, or a table, its path from the folder; then a sample is a row, and its file may not be there
    columns:  of a table, what its {file: ..., text: ...} are called

    Raises ValueError for a table that is none, and for a name that is none of these.
    """
    if columns and (captions is None or PureWindowsPath(captions).suffix.lower() not in TABLES):
        raise ValueError(f"columns are of a table, and captions is {captions!r}")
    if captions is None:
        return [(file, None) for file in files]
    if captions == "beside":
        return [(file, file.with_suffix(".txt")) for file in files]
    if captions == "folder":
        if flat := next((file for file in files if file.parent == root), None):
            raise ValueError(f"captions: folder, and {flat.name} lies in none: in {root} there is a folder for each caption")
        return [(file, spoken(file.parent.name)) for file in files]
    if PureWindowsPath(captions).suffix.lower() not in TABLES:
        own = "; of a .jsonl make a Jsonl source" if captions.endswith(".jsonl") else ""
        raise ValueError(f"captions {captions!r} is not beside, folder, null or a table ({', '.join(TABLES)}){own}")
    table = root / captions
    if not exists(table, AT_START):
        raise ValueError(f"captions: there is no {captions} in {root}")
    places = _places(root, files)
    return [(_found(root, places, name), text) for name, text in _rows(table, columns or {})]


def read_caption(file: AnyPath, caption: str | AnyPath) -> str:
    """The caption of a file. Raises BadSample."""
    beside = not isinstance(caption, str)
    try:
        return checked_text(read_text(caption) if beside else caption, str(file)).strip()
    except BadSample as bad:
        if beside and bad.why == NOT_FOUND:
            raise BadSample(str(file), f"its caption {caption.name} is missing") from bad
        whose = f"its caption {caption.name}" if beside else "its caption"
        raise BadSample(str(file), f"{whose}: {bad.why}") from bad


def other_captions(root: AnyPath, found: Sequence[AnyPath]) -> str:
    """What `captions` may be, where there is none beside a file."""
    tables = [p.name for p in found if p.parent == root and p.suffix.lower() in (".csv", ".tsv")]
    return f"captions may also be {', '.join(tables) or 'a table (captions.csv)'}, folder (its name), or null for none"


def say_alone(
    root: AnyPath, kind: Kind, files: Sequence[AnyPath], found: Sequence[AnyPath], samples: Sequence[tuple[AnyPath, Caption]]
) -> None:
    """Prints how many captions are beside no file, and how many files have no row in a table."""
    if kind == "text" or not samples:
        return
    if samples[0][1] is not None and not isinstance(samples[0][1], str):
        beside = {caption for _, caption in samples}
        if alone := [p for p in found if p.suffix == ".txt" and p not in beside]:
            taken = f"{kind} file ({', '.join(SUFFIXES[kind])})"
            print(f"{root}: {len(alone)} caption(s) beside no {taken}, the first is {within(root, alone[0])}")
    named = {file for file, _ in samples}
    if alone := [p for p in files if p not in named]:
        print(f"{root}: {len(alone)} {kind} file(s) that the table does not name, the first is {within(root, alone[0])}")


def _rows(table: AnyPath, columns: Mapping[str, str]) -> list[tuple[str, str]]:
    """File and caption of each row. What parts the columns is the first of tab, | ; and comma in the file.

    Raises ValueError.
    """
    text = read_text(table)  # a BadSample is a ValueError
    first = next((line for line in text.splitlines() if line.strip()), "")
    mark = next((c for c in first if c in "\t|;,"), None)
    if mark is None:
        raise ValueError(f"{table}: its first line has one column ({first[:60]!r}); it needs a file and a text")
    quoting = csv.QUOTE_NONE if mark in "\t|" else csv.QUOTE_MINIMAL
    written = io.StringIO(text)  # whose lines end at \n alone: U+2028 and the like are of a caption
    lines = csv.reader(written, delimiter=mark, quoting=quoting, strict=True)
    try:
        rows = [row for row in lines if any(cell.strip() for cell in row)]
    except csv.Error as error:  # quotes that do not close, a cell of more than 131,072 characters
        raise ValueError(f"{table}, line {lines.line_num}: {error}; a quote in quotes is written twice") from error
    file, caption, header = _columns(table, [cell.strip() for cell in rows[0]], columns)
    own = [(row + [""] * (max(file, caption) + 1 - len(row))) for row in rows[1 if header else 0 :]]
    if not own:
        raise ValueError(f"{table} holds no row but the names of its columns")
    return [(row[file].strip(), row[caption].strip()) for row in own]


def _columns(table: AnyPath, first: list[str], named: Mapping[str, str]) -> tuple[int, int, bool]:
    """Places of the file and of the text, and whether the first row is the columns' names. Raises ValueError."""
    if unknown := set(named) - {"file", "text"}:
        raise ValueError(f"columns: {min(unknown)!r} is neither file nor text")
    lower = [cell.lower() for cell in first]
    for name in named.values():
        if name not in first:
            raise ValueError(f"{table} has no column {name!r}; it has {', '.join(first)}")
    place = {"file": FILE_COLUMNS, "text": TEXT_COLUMNS}
    found = {
        part: first.index(named[part]) if part in named else next((lower.index(n) for n in known if n in lower), None)
        for part, known in place.items()
    }
    if found["file"] is None and found["text"] is None:
        return 0, 1, False  # no names: what stands there is the first row
    for part, where in found.items():
        if where is None:
            raise ValueError(f"{table}: which of its columns is the {part}? Set columns: {{{part}: ...}} to one of {first}")
    return found["file"], found["text"], True  # pyright: ignore[reportReturnType] (neither is None)


def _places(root: AnyPath, files: Sequence[AnyPath]) -> dict[str, AnyPath | None]:
    """Files by their path from the folder, their name, and their name without its ending; None for several of one name.

    An accent is one character in the keys: some systems write it as two.
    """
    found: dict[str, AnyPath | None] = {}
    for key in (lambda f: f.stem, lambda f: f.name):
        own: dict[str, AnyPath | None] = {}
        for file in files:
            own[key(file)] = file if key(file) not in own else None
        found |= own
    for file in files:
        path = within(root, file)
        found |= {path.as_posix(): file, path.with_suffix("").as_posix(): file}
    return {unicodedata.normalize("NFC", key): file for key, file in found.items()}


def _found(root: AnyPath, places: Mapping[str, AnyPath | None], name: str) -> AnyPath:
    """The file that a table means."""
    name = PureWindowsPath(name).as_posix().removeprefix("./")
    key = unicodedata.normalize("NFC", name)
    return places.get(key) or places.get(key.rpartition("/")[2]) or root / name
