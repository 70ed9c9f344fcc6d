"""How long a checkpoint stops the steps: written while they wait, or copied and written behind them.

The model takes a step before each, so that every tensor has changed; what is written behind is waited for before the next.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from pathlib import Path

import torch
from torch.distributed.checkpoint import state_dict_saver

from components.progress import Bar
from mdm.hardware import Hardware
from mdm.models import builders
from mdm.training import storage
from mdm.training.checkpoint import Checkpoints, tensors

from .measure import Result, Timing, rows, timed

PRESETS = {
    "smoke": {"width": 64, "num_layers": 2, "vocab": 1_000, "repeats": 2},
    "cpu": {"width": 640, "num_layers": 8, "vocab": 8_192, "repeats": 7},
    "gpu": {"width": 2048, "num_layers": 16, "vocab": 32_768, "repeats": 7},
}


def run(preset: str) -> Result:
    p = PRESETS[preset]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hw = Hardware(device, 0, 1, False)
    model = builders.model(p["vocab"], 128, p["width"], p["num_layers"], p["width"] // 64).to(device)
    model.init_weights(torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(p["vocab"], (4, 64), generator=torch.Generator().manual_seed(0)).to(device)
    seconds: dict[str, list[float]] = {"dcp.save": [], "Checkpoints.save": []}
    steps: dict[str, list[float]] = {"alone": [], "while a checkpoint is written": []}

    def step(kind: str) -> None:
        steps[kind].append(timed(lambda: one_step(model, optimizer, tokens)))

    with tempfile.TemporaryDirectory() as scratch, Bar(total=p["repeats"] + 1, leave=False) as bar:
        folder = Path(scratch)
        with Checkpoints(folder / "behind", hw) as checkpoints:
            for i in range(p["repeats"] + 1):
                step("alone")
                at = folder / "before" / f"step_{i}"
                state = tensors(model, optimizer, None)
                took = timed(lambda s=state, a=at: state_dict_saver.save(s, storage_writer=storage.writer(a), no_dist=True))
                seconds["dcp.save"].append(took)
                shutil.rmtree(at)
                step("alone")
                took = timed(lambda i=i: checkpoints.save(i, model, optimizer, None, {"step": i}))
                seconds["Checkpoints.save"].append(took)
                step("while a checkpoint is written")
                checkpoints.wait()
                bar.update()
    timings = {name: Timing(statistics.median(s[1:]), min(s[1:]), max(s[1:])) for name, s in seconds.items()}  # 1: warm-up
    size = 12 * model.num_parameters() / 1e9
    figures = {
        "parameters": float(model.num_parameters()),
        "blocked_ratio": timings["Checkpoints.save"].median / timings["dcp.save"].median,
        "first_blocked_ratio": seconds["Checkpoints.save"][0] / seconds["dcp.save"][0],
        "step_while_written": statistics.median(steps["while a checkpoint is written"]) / statistics.median(steps["alone"]),
    }
    return Result("checkpoints", preset, "GB/s", p, rows(timings, size), figures)


def one_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> None:
    model(tokens).logsumexp(-1).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
