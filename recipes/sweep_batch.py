"""Loss against batch size at equal tokens: settings scaled by the SDE rule, and settings left as they are.

    mdm run sweep_batch --config sweep_batch_cpu

First the learning rate is tuned at the base batch. Then, at every batch size and seed, one run with the settings scaled from
there and one with the same settings; and scaled runs past the base, to see where the loss rises. Writes runs.csv,
summary.json, figure.png and finding.md. Run it again to go on: a finished run is never repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import MISSING

from components.critical_batch import CriticalBatch, critical_batch, gradient_noise_scale
from mdm.cli import load_recipe, run_recipe
from mdm.config import UserError
from mdm.report import figure_png
from mdm.run import check_output_dir
from mdm.runs import Runs, best_rate, settings_of, tune, write_results

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


def main(cfg: Settings) -> None:
    folder, base = Path(cfg.output_dir), max(cfg.batches)
    runs = Runs(folder, cfg.run, cfg.set, cfg.workers)

    # 1. The learning rate at the base batch.
    def losses(rates: Sequence[float]) -> Mapping[float, float]:
        named = {(r, s): f"lr_{r:.3g}_seed{s}" for r in rates for s in range(cfg.tuning_seeds)}
        found = runs.run({name: scaled(cfg, base, r, s) for (r, s), name in named.items()})
        return {r: float(np.mean([found[named[r, s]]["loss"] for s in range(cfg.tuning_seeds)])) for r in rates}

    tuned = tune(losses, cfg.lr, cfg.lr_factor)
    lr = best_rate(tuned)

    # 2. Every batch size with both rules; at the base they are one.
    changes, cells = {}, []
    for seed in range(cfg.seeds):
        for batch in sorted([*cfg.batches, *cfg.beyond]):
            for rule in ("sde", "fixed"):
                if rule == "fixed" and batch > base:
                    continue
                name = f"lr_{lr:.3g}_seed{seed}" if batch == base else f"{rule}_batch{batch}_lr_{lr:.3g}_seed{seed}"
                changes[name] = scaled(cfg, batch, lr, seed) if rule == "sde" else fixed(batch, lr, seed)
                cells.append({"rule": rule, "batch": batch, "seed": seed, "run": name})
    found = runs.run(dict(sorted(changes.items(), key=lambda item: item[1]["batch.physical"])))  # the longest first
    runs.close()
    rows = [{**cell, **found[cell["run"]]} for cell in cells]

    # 3. What it shows.
    summary = conclude(cfg, rows, tuned)
    write_results(folder, rows, summary, draw(tuned, summary), "Batch size", finding(summary))


def by_batch(rows: Sequence[Mapping[str, Any]], rule: str) -> dict[int, np.ndarray]:
    """Batch size -> the losses of all seeds."""
    sizes = sorted({r["batch"] for r in rows if r["rule"] == rule})
    return {b: np.array([r["loss"] for r in rows if r["rule"] == rule and r["batch"] == b]) for b in sizes}


def conclude(cfg: Settings, rows: Sequence[Mapping[str, Any]], tuned: Mapping[float, float]) -> dict[str, Any]:
    """Spreads over `batches`, the critical batch and the gradient noise scale."""
    sde, same, base = by_batch(rows, "sde"), by_batch(rows, "fixed"), max(cfg.batches)
    within = {b: losses for b, losses in sde.items() if b <= base}

    def spread(losses: Mapping[int, np.ndarray]) -> float:
        means = [v.mean() for v in losses.values()]
        return float(max(means) - min(means))

    scaled_rows = [r for r in rows if r["rule"] == "sde"]
    critical: CriticalBatch | None = None
    if len(sde) >= 4:
        critical = critical_batch(
            [r["batch"] for r in scaled_rows],
            [r["steps"] for r in scaled_rows],
            [r["loss"] for r in scaled_rows],
            cfg.tolerance,
        )
    norms = {b: np.mean([r["squared_grad_norm"] for r in scaled_rows if r["batch"] == b]) for b in within}
    seed_std = float(np.sqrt(np.mean([v.var(ddof=1) for v in [*within.values(), *same.values()]]))) if cfg.seeds > 1 else None
    return {
        "sde_spread": spread(within),
        "fixed_spread": spread(same),
        "nelbo": float(sde[base].mean()),
        "unit": "bits per token",
        "batch_range": [min(cfg.batches), base],
        "seeds": cfg.seeds,
        "seed_std": seed_std,
        "can_tell": seed_std is not None and spread(same) >= 3 * seed_std,
        "critical_batch": asdict(critical) if critical else None,
        "gradient_noise_scale": gradient_noise_scale(list(norms), list(norms.values())),
        "lr": best_rate(tuned),
        "lr_grid": {f"{rate:.3g}": loss for rate, loss in sorted(tuned.items())},
        "steps": {str(b): int(np.mean([r["steps"] for r in scaled_rows if r["batch"] == b])) for b in sde},
        "sde": means_and_deviations(sde),
        "fixed": means_and_deviations(same),
    }


def means_and_deviations(losses: Mapping[int, np.ndarray]) -> dict[str, list[float]]:
    """Batch size -> the mean over seeds and their standard deviation."""
    return {str(b): [float(v.mean()), float(v.std(ddof=1)) if len(v) > 1 else 0.0] for b, v in losses.items()}


def draw(tuned: Mapping[float, float], summary: Mapping[str, Any]) -> bytes:
    """Loss against batch size under both rules, and the tuning of the learning rate."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(2, 1))
    for rule, label, style in (("sde", "SDE-scaled", "o-"), ("fixed", "fixed settings", "s--")):
        mean, deviation = zip(*summary[rule].values(), strict=True)
        left.errorbar([int(b) for b in summary[rule]], mean, deviation, fmt=style, capsize=3, label=label)
    _, base = summary["batch_range"]
    left.axvline(base, color="0.6", linewidth=1, linestyle=":", label=f"base batch {base}")
    critical = summary["critical_batch"]
    if critical and critical["reached"]:
        left.axvspan(critical["low"], critical["high"], color="0.85", label=f"critical batch {critical['batch']:.0f} (90 %)")
    left.set_xscale("log", base=2)
    left.set_xticks([int(b) for b in summary["sde"]], list(summary["sde"]))  # the fixed settings have no others
    left.set(xlabel="batch (sequences)", ylabel="validation NELBO (bits per token)", title="Equal tokens at every batch size")
    left.legend(fontsize="small")
    right.plot(sorted(tuned), [tuned[r] for r in sorted(tuned)], "o-")
    right.set_xscale("log")
    right.set_xticks(sorted(tuned), [f"{rate:.2g}" for rate in sorted(tuned)], rotation=45 if len(tuned) > 4 else 0)
    right.minorticks_off()
    right.set(xlabel="learning rate", title=f"Tuned at the base batch: {summary['lr']:.3g}")
    return figure_png(figure)


