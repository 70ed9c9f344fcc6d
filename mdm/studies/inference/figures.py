"""What a sweep over inference settings looks like: quality against forward passes, and the effect of guidance."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mdm.pages.report import figure_png
from mdm.studies.inference.sweep import describe, label

QUALITIES = {
    "accuracy": "accuracy",
    "frechet": "Frechet distance",
    "ngram_bits": "bits a token under a held-out 3-gram",
    "entropy_bits": "entropy of the tokens, bits",
    "distinct": "share of distinct samples",
}


def pareto_figure(
    cells: Sequence[Mapping[str, Any]], base: Mapping[str, Any], chosen: Mapping[str, Any], title: str, samples: int
) -> bytes:
    """Quality against forwards, see `pareto`."""
    plt = _pyplot()
    shown = sum(m in base for m in QUALITIES)
    figure, axes = plt.subplots(1, shown, figsize=(4.4 * shown, 3.8))
    pareto(axes, cells, base, chosen, samples)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    return figure_png(figure)


def pareto(
    axes: Iterable[Any],
    cells: Sequence[Mapping[str, Any]],
    base: Mapping[str, Any],
    chosen: Mapping[str, Any],
    samples: int,
) -> None:
    """A panel for each quality: its value against forwards, a sign for each family of samplers; dotted: one token a step; the
    ring: the choice; bars: a standard error of the accuracy."""
    families = sorted({label(c["setting"]["sampler"]) for c in cells})
    axes = list(axes)
    for axis, measure in zip(axes, [m for m in QUALITIES if m in base], strict=True):
        for k, family in enumerate(families):
            own = [c for c in cells if label(c["setting"]["sampler"]) == family]
            x, y = [c["forwards"] for c in own], [c[measure] for c in own]
            error = [(v * (1 - v) / samples) ** 0.5 for v in y] if measure == "accuracy" else None
            axis.errorbar(x, y, error, fmt="osD^vPX*"[k % 8], ms=5, alpha=0.75, label=family, elinewidth=0.7, markeredgewidth=0)
        axis.axhline(base[measure], color="0.4", lw=0.9, ls=":")
        axis.plot(chosen["forwards"], chosen[measure], "o", ms=12, mfc="none", mec="black")
        axis.set_xscale("log", base=2)
        axis.set(xlabel="forward passes a sample", ylabel=QUALITIES[measure])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def effects_figure(cells: Sequence[Mapping[str, Any]], title: str) -> bytes | None:
    """The effect of guidance (and temperature) with everything else equal: the family of settings that varies them most."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for cell in cells:
        if isinstance(cell["setting"].get("guidance_scale"), Mapping):
            continue  # a scale that changes with time has no place on the axis
        fixed = {k: v for k, v in cell["setting"]["sampler"].items() if k != "temperature"}
        groups[json.dumps(fixed, sort_keys=True)].append(cell)
    largest = max(groups.values(), key=len)
    if len(largest) < 3:
        return None
    plt = _pyplot()
    shown = [m for m in ("accuracy", "frechet", "distinct", "ngram_bits", "entropy_bits") if m in largest[0]]
    guided = len({c["setting"].get("guidance_scale", 0.0) for c in largest}) > 1
    figure, axes = plt.subplots(1, len(shown), figsize=(3.7 * len(shown), 3.4))

    def at(cell: Mapping[str, Any]) -> tuple[float, float]:
        return cell["setting"].get("guidance_scale", 0.0), cell["setting"]["sampler"].get("temperature", 1.0)

    for axis, measure in zip(axes, shown, strict=True):
        for k, t in enumerate(sorted({at(c)[1] for c in largest}) if guided else [None]):
            own = sorted((at(c)[0 if guided else 1], c[measure]) for c in largest if t is None or at(c)[1] == t)
            axis.plot(
                *zip(*own, strict=True),
                "osD^v"[k % 5] + ("-", "--", ":", "-.")[k % 4],
                label=f"temperature {t:g}" if t else None,
            )
        axis.set(xlabel="guidance_scale w" if guided else "temperature", ylabel=measure.replace("_", " "))
        axis.spines[["top", "right"]].set_visible(False)
    if guided:
        axes[0].legend(frameon=False, fontsize=8)
    sampler = describe({"sampler": {k: v for k, v in largest[0]["setting"]["sampler"].items() if k != "temperature"}})
    figure.suptitle(f"{title}: {sampler.rsplit(', guidance', 1)[0]}", fontsize=10)
    figure.tight_layout()
    return figure_png(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
