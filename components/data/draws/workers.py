"""Processes that prepare samples before they are drawn. What comes out, its order and its state are those without them.

workers = Workers(4)
prepared = workers.prepared("photos", samples, prepare)     # a Prepared whose samples are made ahead
workers.start()                                             # once all are known: the processes inherit them
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from components.data.bad import Refused
from components.data.draws.endless import AT_ONCE, Prepared, Rows

_inherited: dict[str, Prepared | Rows] = {}


class Workers:
    """So many processes, each with the sources as they were when it began."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._prepared: dict[str, Prepared | Rows] = {}
        self._pool: ProcessPoolExecutor | None = None

    def prepared(self, key: str, samples: Any, prepare: Callable[[Any], Any]) -> Ahead:
        """An indexable source whose samples they prepare. key: what it is called where a process ends"""
        self._prepared[key] = Prepared(samples, prepare)
        return Ahead(samples, prepare, self, key)

    def rows(self, key: str, dataset: Any, prepare: Callable[[Any], Any]) -> Callable[[list[tuple[Any, str]]], Task]:
        """The `begin` of a streamed source: its rows go to them as they lie there, to be decoded and prepared."""
        self._prepared[key] = Rows(dataset, prepare)
        return lambda rows: self.submit(key, rows)

    @property
    def needed(self) -> bool:
        """Whether there is a source whose samples they prepare."""
        return bool(self._prepared)

    def start(self) -> None:
        """Starts them: forked where that is how this system does it, so that nothing has to be pickled on the way there."""
        method = "fork" if sys.platform == "linux" else "spawn"
        context = multiprocessing.get_context(method)
        self._pool = ProcessPoolExecutor(self.count, context, _begin, (os.getpid(), self._prepared))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
            self._pool.submit(os.getpid).result()

    def submit(self, key: str, asked: Sequence[Any]) -> Task:
        """Begins to prepare samples of a source: their indices, or rows."""
        if self._pool is None:
            raise RuntimeError("workers: start() comes before anything is drawn")
        try:
            return Task(self._pool.submit(_made, key, list(asked)))
        except BrokenProcessPool as error:
            raise ended() from error


class Task:
    """Samples that are being prepared."""

    def __init__(self, future: Future[bytes]) -> None:
        self.future = future
        self._found: list[Any] | None = None

    def __getitem__(self, place: int) -> Any:
        """The one at a place, waited for. Raises Refused where it was, or where the process ended."""
        if self._found is None:
            self._found = self._waited_for()
        found = self._found[place]
        if isinstance(found, Refused):
            raise found
        return found

    def _waited_for(self) -> list[Any]:
        try:
            return pickle.loads(self.future.result())
        except BrokenProcessPool as error:
            raise ended() from error


def ended() -> Refused:
    """What is said of a worker that is gone; who draws names the stream."""
    why = "for want of memory, or by a decoder's fault"
    help_ = "fewer data_workers take less memory; with data_workers=0 samples are prepared in the run itself"
    return Refused(f"a process that prepares samples has ended, {why}; {help_}")


class Ahead(Prepared):
    """A source whose samples workers prepare, from when they are announced; one that was not is prepared here."""

    def __init__(self, samples: Any, prepare: Callable[[Any], Any], workers: Workers, key: str) -> None:
        super().__init__(samples, prepare)
        self.workers: Workers = workers
        self.key: str = key
        self._coming: dict[int, tuple[Task, int]] = {}

    def __getitem__(self, index: int) -> Any:
        task, place = self._coming.pop(index, (None, 0))
        return super().__getitem__(index) if task is None else task[place]

    def ahead(self, indices: Iterable[int]) -> None:
        new = [index for index in dict.fromkeys(indices) if index not in self._coming]
        for start in range(0, len(new), AT_ONCE):
            chunk = new[start : start + AT_ONCE]
            task = self.workers.submit(self.key, chunk)
            self._coming |= {index: (task, place) for place, index in enumerate(chunk)}


def _begin(parent: int, prepared: dict[str, Prepared | Rows]) -> None:
    """In a worker: one thread, deaf to the terminal's Ctrl-C (the run saves first), and gone when the run is."""
    _inherited.update(prepared)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(0)


class _Plain(pickle.Pickler):
    """Tensors as arrays: torch itself would share their memory, a file of it for each."""

    def reducer_override(self, obj: Any) -> Any:
        return (torch.from_numpy, (obj.numpy(),)) if isinstance(obj, torch.Tensor) else NotImplemented


def _made(key: str, asked: list[Any]) -> bytes:
    """In a worker: the samples, each as it would be drawn, or what refuses it."""
    found = []
    for which in asked:
        try:
            found.append(_inherited[key][which])
        except Refused as refused:
            found.append(refused)
    out = io.BytesIO()
    _Plain(out, protocol=5).dump(found)
    return out.getvalue()
