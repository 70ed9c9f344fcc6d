"""Which corruption should a model train on? The bound of each task under each noise, and the quality of samples against forward
passes, without and with self-correction: MODALITY/FIGURE/PASSES/SAMPLER are the columns of mdm/studies/measures.py's `Passes`.

At each number of passes the best sampler is shown: by accuracy, mean over seeds; of text by n-gram bits, among those within
half a bit of the highest entropy, since dull text is likely too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mdm.config import UserError
from mdm.pages.report import figure_png
from mdm.studies.measures import CORRECTED
from mdm.studies.seeds import Rows, compared, mean, signed, sure, values, with_error

FEW = 2  # passes at which the best noise is compared with the first group's at more
JUDGED, FLUENT = ("accuracy", "frechet"), ("ngram_bits", "entropy_bits")  # what is shown; by the first one a sampler is chosen
BESIDE = ("distinct", "forwards")
FIGURES = {  # in a sentence, with how many decimals; at an axis
    "accuracy": ("accuracy", 3, "samples judged right"),
    "frechet": ("Frechet distance", 2, "Frechet distance"),
    "ngram_bits": ("n-gram bits", 2, "n-gram bits a token"),
    "entropy_bits": ("entropy", 2, "entropy of the tokens (bits)"),
}


def conclude(rows: Rows) -> tuple[dict[str, Any], str]:
    """Bounds, quality by passes, what self-correction gives: means over seeds and standard errors. Raises UserError."""
    done = [r for r in rows if r["status"] == "finished"]
    names = list(dict.fromkeys(r["group"] for r in rows))
    own = {name: runs for name in names if (runs := [r for r in done if r["group"] == name])}
    if names[0] not in own:
        raise UserError(f"groups.{names[0]}: none of its runs finished, and the others are compared with it")
    first, grid = own[names[0]], measured(done)
    tasks = [key for key in first[0] if key.startswith("bits/") and first[0][key] is not None]
    summary: dict[str, Any] = {"first": names[0], "seeds": min(map(len, own.values())), "unit": "bits per token", "groups": {}}
    for name, runs in own.items():
        bits = {key[5:].replace("_", " "): compared(runs, key, first, key) for key in tasks if len(values(runs, key))}
        quality = {modality: curves(runs, modality, at) for modality, at in grid.items()}
        summary["groups"][name] = {"seeds": len(runs), "bits": bits, "quality": quality}
    for modality, at in grid.items():
        of = {name: s["quality"][modality] for name, s in summary["groups"].items()}
        summary.setdefault("many_passes", {})[modality] = _many(own, of, modality, max(at))
        summary.setdefault("correction", {})[modality] = {n: _correction(runs, of[n], modality) for n, runs in own.items()}
        if (best := _few(own, of, modality)) is not None:
            summary.setdefault("few_passes", {})[modality] = best
    summary["left_out"] = [r["cell"] for r in rows if r["status"] != "finished"]
    summary["not_measured"] = [r["cell"] for r in done if not _whole(r, grid)]
    return summary, "\n\n".join(_lines(summary))


def measured(rows: Rows) -> dict[str, dict[int, list[str]]]:
    """Modality -> passes -> the samplers that some row was measured with."""
    found: dict[str, dict[int, list[str]]] = {}
    for key in dict.fromkeys(key for row in rows for key, value in row.items() if value is not None):
        match key.split("/"):
            case [modality, _, passes, sampler] if passes.isdigit():
                samplers = found.setdefault(modality, {}).setdefault(int(passes), [])
                samplers += [sampler] if sampler not in samplers else []
    return {modality: dict(sorted(at.items())) for modality, at in found.items()}


def _whole(row: Mapping[str, Any], grid: Mapping[str, Mapping[int, Sequence[str]]]) -> bool:
    """Whether a row has figures at every number of passes, by whichever sampler."""
    own = measured([row])
    return all(passes in own.get(modality, {}) for modality, at in grid.items() for passes in at)


def curves(runs: Rows, modality: str, grid: Mapping[int, Sequence[str]]) -> dict[str, list[dict[str, Any]]]:
    """plain, corrected: at each number of passes the best sampler, and its figures."""
    found: dict[str, list[dict[str, Any]]] = {"plain": [], "corrected": []}
    for passes, samplers in grid.items():
        for kind, points in found.items():
            own = [s for s in samplers if s.endswith(CORRECTED) == (kind == "corrected")]
            points += [point] if (point := _best(runs, modality, passes, own)) else []
    return found


def _best(runs: Rows, modality: str, passes: int, samplers: Iterable[str]) -> dict[str, Any] | None:
    """The best of some samplers, with its figures; None where none was measured."""
    points: list[dict[str, Any]] = []
    for sampler in samplers:
        keys = {figure: f"{modality}/{figure}/{passes}/{sampler}" for figure in (*JUDGED, *FLUENT, *BESIDE)}
        figures = {figure: mean(values(runs, key)) for figure, key in keys.items() if len(values(runs, key))}
        if JUDGED[0] in figures or FLUENT[0] in figures:
            points.append({"passes": passes, "sampler": sampler, **figures})
    if not points:
        return None
    if shown(points[0]) == JUDGED:
        return max(points, key=lambda p: p["accuracy"]["mean"])
    top = max(p["entropy_bits"]["mean"] for p in points)
    return min((p for p in points if p["entropy_bits"]["mean"] >= top - 0.5), key=lambda p: p["ngram_bits"]["mean"])


def shown(point: Mapping[str, Any]) -> tuple[str, str]:
    """The figures of a point that are shown."""
    return JUDGED if JUDGED[0] in point else FLUENT


def _key(modality: str, figure: str, point: Mapping[str, Any]) -> str:
    return f"{modality}/{figure}/{point['passes']}/{point['sampler']}"


def _at(points: Sequence[Mapping[str, Any]], passes: int) -> Any:
    """The point at a number of passes, or None."""
    return next((p for p in points if p["passes"] == passes), None)


def _versus(own: Mapping[str, Rows], modality: str, figure: str, name: str, point: Any, other: Any) -> dict[str, Any]:
    """A group's point compared with one of the first group."""
    first = next(iter(own))
    return compared(own[name], _key(modality, figure, point), own[first], _key(modality, figure, other))


