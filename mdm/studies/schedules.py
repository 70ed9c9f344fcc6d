"""Which noise should a model train on? Held-out NELBO and the gradient's size under each setting, the same bound for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mdm.config import UserError
from mdm.report import figure_png

Rows = Sequence[Mapping[str, Any]]


def conclude(rows: Rows) -> tuple[dict[str, Any], str]:
    """Means over seeds of each setting, their differences from the first, and how sure they are. Raises UserError."""
    names = list(dict.fromkeys(r["group"] for r in rows))
    settings = {}
    for name in names:
        own = [r for r in rows if r["group"] == name and r["status"] == "finished"]
        if own:
            losses, norms = [r["loss"] for r in own], [r["squared_grad_norm"] for r in own]
            settings[name] = {
                "loss": float(np.mean(losses)),
                "loss_std": float(np.std(losses, ddof=1)) if len(own) > 1 else None,
                "squared_grad_norm": float(np.mean(norms)),
                "seeds": len(own),
            }
    if names[0] not in settings:
        raise UserError(f"groups.{names[0]}: none of its runs finished, and the others are compared with it")
    first = settings[names[0]]
    for setting in settings.values():
        both = [s["loss_std"] for s in (setting, first) if s["loss_std"] is not None]
        noise = float(np.sqrt(sum(s**2 for s in both) / setting["seeds"])) if len(both) == 2 else None
        setting["difference"] = setting["loss"] - first["loss"]
        setting["standard_error"] = noise
        setting["gradient_ratio"] = setting["squared_grad_norm"] / first["squared_grad_norm"]
    lost = [r["cell"] for r in rows if r["status"] != "finished"]
    summary = {"settings": settings, "first": names[0], "left_out": lost, "unit": "bits per token"}
    seeds = min(s["seeds"] for s in settings.values())
    lines = [
        f"Held-out NELBO of {names[0]}: {first['loss']:.3f} bits per token ({seeds} seed{'s' if seeds > 1 else ''} of each)."
    ]
    for name, s in list(settings.items())[1:]:
        lines.append(f"{name}: {s['difference']:+.3f}{_said(s)}, mean squared gradient norm {s['gradient_ratio']:.2f}x.")
    if seeds < 3:
        lines.append("Fewer than three seeds: no difference here is a finding.")
    if lost:
        lines.append(f"Left out: {', '.join(lost)}.")
    return summary, " ".join(lines)


def _said(s: Mapping[str, Any]) -> str:
    error = s["standard_error"]
    if error is None:
        return ""
    return f" +-{error:.3f}" + ("" if abs(s["difference"]) > 2 * error else " (within noise)")


def draw(rows: Rows, summary: Mapping[str, Any]) -> bytes:
    """Each setting's losses, a dot for each seed, and the mean squared gradient norm against the first's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(summary["settings"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.4 * len(names) + 1.6), sharey=True)
    for place, name in enumerate(names):
        own = [r["loss"] for r in rows if r["group"] == name and r["status"] == "finished"]
        s = summary["settings"][name]
        left.plot(own, [place] * len(own), ".", color="0.55")
        left.errorbar(s["loss"], place, xerr=s["loss_std"] or 0, fmt="ko", capsize=3)
        right.barh(place, s["gradient_ratio"], color="0.7" if place else "0.4")
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set(xlabel="held-out NELBO (bits per token); bars: a standard deviation over seeds")
    right.set(xlabel=f"mean squared gradient norm, against {summary['first']}")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure_png(figure)
