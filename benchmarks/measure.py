"""How everything here is measured: warm-up, then repeats of each variant in turn, median and spread.

A suite returns a `Result`: rows of one table, headline figures, and what it was measured on.
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from components.progress import Bar
from mdm.hardware import cpu_name


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, fastest and slowest of the repeats."""

    median: float
    fastest: float
    slowest: float

    @property
    def spread(self) -> float:
        """Slowest minus fastest, over the median."""
        return (self.slowest - self.fastest) / self.median


NOISY = 0.5  # a spread above which a median of so few repeats says little


@dataclass
class Row:
    """A variant: how much work a second (in the result's unit), against the first row of its group; further figures by name.

    group: what the variants do that are compared with each other; empty where a suite compares all of them
    """

    variant: str
    rate: float
    ratio: float
    timing: Timing
    more: dict[str, float] = field(default_factory=dict)
    group: str = ""

    @property
    def noisy(self) -> bool:
        """Whether its repeats differ too much for its rate to be read."""
        return self.timing.spread > NOISY


def unreadable(rows: Sequence[Row]) -> set[tuple[str, str]]:
    """Group and variant of what is not to be read: its repeats, or those of the first of its group, differ too much."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.group, row)
    return {(row.group, row.variant) for row in rows if row.noisy or first[row.group].noisy}


@dataclass
class Result:
    """What a suite measured.

    unit:     of the rates, e.g. tokens/s
    figures:  headline numbers by name
    unmeasured: what this machine could not measure, and why
    """

    suite: str
    preset: str
    unit: str
    settings: dict[str, Any]
    rows: list[Row]
    figures: dict[str, Any] = field(default_factory=dict)
    unmeasured: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """JSON with the machine beside the figures, and the rows as a plot of the same name."""
        path.parent.mkdir(parents=True, exist_ok=True)
        noisy = [": ".join(filter(None, of)) for of in sorted(unreadable(self.rows))]
        rows = {"too_noisy": noisy, "machine": machine()}
        path.write_text(json.dumps({**self.figures, **asdict(self), **rows}, indent=1))
        plot(self, path.with_suffix(".png"))


def interleaved(variants: Mapping[str, Callable[[], object]], warmup: int, repeats: int) -> dict[str, Timing]:
    """Times each variant `repeats` times, taking turns, so that a drift of the machine meets all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with Bar(total=(warmup + repeats) * len(variants), leave=False) as bar:
        for name, call in variants.items():
            bar.set_description(f"warming up: {name}")
            for _ in range(warmup):
                call()
                bar.update()
        for _ in range(repeats):
            for name, call in variants.items():
                bar.set_description(f"measuring: {name}")
                seconds[name].append(timed(call))
                bar.update()
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in seconds.items()}


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call, with what it has left to a GPU."""
    _wait()
    started = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - started


def rows(
    timings: Mapping[str, Timing],
    work: float | Mapping[str, float],
    more: Mapping[str, Mapping[str, float]] | None = None,
    group: str = "",
) -> list[Row]:
    """The rows of a group: `work` done by one call (of each variant), ratios against the first."""
    rates = {name: (work if isinstance(work, (int, float)) else work[name]) / t.median for name, t in timings.items()}
    first = next(iter(rates.values()))
    found = more or {}
    return [Row(name, rates[name], rates[name] / first, t, dict(found.get(name, {})), group) for name, t in timings.items()]


def peak_memory(call: Callable[[], object]) -> float:
    """GiB that a call holds at the most on a GPU; 0 without one."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call()
    _wait()
    return torch.cuda.max_memory_allocated() / 2**30


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, str | int]:
    """Hardware and versions, to stand beside every figure."""
    import torchao

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "cpu": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "torchao": torchao.__version__,
        "python": platform.python_version(),
    }


def table(result: Result) -> str:
    """The rows as a terminal shows them."""
    more = list(dict.fromkeys(key for row in result.rows for key in row.more))
    width = max(len(row.variant) for row in result.rows) + 2
    noisy = unreadable(result.rows)
    lines = [f"{'variant':<{width}}{result.unit:>14}{'ratio':>9}{'spread':>9}" + "".join(f"  {key:>12}" for key in more)]
    group = ""
    for row in result.rows:
        if row.group != group:
            group = row.group
            lines += [f"-- {group}"]
        extra = "".join(f"  {row.more[key]:>12.4g}" if key in row.more else " " * 14 for key in more)
        mark = "~" if (row.group, row.variant) in noisy else " "
        lines.append(f"{row.variant:<{width}}{row.rate:>14,.1f}{mark}{row.ratio:>7.2f}x{row.timing.spread:>8.0%}{extra}")
    lines += [f"{name}: {value:.4g}" for name, value in result.figures.items() if not isinstance(value, dict)]
    if noisy:
        lines.append(f"~ too noisy to read: its repeats, or those of the first of its group, spread by more than {NOISY:.0%}")
    lines += [f"not measured: {what}" for what in result.unmeasured]
    return "\n".join(lines)


def plot(result: Result, path: Path) -> None:
    """A bar for each row, its whisker from the slowest to the fastest repeat; an axis for each group."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    noisy = unreadable(result.rows)
    groups = [list(own) for _, own in itertools.groupby(result.rows, key=lambda row: row.group)]
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(7, 0.45 * len(result.rows) + len(groups)), squeeze=False,
        height_ratios=[len(own) for own in groups], layout="constrained",
    )  # fmt: skip
    for axis, own in zip(axes[:, 0], groups, strict=True):
        for place, row in enumerate(reversed(own)):
            work = row.rate * row.timing.median
            low, high = row.rate - work / row.timing.slowest, work / row.timing.fastest - row.rate
            axis.barh(
                place, row.rate, xerr=[[max(low, 0)], [max(high, 0)]], color="C0" if row is not own[0] else "0.6", capsize=3
            )
            mark = " (too noisy to read)" if (row.group, row.variant) in noisy else ""
            axis.annotate(f" {row.ratio:.2f}x{mark}", (row.rate + high, place), va="center", fontsize=9)
        axis.set_yticks(range(len(own)), [row.variant for row in reversed(own)])
        axis.set_title(own[0].group, fontsize=10, loc="left")
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel(result.unit)
    here = machine()
    figure.suptitle(f"{result.suite}, preset {result.preset}: {here['cpu'] if here['gpu'] == 'none' else here['gpu']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
