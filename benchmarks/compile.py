"""What torch.compile gains in a training step and a forward pass, how long it takes, and whether it has to do it again.

The masks differ from step to step, and so does the number of masked positions: `recompilations` counts what that costs.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch._dynamo.utils import counters

from components.vocabulary import Vocabulary
from mdm.config import UserError
from mdm.hardware import Hardware, can_compile, fast_bf16

from .measure import Result, interleaved, rows
from .train import build, masked_only, random_batch, ways

PRESETS = {
    "smoke": {"width": 64, "num_layers": 2, "vocab": 500, "length": 64, "rows": 8, "warmup": 1, "repeats": 3},
    "cpu": {"width": 192, "num_layers": 4, "vocab": 2_000, "length": 77, "rows": 50, "warmup": 2, "repeats": 9},
    "gpu": {"width": 1024, "num_layers": 12, "vocab": 50_000, "length": 1024, "rows": 16, "warmup": 5, "repeats": 20},
}


def run(preset: str) -> Result:
    p = PRESETS[preset]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not can_compile(device):
        raise UserError("compile: there is no C++ compiler here, so nothing to compare")
    hw = Hardware(device, 0, 1, fast_bf16(device.type == "cuda"))
    vocabulary = Vocabulary.build({"text": (p["vocab"],)}, ["text"], tasks=("text",))
    batches = [random_batch(vocabulary, p["rows"], p["length"], device, seed=seed)[0] for seed in range(10)]
    models = ways(build(vocabulary, p, device), device)

    def forward(model: Any) -> Any:
        def call() -> None:
            with torch.no_grad(), hw.autocast():
                model.hidden(batches[0].noisy.noisy)

        return call

    groups = {
        "training step": {name: masked_only(model, batches[0], vocabulary, hw) for name, model in models.items()},
        "forward": {name: forward(model) for name, model in models.items()},
    }
    seconds = {}
    compiler: Any = torch.compiler.config  # a module whose `patch` is put there as it loads
    for group, variants in groups.items():
        started = time.perf_counter()
        with compiler.patch(force_disable_caches=True):  # what an earlier run compiled does not count
            variants["compiled"]()
        seconds[group] = time.perf_counter() - started
    before = counters["stats"]["unique_graphs"]
    for micro in batches:
        masked_only(models["compiled"], micro, vocabulary, hw)()
    recompiled = counters["stats"]["unique_graphs"] - before
    found, speedup = [], {}
    for group, variants in groups.items():
        timings = interleaved(variants, p["warmup"], p["repeats"])
        found += rows(timings, p["rows"] * p["length"], {"compiled": {"compile s": seconds[group]}}, group)
        speedup[f"{group.replace(' ', '_')}_speedup"] = found[-1].ratio
    figures = {
        **speedup,
        "masked_counts": float(len({int(b.noisy.mask.sum()) for b in batches})),
        "recompilations": float(recompiled),
        "graph_breaks": float(sum(counters["graph_break"].values())),
    }
    return Result("compile", preset, "tokens/s", p, found, figures)
