"""A profile of a few steps: `output_dir/profile/*.json`, for chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mdm.config import UserError
from mdm.hardware import Hardware


@dataclass
class ProfileSettings:
    """start: steps from the start of this process that are done before; steps: how many are written down"""

    start: int = 10
    steps: int = 3

    def check(self) -> None:
        """Raises UserError."""
        for name in ("start", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"profile.{name} must be at least 1, got {getattr(self, name)}")


@contextlib.contextmanager
def profiled(settings: ProfileSettings | None, folder: Path, hw: Hardware) -> Iterator[Callable[[], None]]:
    """What is to be called after each step. The main process alone writes: `folder/steps_START_to_LAST.json`."""
    if settings is None or not hw.main:
        yield lambda: None
        return
    done, first, last = 0, settings.start + 1, settings.start + settings.steps

    def written(profiler: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        trace = folder / f"steps_{first}_to_{last}.json"
        profiler.export_chrome_trace(str(trace))
        print(f"A profile of steps {first} to {last} of this process is in {trace}", flush=True)

    activities = [torch.profiler.ProfilerActivity.CPU]
    if hw.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    plan = torch.profiler.schedule(wait=settings.start - 1, warmup=1, active=settings.steps, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=plan, on_trace_ready=written, record_shapes=True) as profiler:

        def stepped() -> None:
            nonlocal done
            done += 1
            profiler.step()

        yield stepped
    if done < last:
        print(f"profile: steps {first} to {last} were asked for, and this process has done {done:,}", flush=True)
