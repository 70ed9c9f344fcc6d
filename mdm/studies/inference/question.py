"""Which sampler, how many steps, how much guidance? Quality against forward passes of every setting of `sweep_inference`.

A row is a setting: cell (in words), group (the modality), status, part (`untuned`, `one_per_step`, `grid`, or `real`: held-out
samples), setting (JSON), samples, seed, forwards (passes a sample), and accuracy, frechet, distinct, or of text ngram_bits,
entropy_bits, distinct.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mdm.config import UserError
from mdm.pages.report import figure_png
from mdm.studies.inference import sweep
from mdm.studies.inference.figures import pareto

Rows = Sequence[Mapping[str, Any]]
FIGURES = ("forwards", "accuracy", "frechet", "frechet_of_halves", "distinct", "ngram_bits", "entropy_bits")


def cells(rows: Rows) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Modality -> part -> its settings, each with the figures that it has."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for r in rows:
        figures = {k: r[k] for k in FIGURES if r.get(k) is not None}
        setting = {} if r["part"] == "real" else {"setting": json.loads(r["setting"])}
        found.setdefault(r["group"], {}).setdefault(r["part"], []).append({**setting, **figures})
    return found


def conclude(rows: Rows) -> tuple[dict[str, Any], str]:
    """For each modality one token a step, the fewest forwards as good, and the untuned setting. Raises UserError."""
    summary: dict[str, Any] = {}
    for name, parts in cells(rows).items():
        missing = [part for part in ("untuned", "one_per_step", "grid", "real") if part not in parts]
        if missing:
            raise UserError(f"inference: {name} has no setting of part {missing[0]}; a conclusion needs one")
        base = sweep.reference(parts["one_per_step"])
        chosen = sweep.best([*parts["one_per_step"], *parts["grid"]], base)
        summary[name] = {
            "one_per_step": base, "best": chosen, "untuned": parts["untuned"][0],
            "fewer_forwards": base["forwards"] / chosen["forwards"], "real": parts["real"][0],
        }  # fmt: skip
    samples = min(r["samples"] for r in rows)
    lines = [_finding(name, s) for name, s in summary.items()]
    lines.append(
        f"{samples} samples of one seed a setting: an accuracy is known to +-{0.5 / samples**0.5:.3f} at the most (a standard "
        "error), and the best of many settings is in part luck.\n"
    )
    return summary, "\n".join(lines)


def _finding(name: str, s: Mapping[str, Any]) -> str:
    """What the sweep says of a modality, in a paragraph."""

    def figures(cell: Mapping[str, Any]) -> str:
        return ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in cell.items() if isinstance(v, float))

    lines = [f"**{name}.** One token a step, {sweep.describe(s['one_per_step']['setting'])}: {figures(s['one_per_step'])}."]
    if s["fewer_forwards"] > 1:
        best = f"{sweep.describe(s['best']['setting'])}: {figures(s['best'])}"
        lines.append(f"As good with {s['fewer_forwards']:.1f}x fewer forwards, {best}.")
    else:
        lines.append("No setting with fewer forwards is as good.")
    lines.append(f"Untuned, {sweep.describe(s['untuned']['setting'])}: {figures(s['untuned'])}.")
    return " ".join([*lines, f"Real held-out samples: {figures(s['real'])}."]) + "\n"


def draw(rows: Rows, summary: Mapping[str, Any]) -> bytes:
    """Quality against forward passes: a line of panels for each modality; bars: a standard error of the accuracy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(summary), 3, figsize=(13.2, 3.6 * len(summary)), squeeze=False)
    known = cells(rows)
    for row, (name, s) in zip(axes, summary.items(), strict=True):
        every = [*known[name]["one_per_step"], *known[name]["grid"]]
        pareto(row, every, s["one_per_step"], s["best"], min(r["samples"] for r in rows if r["group"] == name))
        row[0].set_title(name, loc="left")
    figure.tight_layout()
    return figure_png(figure)
