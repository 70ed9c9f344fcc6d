"""How a run's time and memory are used: the share of the peak (MFU), the most memory, and what steps waited for."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from components.types import PAD_DOCUMENT
from components.vocabulary import Vocabulary
from mdm.data.pipeline import MicroBatch
from mdm.hardware import Hardware
from mdm.training.planner import peak_tflops

T = TypeVar("T")
Flops = Callable[[float, float, float], float]
"""(tokens, pairs of tokens of which one attends to the other, logits) -> training FLOPs: `MaskedDiffusionModel.flops`."""


class Meter:
    """What a line of the history says of the time since the last one.

    data_seconds          how long the slowest process waited for batches
    checkpoint_seconds    how long for checkpoints: while weights were copied, or an earlier one was still being written
    memory_gib            the most that a process had: allocated on its GPU since the last line, or resident at any time
    mfu                   the model's FLOPs (no padding, no recomputation) over the GPUs' peak; null where that is not known
    """

    def __init__(self, hw: Hardware, vocabulary: Vocabulary | None = None, flops: Flops | None = None) -> None:
        self.hw, self.vocabulary, self.peak = hw, vocabulary, peak_tflops()
        self.flops = None if self.peak is None else flops
        self._reset()

    def _reset(self) -> None:
        self.waited = {"data_seconds": 0.0, "checkpoint_seconds": 0.0}
        self.work = torch.zeros(3, dtype=torch.float64)
        if self.hw.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.hw.device)

    def waits(self, steps: Iterator[T]) -> Iterator[T]:
        """The same steps; how long each is waited for is counted."""
        while True:
            with self.waiting("data_seconds"):
                step = next(steps, None)
            if step is None:
                return
            yield step

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Counts the time as one of waiting: data_seconds or checkpoint_seconds."""
        started = time.perf_counter()
        yield
        self.waited[what] += time.perf_counter() - started

    def count(self, micro: MicroBatch) -> None:
        """A micro-batch's work, where the peak is known that it is held against."""
        if self.flops is not None and self.vocabulary is not None:
            self.work += torch.tensor(work(micro, self.vocabulary), dtype=torch.float64)

    def line(self, seconds: float) -> dict[str, Any]:
        """What is to be written down; `seconds` of steps have gone by. All ranks take part."""
        own = [memory_gib(self.hw), *self.waited.values()]
        most = [max(values) for values in zip(*self.hw.gather([own]), strict=True)]
        done = self.hw.sum(self.work).tolist()
        peak = (self.peak or 0) * 1e12 * self.hw.world_size
        mfu = None if self.flops is None else self.flops(*done) / seconds / peak
        line = {"mfu": mfu, "memory_gib": most[0], **dict(zip(self.waited, most[1:], strict=True))}
        self._reset()
        return line


def work(micro: MicroBatch, vocabulary: Vocabulary) -> tuple[int, int, int]:
    """Tokens of a micro-batch, pairs of them of which one attends to the other, and logits that its loss makes.

    Of blocks those are the tokens of both copies, which the model computes; the horizon counts the data's.
    """
    document, tokens = micro.noisy.clean.document, micro.num_tokens
    if micro.rows is not None:
        tokens, pairs = int((micro.rows.places.document != PAD_DOCUMENT).sum()), micro.rows.pairs
    elif micro.whole_rows:
        pairs = document.numel() * document.shape[1]
    else:
        row = torch.arange(len(document))[:, None].expand_as(document)
        own = document != PAD_DOCUMENT
        pairs = int((torch.stack([row[own], document[own]]).unique(dim=1, return_counts=True)[1] ** 2).sum())
    logits = sum(len(p.index) * vocabulary.ranges[p.range_index].size for p in micro.positions)
    return tokens, pairs, logits


def memory_gib(hw: Hardware) -> float:
    """The most memory that this process had, in GiB."""
    if hw.device.type == "cuda":
        return torch.cuda.max_memory_allocated(hw.device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
