"""How should a budget be split between parameters and tokens, and how far is masked diffusion from next-token prediction?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from components.scaling import NAMES, PAPER, Fit, ScalingLaw, fit, iso_flop
from mdm.config import UserError
from mdm.pages.report import figure_png

Rows = Sequence[Mapping[str, Any]]
BASELINE = ("masked", "autoregressive")  # groups of equal size and tokens


def conclude(rows: Rows) -> tuple[dict[str, Any], str]:
    """The law with its intervals, each budget's best size, and the baseline's loss. Raises UserError for too few runs."""
    grid = fitted(rows)
    lost = [r["cell"] for r in rows if r["status"] != "finished"]
    found = _fit(grid)
    profiles = {}
    for budget in budgets(grid):
        own = sorted((r for r in grid if r["budget"] == budget), key=lambda r: r["parameters"])
        try:
            size, loss = iso_flop([r["parameters"] for r in own], [r["loss"] for r in own])
            tokens = float(np.exp(np.interp(np.log(size), *np.log([[r[k] for r in own] for k in ("parameters", "tokens")]))))
            profiles[f"{budget:.3g}"] = {"parameters": size, "loss": loss, "tokens": tokens}
        except ValueError as error:
            profiles[f"{budget:.3g}"] = {"error": str(error)}
    low, high = found.interval("exponent")
    summary: dict[str, Any] = {
        "runs": len(grid),
        "left_out": lost,
        "seeds": len({r["seed"] for r in grid}),
        "law": asdict(found.law),
        "intervals_90": {name: found.interval(name) for name in (*NAMES, "exponent")},
        "exponent": found.law.exponent,
        "fit_error": found.error,
        "draws": [asdict(law) for law in found.draws],
        "profiles": profiles,
        "paper": {"factor": PAPER[0], "exponent": PAPER[1]},
        "unit": "bits per token",
    }
    law, where = found.law, "inside" if low <= PAPER[1] <= high else "outside"
    lines = [
        f"From {len(grid)} runs of {_seeds(summary['seeds'])}, L(N, D) = {law.E:.2f} + {law.A:.3g}/N^{law.a:.2f} + "
        f"{law.B:.3g}/D^{law.b:.2f} bits per token (root mean square error {100 * found.error:.1f} %). The compute-optimal "
        f"tokens grow as N^{law.exponent:.2f} (90 % bootstrap interval {low:.2f} to {high:.2f}); the paper's exponent, "
        f"{PAPER[1]}, lies {where} it, on other data and at far larger sizes."
    ]
    floor_low, floor_high = summary["intervals_90"]["E"]
    least = min(r["loss"] for r in grid)
    if floor_high - floor_low > 0.5 * least or 0.05 * least > law.E:
        lines.append(f"They do not determine the floor E (90 %: {floor_low:.2f} to {floor_high:.2f}), nor what hangs on it.")
    bracketed = [p for p in profiles.values() if "parameters" in p]
    lines.append(f"{len(bracketed)} of {len(profiles)} budgets bracket their best size.")
    if len(bracketed) < 2:
        lines.append("So the optimum lies outside these sizes, and the exponent is an extrapolation: no finding.")
    else:
        best = ", ".join(f"{p['parameters']:.2g} parameters and {p['tokens']:.2g} tokens" for p in bracketed)
        lines.append(f"Their best: {best}.")
    summary["tasks"] = _tasks(grid)
    for task, own in summary["tasks"].items():
        low, high = own["interval_90"]
        lines.append(
            f"For {task.replace('_', ' ')} the mixture's tokens grow as "
            f"N^{own['exponent']:.2f} (90 %: {low:.2f} to {high:.2f}), "
            f"root mean square error {100 * own['fit_error']:.1f} %."
        )
    pair = _pair(rows)
    if pair:
        noise = pair["masked"][1] / pair["masked"][0]
        if found.error > 3 * noise > 0:
            lines.append(
                f"The law misses the runs by {found.error / noise:.0f} times a seed's noise ({100 * noise:.1f} %): it is not "
                "the form of these losses, and its constants are no finding."
            )
        summary["baseline"] = pair
        lines.append(
            f"At {pair['parameters']:,} parameters and {pair['tokens']:,} tokens the same blocks reach {pair['masked'][0]:.3f} "
            f"(+-{pair['masked'][1]:.3f}, {pair['seeds']} seeds) by masked diffusion, an upper bound, and "
            f"{pair['autoregressive'][0]:.3f} (+-{pair['autoregressive'][1]:.3f}) by next-token prediction, exactly."
        )
    if lost:
        lines.append(f"Left out: {', '.join(lost)}.")
    return summary, " ".join(lines)


def fitted(rows: Rows) -> list[Mapping[str, Any]]:
    """The finished runs that the law is fitted to: all but those of the comparison with the baseline."""
    return [r for r in rows if r["group"] not in BASELINE and r["status"] == "finished"]


def budgets(grid: Rows) -> list[float]:
    """The budgets that the runs belong to; runs of a search have none."""
    return sorted({r["budget"] for r in grid if r["budget"] is not None})


def _seeds(count: int) -> str:
    return "one seed each" if count == 1 else f"{count} seeds"


def _fit(grid: Rows) -> Fit:
    try:
        return fit([r["parameters"] for r in grid], [r["tokens"] for r in grid], [r["loss"] for r in grid])
    except ValueError as error:
        raise UserError(str(error)) from error


def _tasks(grid: Rows) -> dict[str, Any]:
    """In a mixture, a law for the loss of each task, over the parameters and tokens that all of them share."""
    keys = [k for k in grid[0] if k.startswith("bits/") and all(r.get(k) is not None for r in grid)]
    found = {}
    for key in keys if len(keys) > 1 else []:
        own = _fit([{**r, "loss": r[key]} for r in grid])
        found[key.removeprefix("bits/")] = {
            "law": asdict(own.law),
            "exponent": own.law.exponent,
            "interval_90": own.interval("exponent"),
            "fit_error": own.error,
        }
    return found


def _pair(rows: Rows) -> dict[str, Any] | None:
    """Mean and standard deviation over seeds of the baseline, and of masked diffusion at the same size and tokens."""
    ours, theirs = ([r for r in rows if r["group"] == g and r["status"] == "finished"] for g in BASELINE)
    if not ours or not theirs:
        return None

    def moments(group: Rows) -> list[float]:
        losses = [r["loss"] for r in group]
        return [float(np.mean(losses)), float(np.std(losses, ddof=1)) if len(losses) > 1 else 0.0]

    return {
        "parameters": ours[0]["parameters"],
        "tokens": ours[0]["tokens"],
        "seeds": min(len(ours), len(theirs)),
        "masked": moments(ours),
        "autoregressive": moments(theirs),
    }


def draw(rows: Rows, summary: Mapping[str, Any]) -> bytes:
    """Left, each budget's losses over the size, and its parabola; right, D*(N) with its interval, and the paper's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    law = ScalingLaw(**summary["law"])
    grid = fitted(rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    styles = ("o-", "s--", "^:", "D-.", "v-")
    free = [r for r in grid if r["budget"] is None]
    if free:
        left.plot([r["parameters"] for r in free], [r["loss"] for r in free], "x", color="0.4", label="of no budget")
    for i, budget in enumerate(budgets(grid)):
        own = sorted((r for r in grid if r["budget"] == budget), key=lambda r: r["parameters"])
        shade = str(0.75 - 0.75 * i / max(len(budgets(grid)) - 1, 1))
        left.plot(
            [r["parameters"] for r in own], [r["loss"] for r in own], styles[i % 5], color=shade, label=f"{budget:.2g} FLOPs"
        )
        profile = summary["profiles"].get(f"{budget:.3g}", {})
        if "parameters" in profile:
            left.plot(profile["parameters"], profile["loss"], "*", color=shade, markersize=13)
    left.set(
        xscale="log", xlabel="parameters without embeddings", ylabel="held-out NELBO (bits per token)", title="IsoFLOP profiles"
    )
    left.legend(frameon=False, fontsize="small")
    n = np.geomspace(min(r["parameters"] for r in grid), max(r["parameters"] for r in grid), 50)
    low, high = np.quantile(np.array([ScalingLaw(**d).optimal_tokens(n) for d in summary["draws"]]), [0.05, 0.95], axis=0)
    right.fill_between(n, low, high, color="0.85", label="90 % bootstrap interval")
    right.plot(n, law.optimal_tokens(n), "k-", label=f"D*(N), here: N^{law.exponent:.2f}")
    for i, (task, own) in enumerate(summary["tasks"].items()):
        label = f"{task.replace('_', ' ')}: N^{own['exponent']:.2f}"
        style = ("--", "-.", (0, (1, 1)))[i % 3]
        right.plot(n, ScalingLaw(**own["law"]).optimal_tokens(n), linestyle=style, color="0.4", label=label)
    right.plot(n, PAPER[0] * n ** PAPER[1], "k:", label=f"the paper's {PAPER[0]:.0f} N^{PAPER[1]}")
    stars = [p for p in summary["profiles"].values() if "parameters" in p]
    if stars:
        right.plot(
            [p["parameters"] for p in stars], [p["tokens"] for p in stars], "k*", markersize=12, label="best of each budget"
        )
    right.plot([r["parameters"] for r in grid], [r["tokens"] for r in grid], ".", color="0.5", label="runs")
    right.set(
        xscale="log", yscale="log", xlabel="parameters without embeddings", ylabel="tokens", title="Compute-optimal tokens"
    )
    right.legend(frameon=False, fontsize="small")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure_png(figure)
