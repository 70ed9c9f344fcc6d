"""The data pipeline against what training consumes: the quickstart's mix, masked and batched, with nobody waiting for it.

Both are measured in one run: the loader alone, and training steps on its batches, on the same machine. With `--ranks` instead
what one rank of many pays for its own rows (ranks.py).
"""

from __future__ import annotations

import tempfile

from mdm.config import UserError, find_config, load
from mdm.data.pipeline import next_step
from mdm.hardware import hardware
from mdm.recipe import load_recipe

from .measure import Result, interleaved, rows
from .ranks import run_ranks

PRESETS = {
    "smoke": {"steps": 2, "voices": 1, "warmup": 1, "repeats": 2},
    "cpu": {"steps": 10, "voices": None, "warmup": 1, "repeats": 5},
    "gpu": {"steps": 50, "voices": None, "warmup": 2, "repeats": 10},
}


RANKS = {
    "smoke": {"documents": 512, "steps": 4, "repeats": 2},
    "cpu": {"documents": 65_536, "steps": 20, "repeats": 5},
    "gpu": {"documents": 65_536, "steps": 20, "repeats": 10},
}


def counted(ranks: str) -> list[int]:
    """Numbers of ranks: "1,8,64". Raises UserError."""
    try:
        found = [int(number) for number in ranks.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise UserError(f"--ranks {ranks}: numbers of ranks with commas between, e.g. 1,8,64,512")
    return found


def run(preset: str, ranks: str | None = None) -> Result:
    p = PRESETS[preset]
    if ranks is not None:
        return run_ranks(preset, RANKS[preset], counted(ranks))
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
