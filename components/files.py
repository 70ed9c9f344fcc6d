"""Files that travel with a model or with data: what they say is checked before anything is done with it.

inside(folder, "text.tiktoken")     the path of a file that lies in the folder: no name leaves it
read_inside(folder, "0000.png")     its bytes, to be shown to others
read_json(path)                     a JSON object of a sensible size
in_one_line(error)                  what is wrong with one, for a message
"""

from __future__ import annotations

import json
from pathlib import Path, PureWindowsPath
from typing import Any

MAX_JSON = 2**28  # bytes: the index of a hundred million samples' shards is smaller
MAX_SHOWN = 2**26  # bytes of a picture or a clip in a page


class Unreachable(OSError):
    """A file system that does not answer, or does not let one in: nothing is wrong with what lies there."""


def inside(folder: str | Path, name: Any) -> Path:
    """The path of `name` in the folder. Raises ValueError for a name that leads out of it, on any system."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{folder}: {name!r} is no file name")
    windows = PureWindowsPath(name)  # splits at both slashes, and knows drives
    if windows.drive or windows.root or ".." in windows.parts or Path(name).is_absolute():
        raise ValueError(f"{folder}: the file name {name!r} leads out of the folder")
    return Path(folder) / name


def read_inside(folder: str | Path, name: Any) -> bytes:
    """The bytes of a file that lies in the folder, to be shown: where it is a link, what it links to lies there too.

    Raises ValueError for what leads out of it, is no file, or is larger than `MAX_SHOWN`; OSError where it cannot be read.
    """
    path = inside(folder, name)
    if not path.resolve().is_relative_to(Path(folder).resolve()):
        raise ValueError(f"{folder}: {name!r} is a link that leads out of the folder")
    if not path.is_file():
        raise ValueError(f"{folder}: {name!r} is not there")
    if path.stat().st_size > MAX_SHOWN:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than the {MAX_SHOWN:,} that are shown")
    return path.read_bytes()


def read_json(path: Any, max_bytes: int = MAX_JSON, content: bytes | None = None) -> dict[str, Any]:
    """The object of a JSON file. Raises FileNotFoundError, and ValueError that names the file where it holds none.

    content: of the file, where it was read before
    """
    content = _content(Path(path), max_bytes) if content is None else content
    try:
        found = json.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except ValueError as error:  # no JSON, no UTF-8, or a number of more digits than Python converts
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold keys and values, got {type(found).__name__}")
    return found


def _content(path: Path, max_bytes: int) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    if path.stat().st_size > max_bytes:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than the {max_bytes:,} that are read")
    return path.read_bytes()


def require(found: dict[str, Any], path: Any, **kinds: Any) -> None:
    """Raises ValueError, naming file and key, where a key is absent or its value not of its kind (a type, or several)."""
    for key, kind in kinds.items():
        if key not in found:
            raise ValueError(f"{path} has no {key!r}; it has {', '.join(map(str, found)) or 'nothing'}")
        value = found[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise ValueError(f"{path}: {key} must be {_spell(kind)}, got {short(value)}")


def in_one_line(said: Any) -> str:
    """An error, or any text, without a line break: white space of any kind is one space."""
    return " ".join(str(said).split())


def _spell(kind: Any) -> str:
    return " or ".join(k.__name__ for k in kind) if isinstance(kind, tuple) else kind.__name__


def short(value: Any) -> str:
    """A value of a file as a sentence cites it: on one line, of 60 characters at most."""
    text = in_one_line(repr(value))
    return text if len(text) <= 60 else text[:57] + "..."