def _few(own: Mapping[str, Rows], of: Mapping[str, Any], modality: str) -> dict[str, Any] | None:
    """The most accurate of the other groups at few passes, and how far behind it the first one is at each number of passes.

    reached: the fewest passes with which the first is within two standard errors of it; None: with none
    """
    first, *others = own
    at = {name: p for name in others if (p := _at(of[name]["plain"], FEW)) and JUDGED[0] in p}
    theirs = [p for p in of[first]["plain"] if p["passes"] >= FEW]
    if not at or not theirs or theirs[0]["passes"] != FEW:
        return None
    best = max(at, key=lambda name: at[name]["accuracy"]["mean"])
    behind = []
    for p in theirs:
        c = _versus(own, modality, "accuracy", best, at[best], p)
        behind.append({**p, "difference": c["difference"], "difference_error": c["difference_error"]})
    reached = next((b["passes"] for b in behind if not sure(b) or b["difference"] <= 0), None)
    level = next((b["passes"] for b in behind if b["difference"] <= 0), None)
    return {"group": best, **at[best], "first": behind, "reached": reached, "reached_by_mean": level}


def _many(own: Mapping[str, Rows], of: Mapping[str, Any], modality: str, most: int) -> dict[str, Any]:
    """Each other group against the first at the most passes."""
    first, *others = own
    theirs = _at(of[first]["plain"], most)
    at = {name: p for name in others if (p := _at(of[name]["plain"], most)) and theirs}
    found = {n: {f: _versus(own, modality, f, n, p, theirs) for f in shown(p) if f in p} for n, p in at.items()}
    return {"passes": most, "first": theirs, "groups": found}


