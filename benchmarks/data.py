"""The data pipeline against what training consumes: the quickstart's mix, masked and batched, with nobody waiting for it.

Both are measured in one run: the loader alone, and training steps on its batches, on the same machine.
"""

from __future__ import annotations

import tempfile

from benchmarks.measure import Result, interleaved, rows
from mdm.config import find_config, load
from mdm.data.pipeline import next_step
from mdm.hardware import hardware
from mdm.recipe import load_recipe

PRESETS = {
    "smoke": {"steps": 2, "voices": 1, "warmup": 1, "repeats": 2},
    "cpu": {"steps": 10, "voices": None, "warmup": 1, "repeats": 5},
    "gpu": {"steps": 50, "voices": None, "warmup": 2, "repeats": 10},
}


def run(preset: str) -> Result:
    p = PRESETS[preset]
    recipe = load_recipe("pretrain")
    with tempfile.TemporaryDirectory() as folder, hardware("auto", "auto") as hw:
        overrides = [f"output_dir={folder}"]
        if p["voices"] is not None:
            overrides += [f"data.speech.{part}.voices={p['voices']}" for part in ("train", "validation")]
        cfg = load(recipe.Settings, find_config("pretrain"), overrides)
        recipe.validate(cfg)
        run = recipe.Pretrain(cfg, hw)
        seen = {"training": 0.0, "loader": 0.0}
        batches = iter(run.loader)
        ready = [next_step(batches) for _ in range(p["steps"])]

        def train() -> None:  # on batches made before, so that nothing waits
            seen["training"] = float(sum(run.step(micros) for micros in ready))

        def make() -> None:
            seen["loader"] = float(sum(m.num_tokens for _ in range(p["steps"]) for m in next_step(batches)))

        timings = interleaved({"training": train, "loader": make}, p["warmup"], p["repeats"])
        names = {"training": "training consumes", "loader": "the loader delivers"}
        found = rows({names[k]: t for k, t in timings.items()}, {names[k]: s for k, s in seen.items()})
        run.loader.root._it._shutdown()  # the thread that prefetches: it would outlive the interpreter
    figures = {"loader_over_training": found[1].ratio}
    return Result("data", preset, "tokens/s", p, found, figures)
