"""The figure of the study: likelihoods, samples against passes, and the order that was learned, a column for each modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mdm.pages.report import figure_png
from mdm.studies.decoders import FIGURES, spoken, tasks_of
from mdm.studies.seeds import Rows

MARKERS = "osD^vP*"


def draw(rows: Rows, summary: Mapping[str, Any]) -> bytes:
    """For each modality bits per token by group, and quality against forward passes by group and decoder; below, where one was
    learned, the mean rank of every position of a canvas."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    groups = summary["groups"]
    tasks = list(groups[summary["first"]]["bits"])
    modalities = list(dict.fromkeys(m for s in groups.values() for m in (*s["decoders"], *s["order"])))
    modalities = modalities or [m for m in ("image", "audio", "text") if tasks_of(m, tasks)]
    learned = next((s["order"] for s in groups.values() if s["order"]), {})
    colours = {name: f"C{i % 10}" for i, name in enumerate(groups)}
    decoders = list(dict.fromkeys(d for s in groups.values() for of in s["decoders"].values() for d in of))
    markers = {d: MARKERS[i % len(MARKERS)] for i, d in enumerate(decoders)}
    heights = [0.42 * len(groups) + 0.9, 3.2, *([3.4] if learned else [])]
    wide = max(len(modalities), 1)
    figure = plt.figure(figsize=(4.6 * wide, sum(heights) + 1.2), layout="constrained")
    grid = figure.add_gridspec(len(heights), wide, height_ratios=heights)
    for column, modality in enumerate(modalities):
        axis = figure.add_subplot(grid[0, column])
        _bits(axis, groups, tasks_of(modality, tasks), colours, named=column == 0)
        axis.set_title(modality, loc="left")
        _quality(figure.add_subplot(grid[1, column]), groups, modality, colours, markers)
        if modality in learned:
            _learned(figure, figure.add_subplot(grid[2, column]), learned[modality])
    handles = [Line2D([], [], color=c, lw=3, label=name) for name, c in colours.items()]
    handles += [Line2D([], [], color="0.3", ls="", marker=m, label=d) for d, m in markers.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=max(len(colours), 1), frameon=False, fontsize=8)
    return figure_png(figure)


def _bits(axis: Any, groups: Mapping[str, Any], tasks: Sequence[str], colours: Mapping[str, str], named: bool) -> None:
    """Of each group the bits that it was validated with, and below them those from left to right."""
    for i, (name, s) in enumerate(groups.items()):
        for task in tasks:
            for key, up, style in (("bits", -0.13, {"marker": "o"}), ("left_to_right", 0.13, {"marker": "<", "mfc": "white"})):
                if c := s[key].get(task):
                    axis.errorbar(
                        c["mean"], i + up, xerr=c["standard_error"] or 0, color=colours[name], ms=5, capsize=2, ls="", **style
                    )
    axis.set_yticks(range(len(groups)), list(groups) if named else [""] * len(groups))
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.set_xlabel(
        f"{', '.join(map(spoken, tasks))}: bits per token\n(full: as validated; empty: from left to right)", fontsize=8
    )
    axis.spines[["top", "right"]].set_visible(False)


def _quality(
    axis: Any, groups: Mapping[str, Any], modality: str, colours: Mapping[str, str], markers: Mapping[str, str]
) -> None:
    """A point for each group and decoder."""
    figures = [f for s in groups.values() for f in s["decoders"].get(modality, {}).values()]
    quality = next((f for f in ("accuracy", "ngram_bits") if any(f in own for own in figures)), None)
    if quality is None:
        axis.set_axis_off()
        return
    for i, (name, s) in enumerate(groups.items()):
        for decoder, f in s["decoders"].get(modality, {}).items():
            if quality in f and "forwards" in f:
                beside = 1.05 ** (i - (len(groups) - 1) / 2)  # of a token a pass they would lie on one another
                axis.errorbar(
                    f["forwards"]["mean"] * beside, f[quality]["mean"], f[quality]["standard_error"] or 0, color=colours[name],
                    marker=markers[decoder], ms=5, elinewidth=0.8, capsize=2, ls="", alpha=0.85,
                )  # fmt: skip
    axis.set_xscale("log", base=2)
    ticks = [2**k for k in range(1, 8) if 2**k <= 2 * max(f["forwards"]["mean"] for f in figures if "forwards" in f)]
    axis.set_xticks(ticks, ticks)
    axis.set(xlabel="forward passes a sample", ylabel=FIGURES[quality][0])
    axis.spines[["top", "right"]].set_visible(False)


def _learned(figure: Any, axis: Any, order: Mapping[str, Any]) -> None:
    """The mean rank of each position: of a canvas of rows and columns as colours, of a line as a line."""
    ranks = np.array(order["ranks"])
    if ranks.shape[1] == 1:
        error = np.zeros(len(ranks)) if order["error"] is None else np.array(order["error"])[:, 0]
        place = np.arange(1, len(ranks) + 1)
        axis.plot(place, ranks[:, 0], color="0.2", lw=1.2)
        axis.fill_between(place, ranks[:, 0] - error, ranks[:, 0] + error, color="0.2", alpha=0.2, lw=0)
        axis.axhline((len(ranks) + 1) / 2, color="0.6", lw=0.8, ls=":")
        axis.set(xlabel="position (token)", ylabel="mean rank in the learned order")
        axis.spines[["top", "right"]].set_visible(False)
        return
    square = ranks.shape[0] == ranks.shape[1]
    shown = ranks if square else ranks.T
    middle = (ranks.size + 1) / 2
    reach = max(float(np.abs(ranks - middle).max()), 1e-3)
    image = axis.imshow(shown, cmap="RdBu", vmin=middle - reach, vmax=middle + reach, aspect="equal" if square else "auto")
    if square:
        for (row, column), rank in np.ndenumerate(shown):
            dark = abs(rank - middle) > 0.6 * reach
            axis.text(
                column,
                row,
                f"{rank:.{1 if reach > 0.5 else 3}f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )
    axis.set(xlabel="column of patches" if square else "frame", ylabel="row of patches" if square else "codebook")
    axis.set_xticks(range(0, shown.shape[1], 1 if square else 2), range(1, shown.shape[1] + 1, 1 if square else 2))
    axis.set_yticks(range(shown.shape[0]), range(1, shown.shape[0] + 1))
    bar = figure.colorbar(image, ax=axis, orientation="horizontal" if not square else "vertical")
    bar.set_label("mean rank in the learned order (red: early)", fontsize=8)
