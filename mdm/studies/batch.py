"""How large may a batch be? Loss against batch size at equal tokens, with settings scaled by the SDE rule and with fixed ones.

A row is a run of `sweep_batch`: group `tuning` (the learning rate at the base batch, the largest of `fixed`), `sde` or `fixed`.
Its columns: cell, group, status, batch (sequences), seed, lr, and an outcome's: loss, steps, tokens, seconds,
squared_grad_norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from components.critical_batch import CriticalBatch, critical_batch, gradient_noise_scale
from mdm.config import UserError
from mdm.pages.report import figure_png
from mdm.studies.runs import best_rate

Rows = Sequence[Mapping[str, Any]]


def conclude(rows: Rows, tolerance: float = 0.01) -> tuple[dict[str, Any], str]:
    """Spreads over the batches of both rules, the critical batch and the gradient noise scale. Raises UserError."""
    sde, same = by_batch(rows, "sde"), by_batch(rows, "fixed")
    if len(same) < 3 or max(same) not in sde:
        raise UserError(f"batch: it needs runs that finished at 3 batch sizes or more; there are {len(same)}")
    base = max(same)
    within = {b: losses for b, losses in sde.items() if b <= base}

    def spread(losses: Mapping[int, np.ndarray]) -> float:
        means = [v.mean() for v in losses.values()]
        return float(max(means) - min(means))

    scaled = [r for r in rows if r["group"] == "sde" and r["status"] == "finished"]
    seeds = len({r["seed"] for r in scaled})
    critical: CriticalBatch | None = None
    if len(sde) >= 4:
        critical = critical_batch(
            [r["batch"] for r in scaled], [r["steps"] for r in scaled], [r["loss"] for r in scaled], tolerance
        )
    deviations = [v.var(ddof=1) for v in [*within.values(), *same.values()] if len(v) > 1]
    norms = {b: float(np.mean([r["squared_grad_norm"] for r in scaled if r["batch"] == b])) for b in within}
    seed_std = float(np.sqrt(np.mean(deviations))) if deviations else None
    rates = tuned(rows)
    summary = {
        "sde_spread": spread(within),
        "fixed_spread": spread(same),
        "nelbo": float(sde[base].mean()),
        "unit": "bits per token",
        "batch_range": [min(same), base],
        "seeds": seeds,
        "left_out": [r["cell"] for r in rows if r["status"] != "finished"],
        "seed_std": seed_std,
        "can_tell": seed_std is not None and spread(same) >= 3 * seed_std,
        "critical_batch": asdict(critical) if critical else None,
        "gradient_noise_scale": gradient_noise_scale(list(norms), list(norms.values())),
        "lr": best_rate(rates),
        "lr_grid": {f"{rate:.3g}": loss for rate, loss in sorted(rates.items())},
        "steps": {str(b): int(np.mean([r["steps"] for r in scaled if r["batch"] == b])) for b in sde},
        "sde": means_and_deviations(sde),
        "fixed": means_and_deviations(same),
    }
    return summary, finding(summary)


def by_batch(rows: Rows, group: str) -> dict[int, np.ndarray]:
    """Batch size -> the losses of all seeds that finished."""
    own = [r for r in rows if r["group"] == group and r["status"] == "finished"]
    return {b: np.array([r["loss"] for r in own if r["batch"] == b]) for b in sorted({r["batch"] for r in own})}


def tuned(rows: Rows) -> dict[float, float]:
    """Learning rate -> its mean loss at the base batch; one that diverged is infinitely bad."""
    own = [r for r in rows if r["group"] == "tuning"]
    means = {lr: float(np.mean([r["loss"] for r in own if r["lr"] == lr])) for lr in sorted({r["lr"] for r in own})}
    return {lr: mean if np.isfinite(mean) else float("inf") for lr, mean in means.items()}


def means_and_deviations(losses: Mapping[int, np.ndarray]) -> dict[str, list[float]]:
    """Batch size -> the mean over seeds and their standard deviation."""
    return {str(b): [float(v.mean()), float(v.std(ddof=1)) if len(v) > 1 else 0.0] for b, v in losses.items()}


def draw(rows: Rows, summary: Mapping[str, Any]) -> bytes:
    """Loss against batch size under both rules, and the tuning of the learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rates = {lr: loss for lr, loss in tuned(rows).items() if np.isfinite(loss)}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(2, 1))
    for rule, label, style, shade in (("sde", "SDE-scaled", "o-", "0"), ("fixed", "fixed settings", "s--", "0.5")):
        mean, deviation = zip(*summary[rule].values(), strict=True)
        left.errorbar([int(b) for b in summary[rule]], mean, deviation, fmt=style, color=shade, capsize=3, label=label)
    _, base = summary["batch_range"]
    left.axvline(base, color="0.6", linewidth=1, linestyle=":", label=f"base batch {base}")
    critical = summary["critical_batch"]
    if critical and critical["reached"]:
        left.axvspan(
            critical["low"], critical["high"], color="0.85", label=f"critical batch {critical['batch']:.0f} (90 % interval)"
        )
    left.set_xscale("log", base=2)
    left.set_xticks([int(b) for b in summary["sde"]], list(summary["sde"]))  # the fixed settings have no others
    left.set(xlabel="batch (sequences)", ylabel="validation NELBO (bits per token)", title="Equal tokens at every batch size")
    left.legend(fontsize="small")
    right.plot(list(rates), list(rates.values()), "ko-")
    right.set_xscale("log")
    right.set_xticks(list(rates), [f"{rate:.2g}" for rate in rates], rotation=45 if len(rates) > 4 else 0)
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
            f"The critical batch is {c['batch']:.0f} sequences (90 % interval: {c['low']:.0f} to {c['high']:.0f}), or "
            f"{c['steps']:.0f} "
            f"steps: there the loss is {100 * c['tolerance']:.0f} % over its floor of {c['floor']:.3f}."
        )
    elif c:
        within = f"at its largest batch the loss is still within {100 * c['tolerance']:.0f} % of its floor"
        lines.append(f"The sweep does not reach the critical batch: {within}.")
    lines.append(f"The gradient noise scale in the second half of training is {s['gradient_noise_scale']:.0f} sequences.")
    if s["seeds"] < 3:
        lines.append(f"From {s['seeds']} seed{'s' if s['seeds'] > 1 else ''}: no difference here is a finding.")
    if s["left_out"]:
        lines.append(f"Left out: {', '.join(s['left_out'])}.")
    return " ".join(lines)
