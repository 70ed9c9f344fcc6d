"""Which noise should a model train on? Held-out NELBO under each setting (the same bound for all), the variance of a training
step's gradient at the same weights, and the quality of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from components.maskers import BernoulliMasker
from components.types import Batch, NoisyBatch
from mdm.config import UserError
from mdm.pages.report import figure_png

Rows = Sequence[Mapping[str, Any]]
MEASURED = ("loss", "accuracy", "frechet", "distinct")  # and the loss of each task of a mixture
FIGURES = (
    ("loss", "held-out NELBO (bits per token)"),
    ("gradient_variance", "gradient variance of a step, against {first}"),
    ("accuracy", "samples judged right"),
    ("frechet", "Frechet distance of samples"),
)


@dataclass(frozen=True)
class TwoMasks(BernoulliMasker):
    """The control of anti-masking: consecutive samples are one sequence here too, but with two independent masks."""

    pairs: bool = True

    def __call__(self, batch: Batch) -> NoisyBatch:
        return BernoulliMasker.__call__(replace(self, pairs=False), batch)


def conclude(rows: Rows) -> tuple[dict[str, Any], str]:
    """Means over seeds of each setting, their differences from the first, and how sure they are. Raises UserError."""
    done = [r for r in rows if r["status"] == "finished"]
    names = list(dict.fromkeys(r["group"] for r in rows))
    own = {name: [r for r in done if r["group"] == name] for name in names}
    if not own[names[0]]:
        raise UserError(f"groups.{names[0]}: none of its runs finished, and the others are compared with it")
    first = own[names[0]]
    settings = {name: _compared(runs, first) for name, runs in own.items() if runs}
    lost = [r["cell"] for r in rows if r["status"] != "finished"]
    seeds = min(s["seeds"] for s in settings.values())
    summary = {"settings": settings, "first": names[0], "seeds": seeds, "left_out": lost, "unit": "bits per token"}
    lines = [
        f"Held-out NELBO of {names[0]}: {settings[names[0]]['loss']['mean']:.3f} bits per token ({seeds} "
        f"seed{'s' if seeds > 1 else ''} of each)."
    ]
    lines += [f"{name}: {_said(s)}." for name, s in list(settings.items())[1:]]
    if seeds < 3:
        lines.append("Fewer than three seeds: no difference here is a finding.")
    if lost:
        lines.append(f"Left out: {', '.join(lost)}.")
    return summary, "\n\n".join(lines)


def _compared(runs: Rows, first: Rows) -> dict[str, Any]:
    """A setting's figures: mean, standard deviation over seeds, and the difference from the first with its standard error.

    The gradient's variance was measured at the first setting's weights of the same seed: its ratios are paired.
    """
    found: dict[str, Any] = {"seeds": len(runs)}
    for key in (*MEASURED, *tasks(first)):
        values, theirs = _values(runs, key), _values(first, key)
        if len(values) and len(theirs):
            many = min(len(values), len(theirs)) > 1
            found[key] = {
                "mean": float(values.mean()),
                "std": float(values.std(ddof=1)) if many else None,
                "difference": float(values.mean() - theirs.mean()),
                "standard_error": float(np.hypot(_error(values), _error(theirs))) if many else None,
            }
    of_first = {r["seed"]: r for r in first}
    for key in ("gradient_variance", "squared_grad_norm"):
        pairs = [(r, of_first[r["seed"]]) for r in runs if r["seed"] in of_first]
        ratios = np.array([r[key] / other[key] for r, other in pairs if r.get(key) and other.get(key)])
        if len(ratios):
            found[key] = {"ratio": float(ratios.mean()), "standard_error": _error(ratios) if len(ratios) > 1 else None}
    return found


def tasks(rows: Rows) -> list[str]:
    """The columns of the tasks' losses, where there are several."""
    found = [key for key, value in rows[0].items() if key.startswith("bits/") and value is not None]
    return found if len(found) > 1 else []


def _values(runs: Rows, key: str) -> np.ndarray:
    return np.array([r[key] for r in runs if r.get(key) is not None], dtype=float)


def _error(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _said(s: Mapping[str, Any]) -> str:
    """A setting's differences in words; one within two standard errors is called so."""
    parts = []
    named = {"loss": ("NELBO", 3), "accuracy": ("accuracy", 3), "frechet": ("Frechet distance", 2)}
    named |= {key: (f"of {key.removeprefix('bits/').replace('_', ' ')}", 3) for key in s if key.startswith("bits/")}
    for key, (name, digits) in named.items():
        if key in s:
            d, error = s[key]["difference"], s[key]["standard_error"]
            noise = "" if error is None else f" +-{error:.{digits}f}" + ("" if abs(d) > 2 * error else " (within noise)")
            parts.append(f"{name} {d:+.{digits}f}{noise}")
    if "gradient_variance" in s:
        ratio, error = s["gradient_variance"]["ratio"], s["gradient_variance"]["standard_error"]
        parts.append(f"gradient variance {ratio:.2f}x" + ("" if error is None else f" +-{error:.2f}"))
    elif "squared_grad_norm" in s:
        parts.append(f"mean squared gradient norm {s['squared_grad_norm']['ratio']:.2f}x")
    return ", ".join(parts)


def draw(rows: Rows, summary: Mapping[str, Any]) -> bytes:
    """A panel for each figure: a dot for each seed, the mean, and a standard deviation over seeds (a ratio: standard error)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(summary["settings"])
    of_first = summary["settings"][summary["first"]]
    several = [
        (key, key.removeprefix("bits/").replace("_", " ") + " (bits per token)") for key in of_first if key.startswith("bits/")
    ]
    shown = several + [(key, label) for key, label in FIGURES if key in of_first and not (key == "loss" and several)]
    figure, axes = plt.subplots(
        1, len(shown), figsize=(3.6 * len(shown) + 1.5, 0.4 * len(names) + 1.6), sharey=True, squeeze=False
    )
    for axis, (key, label) in zip(axes[0], shown, strict=True):
        for place, name in enumerate(names):
            s = summary["settings"][name].get(key)
            if s is None:
                continue
            if "ratio" in s:
                axis.errorbar(s["ratio"], place, xerr=s["standard_error"] or 0, fmt="ks", capsize=3)
            else:
                own = [r[key] for r in rows if r["group"] == name and r["status"] == "finished" and r.get(key) is not None]
                axis.plot(own, [place] * len(own), ".", color="0.6")
                axis.errorbar(s["mean"], place, xerr=s["std"] or 0, fmt="ko", capsize=3)
        axis.axvline(of_first[key].get("ratio", of_first[key].get("mean")), color="0.7", lw=0.8, ls=":")
        axis.set(xlabel=label.format(first=summary["first"]))
        axis.locator_params(axis="x", nbins=5)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    return figure_png(figure)
