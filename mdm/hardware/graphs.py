"""CUDA graphs of sampling's forward passes.

A graph holds kernels and the addresses they read and write: inputs are copied to where it reads, its output is overwritten by
the next replay, and what it wrote elsewhere (kept keys and values) is written again. Python runs once, while it is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Recorder = Callable[[Callable[..., Tensor], list[Any]], tuple[Callable[[], None], Tensor]]
"""(function, its inputs) -> what replays it on those inputs' memory, and the output that a replay fills."""


def cuda_graph(function: Callable[..., Tensor], inputs: list[Any]) -> tuple[Callable[[], None], Tensor]:
    """The `Recorder` of a GPU. It first runs the function, so that what is made on first use (code, caches) is there."""
    current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        for _ in range(3):
            function(*inputs)
    current.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function(*inputs)
    return graph.replay, output


class Recorded:
    """A function of tensors (or None), recorded for each combination of shapes when that comes a second time.

    function: must not read a tensor's values in Python, nor keep its output; calling it twice must be calling it once
    The output is overwritten by the next call of the same shapes: use it before.
    """

    def __init__(self, function: Callable[..., Tensor], recorder: Recorder) -> None:
        self.function, self.recorder = function, recorder
        self.seen: dict[Any, tuple[list[Any], Callable[[], None], Tensor] | None] = {}

    def __call__(self, *inputs: Any) -> Tensor:
        if not all(x is None or isinstance(x, Tensor) for x in inputs):  # a FlexAttention mask: its blocks are not inputs
            return self.function(*inputs)
        key = tuple(x if x is None else (x.shape, x.dtype) for x in inputs)
        if key not in self.seen:  # rows leave a batch as they finish: many a shape comes only once
            self.seen[key] = None
            return self.function(*inputs)
        found = self.seen[key]
        if found is None:
            copies = [x if x is None else x.clone() for x in inputs]
            found = self.seen[key] = copies, *self.recorder(self.function, copies)
        own, replay, output = found
        for mine, given in zip(own, inputs, strict=True):
            if mine is not None:
                mine.copy_(given)
        replay()
        return output


def recorded(function: Callable[..., Tensor], recorder: Recorder | None) -> Callable[..., Tensor]:
    """The function, recorded where there is a recorder."""
    return function if recorder is None else Recorded(function, recorder)
