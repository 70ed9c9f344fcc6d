"""A progress bar that leaves what is printed meanwhile on lines of its own, and that moves while nothing is finished.

    with Bar(total=100, desc="training") as bar:       tqdm's own arguments
        print("a line of its own, above the bar")
        bar.update()

    with working("compiling"):                         a clock, where there is nothing to count; not shown for the first second

While a bar is open, lines written to stdout and stderr go above it, and its clock is drawn anew every BEAT seconds.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

BEAT = 5.0  # seconds


if TYPE_CHECKING:
    _Tqdm = tqdm[Any]
else:
    _Tqdm = tqdm  # generic for its types alone


class Bar(_Tqdm):
    """tqdm's bar, as above. It writes to the stderr of when it was opened."""

    last_print_t: float

    _drawn = 0.0

    def __init__(self, *args: Any, **options: Any) -> None:
        file = options.pop("file", None) or sys.stderr
        options["disable"] = options.get("disable", False) or file is None
        super().__init__(*args, file=file.stream if isinstance(file, _Above) else file, **{"dynamic_ncols": True, **options})
        if not self.disable:
            _opened(self)

    def close(self) -> None:
        _closed(self)
        super().close()

    def beat(self) -> None:
        """Draws the clock anew, where nothing else has drawn the bar of late."""
        if self.due() and time.time() - max(self.last_print_t, self._drawn) >= min(BEAT, self.delay or BEAT):
            self.refresh()

    def due(self) -> bool:
        """Whether it is to be seen already."""
        return time.time() - self.start_t >= self.delay

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> None:
        """Draws it now; what has been drawn is cleared when it is closed."""
        if self.disable:
            return
        self._drawn = time.time()
        if self.delay:
            self.last_print_t = self._drawn
        with contextlib.nullcontext() if nolock else self.get_lock():  # which tqdm keeps where a pipe is broken: others hang
            super().refresh(nolock=True)


class _Above:
    """A stream whose lines are written above the open bars. What draws its own line (a carriage return) is left alone."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.kept = stream, ""

    def write(self, text: str) -> int:
        if "\r" in text:
            self.stream.write(text)
            return len(text)
        with tqdm.get_lock():
            lines, end, self.kept = (self.kept + text).rpartition("\n")
            if end:
                self._write(lines + end)
        return len(text)

    def _write(self, text: str) -> None:
        shown = [bar for bar in list(_open) if bar.due()]
        for bar in shown:
            bar.clear(nolock=True)
        self.stream.write(text)
        self.stream.flush()
        for bar in shown:
            bar.refresh(nolock=True)

    def flush(self) -> None:
        self.stream.flush()

    def finish(self) -> None:
        """Writes what has no end of line yet, with one."""
        kept, self.kept = self.kept, ""
        if kept:
            self._write(f"{kept}\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


_open: weakref.WeakSet[Bar] = weakref.WeakSet()
_any = threading.Event()
_beating: threading.Thread | None = None


def _opened(bar: Bar) -> None:
    global _beating
    with tqdm.get_lock():
        _open.add(bar)
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is not None and not isinstance(stream, _Above):
                setattr(sys, name, _Above(stream))
    _any.set()
    if _beating is None or not _beating.is_alive():  # it is not, in a process that was forked
        _beating = threading.Thread(target=_beat, daemon=True, name="progress bars")
        _beating.start()


def _closed(bar: Bar) -> None:
    with tqdm.get_lock():
        if any(other is not bar for other in list(_open)):
            _open.discard(bar)
            return
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if isinstance(stream, _Above):
                setattr(sys, name, stream.stream)
                with contextlib.suppress(ValueError):  # it has been closed
                    stream.finish()
        _open.discard(bar)
        _any.clear()


def _beat() -> None:
    while _any.wait():
        time.sleep(min(BEAT, 1.0))
        with contextlib.suppress(Exception):  # a stream that was closed
            for bar in list(_open):
                bar.beat()


@contextlib.contextmanager
def working(what: str, shown: bool = True) -> Iterator[Bar]:
    """Shows a clock beside what is being done; nothing where that takes less than a second."""
    with Bar(desc=what, bar_format="{desc}: {elapsed}", leave=False, delay=1.0, disable=not shown) as bar:
        yield bar