def _correction(runs: Rows, quality: Mapping[str, Any], modality: str) -> list[dict[str, Any]]:
    """What self-correction changes at equal passes: of the same models, so that differences are taken seed by seed."""
    found = []
    for p in quality["corrected"]:
        plain = _at(quality["plain"], p["passes"])
        figures = {}
        for figure in shown(p) if plain else ():
            pairs = [(r.get(_key(modality, figure, p)), r.get(_key(modality, figure, plain or {}))) for r in runs]
            if apart := [a - b for a, b in pairs if a is not None and b is not None]:
                d = mean(np.array(apart))
                figures[figure] = {"difference": d["mean"], "difference_error": d["standard_error"]}
        found += [{"passes": p["passes"], **figures}] if figures else []
    return found


def _lines(summary: Mapping[str, Any]) -> list[str]:
    """The finding, in paragraphs."""
    first, groups, seeds = summary["first"], summary["groups"], summary["seeds"]
    bounds = ", ".join(f"{task} {c['mean']:.3f}" for task, c in groups[first]["bits"].items())
    lines = [f"Held-out bound of {first}, bits per token: {bounds} ({seeds} seed{'s' if seeds > 1 else ''} of each)."]
    for name, s in list(groups.items())[1:]:
        lines.append(f"{name}: " + ", ".join(f"{task} {signed(c, 3)}" for task, c in s["bits"].items()) + ".")
    lines.append(
        "A bound is above the bits of its own model by a gap that depends on the noise: bounds of different families are not "
        "comparable by tightness, and a lower one says nothing of samples."
    )
    lines += [_said_few(first, modality, best) for modality, best in summary.get("few_passes", {}).items()]
    for modality, by_group in summary.get("correction", {}).items():
        parts = [f"{name}: {_said_correction(found)}" for name, found in by_group.items() if found]
        lines += [f"**Self-correction, {modality}**, at equal passes. {'. '.join(parts)}."] if parts else []
    for modality, found in summary.get("many_passes", {}).items():
        if found["groups"]:
            said = [f"{n} {_figures(figures)}" for n, figures in found["groups"].items()]
            lines.append(f"**{modality} at {found['passes']} passes**, against {first}: {'; '.join(said)}.")
    luck = (
        f"Standard errors of {seeds} seeds: with three, two of them are exceeded in one of eight comparisons of equals (with "
        "and without correction, of the same models, in one of five), and the best of several is in part luck."
    )
    lines.append("Fewer than three seeds: no difference here is a finding." if seeds < 3 else luck)
    for key, what in (("left_out", "Left out"), ("not_measured", "Not measured, or in part")):
        lines += [f"{what}: {', '.join(summary[key])}."] if summary[key] else []
    return lines


def _said_few(first: str, modality: str, best: Mapping[str, Any]) -> str:
    """Whether the first group needs more passes for what the best of the others has with few."""
    behind = best["first"]
    said = (
        f"**{modality} at {FEW} passes.** Best of the others is {best['group']} ({best['sampler']}), accuracy "
        f"{with_error(best['accuracy'])}; {first} ({behind[0]['sampler']}) {with_error(behind[0]['accuracy'])}. "
    )
    if best["reached"] == FEW:
        return said + f"The difference is {signed(behind[0], 3)}: no family saves passes here."
    takes = f"more than {behind[-1]['passes']} passes"
    if best["reached"] is not None:
        then = with_error(_at(behind, best["reached"])["accuracy"])
        takes = f"{best['reached']} passes ({then}), {best['reached'] / FEW:g}x as many"
    level = best["reached_by_mean"]
    more = f" (its mean is as high with {level})" if level not in (None, best["reached"]) else ""
    return said + f"To come within two standard errors of that takes {takes} with {first}{more}."


def _said_correction(found: Sequence[Mapping[str, Any]]) -> str:
    """The numbers of passes at which correction changes something, and the others."""
    main = [(p, next(p[f] for f in (JUDGED[0], FLUENT[0]) if f in p)) for p in found]
    parts = [f"{_figures({k: v for k, v in p.items() if k in FIGURES})} at {p['passes']}" for p, d in main if sure(d)]
    same = [str(p["passes"]) for p, d in main if not sure(d)]
    return "; ".join([*parts, *([f"within noise at {', '.join(same)}"] if same else [])])


