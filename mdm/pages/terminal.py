"""A text in a terminal while it is unmasked: drawn again in place at every step, what is masked as a dim block.

    drawing = Drawing(sys.stdout)
    drawing.show("a hand▒▒▒▒ten▒▒▒")      at every step, a text of any length: one that grows takes more lines
    drawing.finish("a handwritten seven")  and what stays

Nothing that a model writes steers the terminal: control characters are shown as signs.
"""

from __future__ import annotations

import os
import shutil
import time
import unicodedata
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from mdm.pages.film import MASK_SIGN

PAUSE = 1 / 30  # seconds between two drawings: more are not seen, and a slow line would fall behind
DIM, BRIGHT, CLEAR_LINE, CLEAR_BELOW = "\x1b[2m", "\x1b[22m", "\x1b[K", "\x1b[J"


@runtime_checkable
class Output(Protocol):
    """What is written to: sys.stdout, or what stands in its place."""

    def write(self, text: str, /) -> Any: ...
    def flush(self) -> None: ...
    def isatty(self) -> bool: ...


def is_live(out: Output) -> bool:
    """Whether what is written there can be drawn over: a terminal that knows how to."""
    return out.isatty() and os.environ.get("TERM") != "dumb"


class Drawing:
    """Lines that are drawn over. Of a text with more of them than the terminal has, the last are shown until it is finished.

    size: columns and lines of the terminal, asked at every drawing
    """

    def __init__(self, out: Output, size: Callable[[], os.terminal_size] = shutil.get_terminal_size) -> None:
        self.out, self.size = out, size
        self.rows = 0  # above the cursor, of what is drawn
        self.drawn = -PAUSE

    def show(self, text: str) -> None:
        """The text as it is now; left out where another was shown a moment ago."""
        if time.monotonic() - self.drawn < PAUSE:
            return
        columns, lines = self.size()
        shown = wrapped(printable(text), columns)[1 - lines :]
        blocks = [line.replace(MASK_SIGN, f"{DIM}{MASK_SIGN}{BRIGHT}").replace(BRIGHT + DIM, "") for line in shown]
        # a line is cleared before it is written: behind one as wide as the terminal, its last character would go
        self.out.write(self._top() + "\n".join(CLEAR_LINE + line for line in blocks) + CLEAR_BELOW)
        self.out.flush()
        self.rows, self.drawn = len(shown) - 1, time.monotonic()

    def clear(self) -> None:
        """Takes away what is drawn."""
        self.out.write(self._top() + CLEAR_BELOW)
        self.out.flush()
        self.rows, self.drawn = 0, -PAUSE

    def finish(self, text: str) -> None:
        """The whole text in place of what is drawn, and a new line."""
        self.clear()
        self.out.write(f"{printable(text)}\n")
        self.out.flush()

    def leave(self) -> None:
        """What is drawn stays, and a new line."""
        self.out.write("\n")
        self.out.flush()
        self.rows, self.drawn = 0, -PAUSE

    def _top(self) -> str:
        return "\r" + (f"\x1b[{self.rows}A" if self.rows else "")


def printable(text: str) -> str:
    """A text without characters that steer a terminal; tabs are blanks."""
    plain = text.replace("\r\n", "\n").expandtabs(4)
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") and c != "\n" else c for c in plain)


def wrapped(text: str, columns: int) -> list[str]:
    """The lines that a terminal of that width breaks a text into."""
    lines = []
    for line in text.split("\n"):
        start, wide = 0, 0
        for at, c in enumerate(line):
            own = cells(c)
            if wide + own > columns and at > start:
                lines.append(line[start:at])
                start, wide = at, 0
            wide += own
        lines.append(line[start:])
    return lines


def cells(character: str) -> int:
    """Columns that a character takes: two of the wide ones of East Asia and emoji, none of marks on the one before."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1
