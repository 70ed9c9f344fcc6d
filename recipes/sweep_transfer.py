"""The best learning rate against width, depth, batch or horizon, with and without the rules that should keep it still.

    mdm run sweep_transfer --config sweep_transfer_cpu                 width; sweep_transfer_depth_cpu and _horizon_cpu

At every size the learning rate is tuned on a geometric grid that widens until its best is inside. "With" is CompleteP from the
first size on (width, depth) or the SDE scaler (batch, horizon); "without" leaves settings as they are, and is tuned at the
largest size: what counts is how far its best is from that of the first. Writes runs.csv,
summary.json, figure.png and finding.md. Run it again to go on: a finished run is never repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from omegaconf import MISSING

from mdm.config import UserError
from mdm.pages.report import figure_png
from mdm.recipe import load_recipe, run_recipe
from mdm.studies.runs import Runs, best_rate, settings_of, tune, vertex, write_csv, write_results
from mdm.training.output import check_output_dir, output_folder
from mdm.training.reach import Trial
from mdm.training.trial import try_out

CONFIG = "sweep_transfer_cpu"
AXES = {  # axis -> the key that grows, and the key that holds its base
    "width": ("model.width", "parameterization.base_width"),
    "depth": ("model.num_layers", "parameterization.base_depth"),
    "batch": ("batch.physical", "batch.logical"),
    "horizon": ("tokens", "optimizer.base_tokens"),
}
DRIFT = {"width": -1.0, "depth": -0.5, "batch": 0.5, "horizon": -0.25}
"""Without the rule the best learning rate goes about as this power of the size: where its tuning starts."""

pretrain = load_recipe("pretrain")


@dataclass
class Settings:
    """The keys of the config; `recipes/configs/sweep_transfer_cpu.yaml` explains each."""

    output_dir: str = MISSING
    run: str = MISSING
    set: dict[str, Any] = field(default_factory=dict)
    axis: str = MISSING
    sizes: list[int] = MISSING
    without: bool = True
    lr: float = MISSING
    lr_factor: float = 2.0
    seeds: int = 2
    workers: int | None = None


def validate(cfg: Settings) -> None:
    """Everything that can be known to be wrong before the first run. Raises UserError."""
    check_output_dir(cfg.output_dir)
    if cfg.axis not in AXES:
        raise UserError(f"axis: {cfg.axis!r} is not one of {', '.join(AXES)}")
    if len(set(cfg.sizes)) < 2 or min(cfg.sizes) < 1:
        raise UserError(f"sizes: at least two, each at least 1; got {cfg.sizes}")
    for key in ("lr", "seeds"):
        if getattr(cfg, key) <= 0:
            raise UserError(f"{key} must be positive, got {getattr(cfg, key)}")
    if cfg.lr_factor <= 1:
        raise UserError(f"lr_factor must be greater than 1, got {cfg.lr_factor}")
    for size in cfg.sizes:
        pretrain.validate(settings_of(pretrain.Settings, cfg.run, {**cfg.set, **changes(cfg, size, True, cfg.lr, 0)}))


def changes(cfg: Settings, size: int, ruled: bool, lr: float, seed: int) -> dict[str, Any]:
    """The keys of a run of a size: with the rule its base is the first size, without it the size itself."""
    grows, base = AXES[cfg.axis]
    return {grows: size, base: cfg.sizes[0] if ruled else size, "optimizer.lr": lr, "seed": seed}


def trial(cfg: Settings) -> Trial:
    """What `mdm validate` does after all keys, for the run that all of its runs are variations of."""
    return try_out(settings_of(pretrain.Settings, cfg.run, {**cfg.set, "output_dir": cfg.output_dir}))


def main(cfg: Settings) -> None:
    folder = output_folder(cfg.output_dir)
    runs = Runs(folder, cfg.run, cfg.set, cfg.workers)
    rows: list[dict[str, Any]] = []

    def tuned(size: int, ruled: bool) -> dict[float, list[float]]:
        """Learning rate -> the losses of all seeds, at one size."""
        found: dict[float, list[float]] = {}
        kind = "base" if size == cfg.sizes[0] else "with" if ruled else "without"  # at the base both are the same runs

        def losses(rates: Sequence[float]) -> Mapping[float, float]:
            named = {(r, s): f"{cfg.axis}{size}_{kind}_lr_{r:.3g}_seed{s}" for r in rates for s in range(cfg.seeds)}
            outcome = runs.run({name: changes(cfg, size, ruled, r, s) for (r, s), name in named.items()})
            for (rate, seed), name in named.items():
                found.setdefault(rate, []).append(outcome[name]["loss"])
                rows.append({"rule": kind, "size": size, "lr": rate, "seed": seed, "run": name, **outcome[name]})
            return {r: float(np.mean(found[r])) for r in rates}

        octaves = 0 if ruled else round(DRIFT[cfg.axis] * np.log(size / cfg.sizes[0]) / np.log(cfg.lr_factor))
        tune(losses, cfg.lr * cfg.lr_factor**octaves, cfg.lr_factor)
        return found

    cells = [(size, True) for size in cfg.sizes] + [(size, False) for size in cfg.sizes[-1:] if cfg.without]
    with ThreadPoolExecutor(len(cells)) as pool:  # they wait for the same few workers
        found = dict(zip(cells, pool.map(lambda cell: tuned(*cell), cells), strict=True))
    runs.close()
    rows.sort(key=lambda r: (r["rule"], r["size"], r["lr"], r["seed"]))
    curves = {"with": {size: found[size, True] for size in cfg.sizes}}
    if cfg.without:
        first, last = cfg.sizes[0], cfg.sizes[-1]
        curves["without"] = {first: found[first, True], last: found[last, False]}
    summary = conclude(cfg, curves)
    figure = draw(cfg, curves, summary)
    write_csv(folder / "runs.csv", rows)
    write_results(folder, summary, figure, f"Transfer over {cfg.axis}", finding(cfg, summary))


def conclude(cfg: Settings, curves: Mapping[str, Mapping[int, Mapping[float, Sequence[float]]]]) -> dict[str, Any]:
    """Per rule and size, the best learning rate of the grid and of the parabola through it; and how far it moves."""
    summary: dict[str, Any] = {"axis": cfg.axis, "sizes": cfg.sizes, "seeds": cfg.seeds, "lr_factor": cfg.lr_factor}
    for rule, by_size in curves.items():
        best, between, deviation, loss = [], [], [], []
        for losses in by_size.values():
            means = {rate: float(np.mean(values)) for rate, values in losses.items()}
            best.append(best_rate(means))
            between.append(vertex(means))
            each = [np.log2(vertex({rate: values[s] for rate, values in losses.items()})) for s in range(cfg.seeds)]
            deviation.append(float(np.std(each, ddof=1)) if cfg.seeds > 1 else 0.0)
            loss.append(min(means.values()))
        summary[rule] = {
            "sizes": list(by_size),
            "best_lr": best,
            "best_lr_between": between,
            "seed_std_octaves": deviation,
            "loss": loss,
            "moves_by": max(best) / min(best),
            "moves_by_between": max(between) / min(between),
        }
    return summary


def draw(cfg: Settings, curves: Mapping[str, Any], summary: Mapping[str, Any]) -> bytes:
    """Loss against learning rate at every size, a panel for each rule; and the best learning rate against the size."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(curves) + 1, figsize=(4.8 * (len(curves) + 1), 4.6), layout="constrained")
    for axes, (rule, by_size) in zip(panels, curves.items(), strict=False):
        for (size, losses), marker in zip(by_size.items(), "osD^vPX*", strict=False):
            rates = sorted(losses)
            finite = [r for r in rates if np.isfinite(losses[r]).all()]
            mean, deviation = ([f(losses[r]) for r in finite] for f in (np.mean, np.std))
            axes.errorbar(finite, mean, deviation, marker=marker, capsize=2, linewidth=1, label=f"{cfg.axis} {size}")
        axes.set_xscale("log", base=2)
        axes.set(xlabel="base learning rate", ylabel="validation NELBO (bits per token)", title=f"{rule} the rule")
        axes.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1.08), ncols=2)
    for rule, style in zip(curves, ("o-", "s--"), strict=False):
        own = summary[rule]
        factor = 2 ** np.array(own["seed_std_octaves"])
        best = np.array(own["best_lr_between"])
        panels[-1].errorbar(own["sizes"], best, [best - best / factor, best * factor - best], fmt=style, capsize=3, label=rule)
    panels[-1].set_xscale("log", base=2)
    panels[-1].set_yscale("log", base=2)
    panels[-1].set_xticks(cfg.sizes, [str(s) for s in cfg.sizes])
    rates = sorted({rate for by_size in curves.values() for losses in by_size.values() for rate in losses})
    panels[-1].set_yticks(rates, [f"{rate:.2g}" for rate in rates])
    panels[-1].minorticks_off()
    panels[-1].set(xlabel=cfg.axis, ylabel="best learning rate")
    panels[-1].legend()
    return figure_png(figure)


def finding(cfg: Settings, s: Mapping[str, Any]) -> str:
    """What the sweep says, in a paragraph."""
    names = {"width": "CompleteP", "depth": "CompleteP", "batch": "the SDE scaler", "horizon": "the SDE scaler"}
    sizes = f"From {cfg.axis} {cfg.sizes[0]:,} to {cfg.sizes[-1]:,} ({cfg.sizes[-1] / cfg.sizes[0]:.0f}x)"
    parts = []
    for rule in ("with", "without"):
        if rule in s:
            own = s[rule]
            best = ", ".join(f"{r:.2g}" for r in own["best_lr"])
            parts.append(
                f"{rule} {names[cfg.axis]} it moves by {own['moves_by']:.3g}x on the grid ({best}), "
                f"{own['moves_by_between']:.2f}x between its points, and the loss goes "
                f"from {own['loss'][0]:.3f} to {own['loss'][-1]:.3f} bits per token"
            )
    return (
        f"{sizes}, the best learning rate on a grid of factor {cfg.lr_factor:.3g} over {cfg.seeds} seeds: {'; '.join(parts)}."
    )


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG, again="goes on, and repeats no finished run")
