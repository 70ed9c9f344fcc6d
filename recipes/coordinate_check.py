"""Coordinate check: how much each of the first steps of training changes activations, against width and depth.

    mdm run coordinate_check --config coordinate_check_cpu

With CompleteP the changes are flat, and the learning rate that is right for one size is right for all; without it they grow.
Writes runs.csv, summary.json (the slope of log change against log size for each module), figure.png and finding.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import MISSING
from torch import Tensor, nn

from components.coordinate_check import CoordinateCheck, coordinate_check
from components.losses import RangePositions
from components.progress import Bar
from components.vocabulary import Vocabulary
from mdm.config import UserError, at_least_one
from mdm.data.pipeline import MicroBatch, next_step
from mdm.evaluation.nelbo import hidden_of
from mdm.hardware import check_hardware, hardware
from mdm.pages.report import figure_png
from mdm.recipe import load_recipe, run_recipe
from mdm.studies.runs import settings_of, write_csv, write_results
from mdm.training.output import check_output_dir, output_folder
from mdm.training.reach import Trial
from mdm.training.trial import try_out

CONFIG = "coordinate_check_cpu"

pretrain = load_recipe("pretrain")


@dataclass
class Settings:
    """The keys of the config; `recipes/configs/coordinate_check_cpu.yaml` explains each."""

    output_dir: str = MISSING
    run: str = MISSING
    set: dict[str, Any] = field(default_factory=dict)
    base_width: int = MISSING
    base_depth: int = MISSING
    widths: list[int] = MISSING
    depths: list[int] = MISSING
    steps: int = 10
    seeds: int = 3
    device: str = "auto"


def validate(cfg: Settings) -> None:
    """Everything that can be known to be wrong before the first model. Raises UserError."""
    check_output_dir(cfg.output_dir)
    check_hardware(cfg.device, "fp32")
    for key in ("widths", "depths"):
        if len(set(getattr(cfg, key))) < 2 or min(getattr(cfg, key)) < 1:
            raise UserError(f"{key}: at least two, each at least 1; got {getattr(cfg, key)}")
    at_least_one(cfg, "base_width", "base_depth", "steps", "seeds")
    for axis in ("width", "depth"):
        for size in cfg.widths if axis == "width" else cfg.depths:
            pretrain.validate(settings_of(pretrain.Settings, cfg.run, changes(cfg, axis, size, 0, True)))


def changes(cfg: Settings, axis: str, size: int, seed: int, ruled: bool) -> dict[str, Any]:
    """The keys of a run: one axis grows from its first size, the other stays at its own."""
    own = {"width": cfg.widths[0], "depth": cfg.depths[0], axis: size}
    return {
        **cfg.set,
        "model.width": own["width"],
        "model.num_layers": own["depth"],
        "parameterization.base_width": cfg.base_width if ruled else None,
        "parameterization.base_depth": cfg.base_depth if ruled else None,
        "optimizer.warmup": 0.0,  # the first steps at the whole learning rate
        "device": cfg.device,
        "seed": seed,
    }


def watch(model: Any) -> dict[str, nn.Module]:
    """Where the change is measured, from the tokens to the last hidden states; the probe adds the logits."""
    first, last = model.blocks[0], model.blocks[-1]
    return {
        "embedding": model.embedding,
        "first attention": first.attn,
        "first feed-forward": first.mlp,
        "last block": last,
        "final norm": model.norm,
    }


def trained_ids(micro: MicroBatch, vocabulary: Vocabulary) -> list[tuple[RangePositions, slice]]:
    """The masked positions of each id range, and its ids: those the loss chooses among there."""
    ranges = [(p, vocabulary.ranges[p.range_index]) for p in micro.positions]
    return [(p, slice(r.start, r.stop)) for p, r in ranges]


def measure(cfg: Settings, axis: str, ruled: bool, bar: Bar) -> CoordinateCheck:
    """The check over one axis."""
    current: Any = None
    batches: Any = None

    def build(size: int, seed: int) -> nn.Module:
        nonlocal current, batches
        own = changes(cfg, axis, size, seed, ruled)
        with tempfile.TemporaryDirectory() as scratch, hardware(cfg.device, "fp32") as hw:
            current = pretrain.Pretrain(settings_of(pretrain.Settings, cfg.run, {**own, "output_dir": scratch}), hw)
            current.history.close()
        batches = iter(current.loader)
        return current.model

    def probe(model: Any) -> Mapping[str, Tensor]:
        micro = next(iter(current.plan.values()))[0][0].to(current.hw.device)  # held-out, masked alike at every size
        hidden = hidden_of(model, micro).flatten(0, 1)
        logits = [hidden[p.index] @ model.unembedding.weight[ids].T for p, ids in trained_ids(micro, current.vocabulary)]
        return {"logits": torch.cat([part.flatten() for part in logits])}

    sizes = cfg.widths if axis == "width" else cfg.depths
    return coordinate_check(
        build, lambda model: current.step(next_step(batches)), probe, watch, sizes, range(cfg.seeds), cfg.steps,
        on_model=lambda size, seed: bar.update(1),
    )  # fmt: skip


def trial(cfg: Settings) -> Trial:
    """What `mdm validate` does after all keys, for the run that all of its runs are variations of."""
    return try_out(settings_of(pretrain.Settings, cfg.run, {"output_dir": cfg.output_dir}))


def main(cfg: Settings) -> None:
    folder = output_folder(cfg.output_dir)
    found: dict[tuple[str, str], CoordinateCheck] = {}
    total = 2 * cfg.seeds * (len(cfg.widths) + len(cfg.depths))
    with Bar(total=total, unit="model") as bar:
        for axis in ("width", "depth"):
            for rule in ("with", "without"):
                bar.set_description(f"{axis} {rule} CompleteP")
                found[axis, rule] = measure(cfg, axis, rule == "with", bar)
    rows = [{"axis": a, "rule": r, **row} for (a, r), check in found.items() for row in check.rows]
    summary = {axis: {rule: found[axis, rule].slopes() for rule in ("with", "without")} for axis in ("width", "depth")}
    whole = {"steps": cfg.steps, "seeds": cfg.seeds, **summary}
    write_csv(folder / "runs.csv", rows)
    write_results(folder, whole, draw(found), "Coordinate check", finding(cfg, summary))


def draw(found: Mapping[tuple[str, str], CoordinateCheck]) -> bytes:
    """Change against size, a panel for each axis and rule."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(13, 8), layout="constrained")
    for axes, ((axis, rule), check) in zip(panels.flat, found.items(), strict=True):
        check.draw(axes, axis)
        axes.set_title(f"{axis}, {rule} CompleteP")
    return figure_png(figure)


def finding(cfg: Settings, summary: Mapping[str, Any]) -> str:
    """What the check says, in a paragraph."""
    parts = []
    for axis, sizes in (("width", cfg.widths), ("depth", cfg.depths)):
        steepest = {rule: max(summary[axis][rule].items(), key=lambda item: abs(item[1])) for rule in ("with", "without")}
        said = ", ".join(f"{rule} CompleteP {slope:+.2f} ({module})" for rule, (module, slope) in steepest.items())
        parts.append(f"over {axis} {sizes[0]} to {sizes[-1]} the steepest slope of log change against log size is {said}")
    return f"In each of the first {cfg.steps} steps, {cfg.seeds} seeds: {'; '.join(parts)}."


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG)
