"""Which block size? The bound of each task, and quality, passes and time of decoders, from autoregressive to masked diffusion;
and the variance of the loss by the shares of a block that are masked (BD3-LM's search).

Columns beside those of mdm/studies/table.py: MODALITY/FIGURE/DECODER and clipping/MODALITY/LEAST-MOST, see `Decoders` and
`ClippedCounts` of mdm/studies/measures.py. The sizes are those of `model.blocks`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mdm.config import UserError
from mdm.pages.report import figure_png
from mdm.studies.decoders import (
    FIGURES,
    bits_of,
    by_group,
    decoded,
    in_words,
    kinds,
    line,
    measured,
    of_each,
    reservations,
    spoken,
    tasks_of,
)
from mdm.studies.seeds import Rows, mean, signed, sure, values, with_error

WHOLE = "0-1"


def conclude(rows: Rows) -> tuple[dict[str, Any], str]:
    """Bounds, decoders and clipped counts by block size: means over seeds and standard errors. Raises UserError."""
    own, first = by_group(rows), rows[0]["group"]
    done = [r for runs in own.values() for r in runs]
    summary: dict[str, Any] = {"first": first, "seeds": min(map(len, own.values())), "unit": "bits per token", "groups": {}}
    for name, runs in own.items():
        if not runs[0].get("model.blocks"):
            raise UserError(f"groups.{name}: it has no model.blocks, which this study compares")
        summary["groups"][name] = {
            "seeds": len(runs),
            "blocks": json.loads(runs[0]["model.blocks"]),
            "bits": bits_of(runs, own[first]),
            "decoders": decoded(runs, own[first]),
            "clipping": _clipping(runs),
        }
    summary["left_out"] = [r["cell"] for r in rows if r["status"] != "finished"]
    summary["not_measured"] = [r["cell"] for r in done if kinds([r]) != kinds(done)]
    return summary, "\n\n".join(_lines(summary))


def _clipping(runs: Rows) -> dict[str, dict[str, Any]]:
    """Modality -> the shares of the least variance, mean over seeds, and its ratio to that of all counts, seed by seed."""
    found: dict[str, dict[str, Any]] = {}
    keys = dict.fromkeys(k for r in runs for k in measured(r) if k[0] == "clipping")
    for modality in dict.fromkeys(k[1] for k in keys):
        by_range = {k[2]: values(runs, "/".join(k)) for k in keys if k[1] == modality}
        whole = by_range.get(WHOLE)
        if whole is None:
            continue
        same = {shares: v for shares, v in by_range.items() if len(v) == len(whole)}
        best = min(same, key=lambda shares: (float(same[shares].mean()), -_width(shares)))
        ratio = same[best] / np.maximum(whole, 1e-12) if best != WHOLE else np.ones(len(whole))
        found[modality] = {"shares": best, "variance": mean(same[best]), "whole": mean(whole), "ratio": mean(ratio)}
    return found


def _width(shares: str) -> float:
    least, most = map(float, shares.split("-"))
    return most - least


def _lines(summary: Mapping[str, Any]) -> list[str]:
    """The finding, in paragraphs."""
    first, groups, seeds = summary["first"], summary["groups"], summary["seeds"]
    bounds = ", ".join(f"{spoken(task)} {with_error(c)}" for task, c in groups[first]["bits"].items())
    lines = [f"Held-out bound in blocks of {_sizes(groups[first])} ({first}), bits per token: {bounds} ({of_each(seeds)})."]
    for name, s in list(groups.items())[1:]:
        apart = ", ".join(f"{spoken(task)} {signed(c, 3)}" for task, c in s["bits"].items())
        lines.append(f"{name}, blocks of {_sizes(s)}: {apart}.")
    for modality in groups[first]["decoders"]:
        parts = []
        for s in groups.values():
            decoders = s["decoders"].get(modality, {})
            said = "; ".join(f"{decoder}: {in_words(figures)}" for decoder, figures in decoders.items())
            parts += [f"Blocks of {s['blocks'].get(modality, 'the canvas')}: {said}."] if said else []
        lines.append(f"**{modality}**, of a sample. {' '.join(parts)}")
    lines += [
        _best(groups, modality) for modality, decoders in groups[first]["decoders"].items() if "accuracy" in _any(decoders)
    ]
    if any(s["clipping"] for s in groups.values()):
        lines.append(_said_clipping(groups))
    return lines + reservations(summary)


def _best(groups: Mapping[str, Any], modality: str) -> str:
    """The most accurate size of each decoder, and whether it is surely ahead of the first group's."""
    parts = []
    for decoder in next(iter(groups.values()))["decoders"][modality]:
        at = {n: f["accuracy"] for n, s in groups.items() if (f := s["decoders"].get(modality, {}).get(decoder))}
        best = max(at, key=lambda name: at[name]["mean"])
        ahead = next(iter(groups)) == best or not sure(at[best])
        what = "no size is surely ahead of the first" if ahead else f"{signed(at[best], 3)} against the first"
        parts.append(f"{decoder}: blocks of {groups[best]['blocks'].get(modality)}, {with_error(at[best])} ({what})")
    return f"**Most accurate, {modality}**: {'; '.join(parts)}."