def _figures(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{FIGURES[f][0]} {signed(c, FIGURES[f][1])}" for f, c in figures.items())


def draw(rows: Rows, summary: Mapping[str, Any]) -> bytes:
    """For each modality two figures against passes, and what self-correction adds to the first; below, the bounds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups, modalities = summary["groups"], list(summary.get("many_passes", {}))
    wide = max(len(modalities), 1)
    bounds = 0.42 * max(len(s["bits"]) for s in groups.values()) + 1.2
    heights = [3.0, 3.0, 2.4] * bool(modalities) + [bounds]
    figure = plt.figure(figsize=(4.3 * wide + 0.5, sum(heights) + 0.6), layout="constrained")
    grid = figure.add_gridspec(len(heights), wide, height_ratios=heights)
    styles = {name: {"color": f"C{i % 10}", "marker": "osD^vPX*"[i % 8]} for i, name in enumerate(groups)}
    for column, modality in enumerate(modalities):
        of = {name: s["quality"][modality] for name, s in groups.items()}
        at = sorted({p["passes"] for q in of.values() for p in q["plain"]})
        figures = next((shown(p) for q in of.values() for p in q["plain"]), JUDGED)
        for row, key in enumerate(figures):
            axis = figure.add_subplot(grid[row, column])
            for name, q in of.items():
                points = [(p["passes"], p[key]["mean"], p[key]["standard_error"]) for p in q["plain"] if key in p]
                _line(axis, points, styles[name])
            _against_passes(axis, FIGURES[key][2], at)
            axis.set_yscale("log" if key == "frechet" else "linear")
            axis.set_title(modality if row == 0 else "", loc="left")
        axis = figure.add_subplot(grid[2, column])
        for name, found in summary["correction"][modality].items():
            points = [(p["passes"], *p[figures[0]].values()) for p in found if figures[0] in p]
            _line(axis, points, {**styles[name], "ls": "--", "mfc": "white"})
        axis.axhline(0, color="0.7", lw=0.8, ls=":")
        _against_passes(axis, f"self-correction:\n{FIGURES[figures[0]][0]}, difference", at)
    axis = figure.add_subplot(grid[-1, :])
    _bounds(axis, summary, styles)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=min(len(groups), 6), frameon=False)
    return figure_png(figure)


def _line(axis: Any, points: Sequence[tuple[int, float, float | None]], style: Mapping[str, Any]) -> None:
    """Means joined by a line, with bars of a standard error."""
    if points:
        x, y, error = zip(*points, strict=True)
        axis.errorbar(x, y, [e or 0 for e in error], ms=4.5, lw=1.3, elinewidth=0.9, capsize=2, **style)


def _against_passes(axis: Any, label: str, passes: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(passes, passes)
    axis.set(xlabel="forward passes", ylabel=label)
    axis.spines[["top", "right"]].set_visible(False)


def _bounds(axis: Any, summary: Mapping[str, Any], styles: Mapping[str, Mapping[str, Any]]) -> None:
    """Of each task every group's bound against that of the first."""
    groups, first = summary["groups"], summary["first"]
    names = list(groups[first]["bits"])
    for i, (name, s) in enumerate(groups.items()):
        own = [(t, s["bits"][t]) for t in names if t in s["bits"]]
        x, error = [c["difference"] for _, c in own], [(c["difference_error"] or 0) * (name != first) for _, c in own]
        y = [names.index(t) + 0.11 * (i - (len(groups) - 1) / 2) for t, _ in own]
        axis.errorbar(x, y, xerr=error, ls="", ms=4.5, elinewidth=0.9, capsize=2, label=name, **styles[name])
    axis.axvline(0, color="0.7", lw=0.8, ls=":")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlabel=f"held-out bound, difference from {first} (bits per token)")
    axis.spines[["top", "right"]].set_visible(False)
