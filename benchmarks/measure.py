"""How everything here is measured: warm-up, then repeats of each variant in turn, median and spread."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

from mdm.hardware import cpu_name


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, fastest and slowest of the repeats."""

    median: float
    fastest: float
    slowest: float


def interleaved(variants: Mapping[str, Callable[[], object]], warmup: int, repeats: int) -> dict[str, Timing]:
    """Times each variant `repeats` times, taking turns, so that a drift of the machine meets all of them alike."""
    for call in variants.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, call in variants.items():
            _wait()
            started = time.perf_counter()
            call()
            _wait()
            seconds[name].append(time.perf_counter() - started)
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, str | int]:
    """Hardware and versions, to stand beside every figure."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def as_dict(timings: Mapping[str, Timing]) -> dict[str, dict[str, float]]:
    return {name: asdict(t) for name, t in timings.items()}
