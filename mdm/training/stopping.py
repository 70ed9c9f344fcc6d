"""A signal ends a training where nothing is lost: after the step that is being done, and with a checkpoint.

with StopRequest() as stop:      the first SIGTERM or Ctrl-C asks for the end, a second one ends at once
    ...                          a step tells the other processes `stop.asked`, and all of them save and raise `Stopped`
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """Work that a signal has ended, and that was kept: printed as one line; the exit code is 128 + the signal's number."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.code = 128 + signum


class StopRequest:
    """signum: the signal that has asked for the end, while the `with` lasts; None so far. Only the main thread gets signals."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        return self.signum is not None

    def stopped(self, message: str) -> Stopped:
        """What is to be raised. Where another process was asked, it is as if it had been SIGTERM."""
        signum = self.signum or signal.SIGTERM
        return Stopped(f"stopped by {signal.Signals(signum).name} {message}", signum)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.signum = signum
        if os.environ.get("RANK", "0") != "0":  # one process speaks for all
            return
        with contextlib.suppress(RuntimeError):  # it came while stderr was written to
            print("\nmdm: stopping after this step, with a checkpoint; once more stops at once", file=sys.stderr, flush=True)
