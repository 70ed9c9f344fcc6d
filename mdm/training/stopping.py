"""A signal ends a training where nothing is lost: after the step that is being done, and with a checkpoint.

with StopRequest() as stop:      the first Ctrl-C, SIGTERM or SIGUSR1 asks for the end, a second Ctrl-C ends at once
    ...                          processes add up `stop.votes` in a step; if they have `agreed`, all of them save and leave

SIGUSR1 is what a scheduler sends some time before it takes a machine back (SLURM's --signal); it ends a run as SIGTERM does.
Either may come several times, as schedulers send it to a launcher and its processes alike, and the launcher passes it on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """Work that a signal has ended, and that was kept: printed as one line; the exit code is 130 for Ctrl-C, and else 143."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.code = 128 + (signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM)


class StopRequest:
    """signum: the signal that has asked for the end, while the `with` lasts; None so far. Only the main thread gets signals.

    asked: whether it has come to all processes, so that all of them end after the same step
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.asked = False
        self._before: dict[int, Any] = {}

    @property
    def votes(self) -> list[float]:
        """One for the signal that came to this process: numbers that are to be added up over all of them."""
        return [float(self.signum == number) for number in SIGNALS]

    def agreed(self, votes: Sequence[float]) -> None:
        """Takes note of the votes of all processes: if signals of several kinds have come, all say the last of SIGNALS."""
        for number, count in zip(SIGNALS, votes, strict=True):
            if count > 0:
                self.asked, self.signum = True, number

    def stopped(self, step: int, saved: object) -> Stopped:
        """What is to be raised when everything until a step is saved somewhere."""
        signum = self.signum or signal.SIGTERM
        where = f"at step {step:,}: saved as {saved}; the same command goes on from there"
        return Stopped(f"stopped by {signal.Signals(signum).name} {where}", signum)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.signum = signum
        if os.environ.get("RANK", "0") != "0":  # one process speaks for all
            return
        with contextlib.suppress(RuntimeError):  # it came while stderr was written to
            said = "stopping after this step, with a checkpoint; Ctrl-C once more stops at once"
            print(f"\nmdm: {said}", file=sys.stderr, flush=True)
