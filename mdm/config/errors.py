"""What a user can get wrong is said in one line, and ends with exit code 2."""

from __future__ import annotations

import contextlib
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components import files


class UserError(Exception):
    """A mistake that the user can mend: printed as one line, exit code 2."""


@contextlib.contextmanager
def one_line(where: str) -> Iterator[None]:
    """Around what reads files of others: what it raises, a library's panic too (no Exception), is a UserError of one line."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        said = files.in_one_line(error)
        plain = isinstance(error, (ValueError, FileNotFoundError, files.Unreachable))
        raise UserError(f"{where}: {said}" if plain else f"{where}: {type(error).__name__}: {said}") from error


def said(error: BaseException) -> str:
    """An error in a line: its kind, its first line, and where in the user's own files it was raised."""
    others = (str(Path(__file__).parents[2].resolve()), sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    own = [f for f in frames if not str(Path(f.filename).resolve()).startswith(others) and f.filename.endswith(".py")]
    where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{first_line(error)}{where}"


def first_line(error: BaseException) -> str:
    """Of what an error says; its name, where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def reason(error: BaseException) -> str:
    """The line of a long error that tells most: an errno, an exception's name, else the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    found = [line for line in lines if "Errno" in line or "No space" in line or "Error:" in line]
    return (found or lines or [type(error).__name__])[-1]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object, in UTF-8 (with a byte order mark or without). Raises UserError, naming the file."""
    try:
        return files.read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(files.in_one_line(error)) from error