def _said_clipping(groups: Mapping[str, Any]) -> str:
    parts = []
    for s in groups.values():
        for modality, c in s["clipping"].items():
            size = s["blocks"].get(modality, "the canvas")
            same = "any shares" if c["shares"] == WHOLE else f"{c['shares']} ({with_error(c['ratio'], 2)}x)"
            parts.append(f"{modality} in blocks of {size}: {same}")
    return (
        "**Shares of a block to mask, by the variance of its loss** (of the ranges that were looked at; against every count): "
        f"{'; '.join(parts)}."
    )


def _any(decoders: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(iter(decoders.values()))


def _sizes(group: Mapping[str, Any]) -> str:
    return ", ".join(f"{n} ({modality})" for modality, n in group["blocks"].items())


def draw(rows: Rows, summary: Mapping[str, Any]) -> bytes:
    """For each modality, against the positions of a block: the bound, quality, passes and time of the decoders, and the
    variance of the loss when its counts are clipped."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(summary["groups"].values())
    modalities = [m for m in groups[0]["blocks"] if tasks_of(m, list(groups[0]["bits"])) or m in groups[0]["decoders"]]
    wide, decoders = max(len(modalities), 1), list(dict.fromkeys(d for g in groups for m in g["decoders"].values() for d in m))
    figure, axes = plt.subplots(5, wide, figsize=(4.3 * wide + 0.5, 13.0), squeeze=False, layout="constrained")
    for column, modality in zip(axes.T, modalities, strict=False):
        of = [(g["blocks"][modality], g) for g in groups if modality in g["blocks"]]
        column[0].set_title(modality, loc="left")
        for i, task in enumerate(tasks_of(modality, list(groups[0]["bits"]))):
            style = {"color": "0.25", "marker": "o^"[i % 2], "label": spoken(task)}
            line(column[0], [(n, g["bits"][task]) for n, g in of if task in g["bits"]], style)
        column[0].set_ylabel("held-out bound (bits per token)")
        quality = next((f for f in ("accuracy", "ngram_bits") if any(f in d for d in _of(groups, modality))), "accuracy")
        for axis, key in zip(column[1:4], (quality, "forwards", "seconds"), strict=True):
            for i, decoder in enumerate(decoders):
                points = [(n, d[key]) for n, g in of if key in (d := g["decoders"].get(modality, {}).get(decoder, {}))]
                line(axis, points, {"color": f"C{i}", "marker": "osD^v"[i % 5], "label": decoder})
            axis.set_ylabel(FIGURES[key][0])
            axis.set_yscale("linear" if key == quality else "log")
        clipped = [(n, g["clipping"][modality]) for n, g in of if modality in g["clipping"]]
        line(column[4], [(n, c["ratio"]) for n, c in clipped], {"color": "0.25", "marker": "o"})
        for n, c in clipped:
            shares = "any" if c["shares"] == WHOLE else c["shares"].replace("-", " to ")
            column[4].annotate(shares, (n, c["ratio"]["mean"]), (0, 6), textcoords="offset points", ha="center", fontsize=7)
        column[4].set_ylabel("variance of a block's loss,\nclipped / every count")
        column[4].set_ylim(0, 1.2)
        for axis in column:
            axis.set_xscale("log", base=2)
            axis.set_xticks([n for n, _ in of], [n for n, _ in of])
            axis.set_xlabel("positions of a block")
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[0]:
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=8)
    if decoders and modalities:
        handles, labels = axes[1][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(decoders), frameon=False)
    return figure_png(figure)


def _of(groups: Sequence[Mapping[str, Any]], modality: str) -> list[Mapping[str, Any]]:
    return [figures for g in groups for figures in g["decoders"].get(modality, {}).values()]