def finding(s: Mapping[str, Any]) -> str:
    """What the sweep says, in a paragraph."""
    low, high = s["batch_range"]
    ratio = s["sde_spread"] / s["fixed_spread"] if s["fixed_spread"] else float("nan")
    lines = [
        f"From {low} to {high} sequences a step, at equal tokens, the validation NELBO ({s['nelbo']:.3f} bits per token at the "
        f"base batch of {high}, lr {s['lr']:.3g}) varies by {s['sde_spread']:.3f} ({100 * s['sde_spread'] / s['nelbo']:.1f} %) "
        f"with SDE-scaled settings and by {s['fixed_spread']:.3f} with fixed ones, a ratio of {ratio:.2f}, over "
        f"{s['seeds']} seeds"
        + (f" (a seed's standard deviation is {s['seed_std']:.3f})." if s["seed_std"] is not None else ".")
    ]
    if not s["can_tell"]:
        lines.append("The fixed settings' spread is under three standard deviations of a seed: this task cannot tell.")
    c = s["critical_batch"]
    if c and c["reached"]:
        lines.append(
            f"The critical batch is {c['batch']:.0f} sequences (90 %: {c['low']:.0f} to {c['high']:.0f}), or {c['steps']:.0f} "
            f"steps: there the loss is {100 * c['tolerance']:.0f} % over its floor of {c['floor']:.3f}."
        )
    elif c:
        within = f"at its largest batch the loss is still within {100 * c['tolerance']:.0f} % of its floor"
        lines.append(f"The sweep does not reach the critical batch: {within}.")
    lines.append(f"The gradient noise scale in the second half of training is {s['gradient_noise_scale']:.0f} sequences.")
    return " ".join(lines)


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG)
