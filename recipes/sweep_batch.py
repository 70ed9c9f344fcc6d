"""Loss against batch size at equal tokens: settings scaled by the SDE rule, and settings left as they are.

    mdm run sweep_batch --config sweep_batch_cpu

First the learning rate is tuned at the base batch. Then, at every batch size and seed, one run with the settings scaled from
there and one with the same settings; and scaled runs past the base, to see where the loss rises. Writes runs.csv,
summary.json, figure.png and finding.md. Run it again to go on: a finished run is never repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from omegaconf import MISSING

from mdm.config import UserError
from mdm.recipe import load_recipe, run_recipe
from mdm.studies import batch as study
from mdm.studies.runs import Runs, best_rate, settings_of, status_of, tune, write_csv, write_results
from mdm.training.output import check_output_dir, output_folder
from mdm.training.reach import Trial
from mdm.training.trial import try_out

CONFIG = "sweep_batch_cpu"

pretrain = load_recipe("pretrain")


@dataclass
class Settings:
    """The keys of the config; `recipes/configs/sweep_batch_cpu.yaml` explains each."""

    output_dir: str = MISSING
    run: str = MISSING
    set: dict[str, Any] = field(default_factory=dict)
    batches: list[int] = MISSING
    beyond: list[int] = field(default_factory=list)
    lr: float = MISSING
    lr_factor: float = 2.0
    tuning_seeds: int = 2
    seeds: int = 3
    tolerance: float = 0.01
    workers: int | None = None


def validate(cfg: Settings) -> None:
    """Everything that can be known to be wrong before the first run. Raises UserError."""
    check_output_dir(cfg.output_dir)
    if len(set(cfg.batches)) < 3 or min(cfg.batches, default=0) < 1:
        raise UserError(f"batches: at least three sizes, each at least 1; got {cfg.batches}")
    if cfg.beyond and min(cfg.beyond) <= max(cfg.batches):
        raise UserError(f"beyond: sizes past the largest of batches, {max(cfg.batches)}; got {cfg.beyond}")
    for key in ("lr", "tuning_seeds", "seeds", "tolerance"):
        if getattr(cfg, key) <= 0:
            raise UserError(f"{key} must be positive, got {getattr(cfg, key)}")
    if cfg.lr_factor <= 1:
        raise UserError(f"lr_factor must be greater than 1, got {cfg.lr_factor}")
    for batch in [*cfg.batches, *cfg.beyond]:
        pretrain.validate(settings_of(pretrain.Settings, cfg.run, {**cfg.set, **scaled(cfg, batch, cfg.lr, 0)}))


def scaled(cfg: Settings, batch: int, lr: float, seed: int) -> dict[str, Any]:
    """A run at a batch size whose settings are scaled from the base, the largest of `batches`."""
    return {"batch.logical": max(cfg.batches), "batch.physical": batch, "optimizer.lr": lr, "seed": seed}


def fixed(batch: int, lr: float, seed: int) -> dict[str, Any]:
    """A run at a batch size with the base's settings as they are."""
    return {"batch.logical": batch, "batch.physical": batch, "optimizer.lr": lr, "seed": seed}


def table(cfg: Settings, tolerant: bool = False) -> list[dict[str, Any]]:
    """All runs, each once: of group `tuning`, then `sde` and `fixed`; see mdm/studies/batch.py. tolerant: see `Runs`."""
    base = max(cfg.batches)
    runs = Runs(output_folder(cfg.output_dir), cfg.run, cfg.set, cfg.workers, tolerant)

    # 1. The learning rate at the base batch.
    rows: list[dict[str, Any]] = []

    def losses(rates: Sequence[float]) -> Mapping[float, float]:
        named = {(r, s): f"lr_{r:.3g}_seed{s}" for r in rates for s in range(cfg.tuning_seeds)}
        found = runs.run({name: scaled(cfg, base, r, s) for (r, s), name in named.items()})
        rows.extend(row("tuning", base, s, r, name, found[name]) for (r, s), name in named.items())
        means = {r: float(np.mean([found[named[r, s]]["loss"] for s in range(cfg.tuning_seeds)])) for r in rates}
        return {r: mean if np.isfinite(mean) else float("inf") for r, mean in means.items()}

    lr = best_rate(tune(losses, cfg.lr, cfg.lr_factor))

    # 2. Every batch size with both rules; at the base they are one.
    changes, cells = {}, []
    for seed in range(cfg.seeds):
        for batch in sorted([*cfg.batches, *cfg.beyond]):
            for rule in ("sde", "fixed"):
                if rule == "fixed" and batch > base:
                    continue
                name = f"lr_{lr:.3g}_seed{seed}" if batch == base else f"{rule}_batch{batch}_lr_{lr:.3g}_seed{seed}"
                changes[name] = scaled(cfg, batch, lr, seed) if rule == "sde" else fixed(batch, lr, seed)
                cells.append((rule, batch, seed, lr, name))
    found = runs.run(dict(sorted(changes.items(), key=lambda item: item[1]["batch.physical"])))  # the longest first
    runs.close()
    return [*rows, *(row(rule, batch, seed, lr, name, found[name]) for rule, batch, seed, lr, name in cells)]


def row(group: str, batch: int, seed: int, lr: float, name: str, outcome: Mapping[str, Any]) -> dict[str, Any]:
    own = {"cell": name, "group": group, "status": status_of(outcome), "batch": batch, "seed": seed, "lr": lr}
    return {**own, **outcome}


def trial(cfg: Settings) -> Trial:
    """What `mdm validate` does after all keys, for the run that all of its runs are variations of."""
    return try_out(settings_of(pretrain.Settings, cfg.run, {**cfg.set, "output_dir": cfg.output_dir}))


def main(cfg: Settings) -> None:
    folder, rows = output_folder(cfg.output_dir), table(cfg)
    summary, finding = study.conclude(rows, cfg.tolerance)
    write_csv(folder / "runs.csv", rows)
    write_results(folder, summary, study.draw(rows, summary), "Batch size", finding)


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG, again="goes on, and repeats no finished run")
