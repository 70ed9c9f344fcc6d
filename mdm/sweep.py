"""A sweep over inference settings: the grid, its cells on disk, the choice among them, and what they look like."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.data.reading import json_lines
from mdm.config import UserError
from mdm.report import figure_png


def expand(node: Any) -> Iterator[Any]:
    """Every combination of the lists in a grid entry: {a: [1, 2], b: {c: [3, 4]}} is four."""
    if isinstance(node, Mapping):
        for values in itertools.product(*(list(expand(v)) for v in node.values())):
            yield dict(zip(node, values, strict=True))
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for value in node:
            yield from expand(value)
    else:
        yield node


def label(sampler: Mapping[str, Any]) -> str:
    """The family of a sampler's node: its class, and what is inside blocks."""
    name = sampler["_component_"].rsplit(".", 1)[-1]
    return f"{name}, {label(sampler['sampler'])}" if "sampler" in sampler else name


def describe(setting: Mapping[str, Any]) -> str:
    """A setting in one line."""

    def short(node: Any) -> str:
        if isinstance(node, Mapping):
            inner = ", ".join(f"{k}={short(v)}" for k, v in node.items() if k != "_component_")
            return f"{node['_component_'].rsplit('.', 1)[-1]}({inner})"
        return str(node)

    return f"{short(setting['sampler'])}, guidance_scale={short(setting.get('guidance_scale', 0.0))}"


class Cells:
    """What has been measured, a line of JSON for each cell: a sweep that is started again goes on behind the last one."""

    def __init__(self, folder: Path, of: Mapping[str, Any]) -> None:
        """Raises UserError where the folder holds a sweep of something else."""
        self.path = folder / "cells.jsonl"
        header = folder / "sweep.json"
        if header.is_file() and json.loads(header.read_text()) != of:
            raise UserError(
                f"output_dir {folder} holds a sweep of another checkpoint, number of samples or seed; choose another"
            )
        header.write_text(json.dumps(of))
        lines = [c for _, c in json_lines(self.path) if isinstance(c, dict)] if self.path.is_file() else []  # one may be torn
        self.known = {self.key(c["modality"], c["setting"]): c for c in lines if {"modality", "setting"} <= set(c)}

    @staticmethod
    def key(modality: str, setting: Mapping[str, Any]) -> str:
        return json.dumps([modality, setting], sort_keys=True)

    def get(self, modality: str, setting: Mapping[str, Any]) -> dict[str, Any] | None:
        return self.known.get(self.key(modality, setting))

    def add(self, modality: str, setting: Mapping[str, Any], measured: Mapping[str, float]) -> dict[str, Any]:
        """Keeps a cell, on disk at once."""
        cell = {"modality": modality, "setting": dict(setting), **measured}
        with self.path.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        self.known[self.key(modality, setting)] = cell
        return cell


def reference(cells: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The best of the cells that take one token a step: of those within 0.01 of the highest accuracy, the lowest Frechet
    distance; for text, the lowest n-gram bits among those that keep within 0.5 bits of the highest entropy."""
    if "accuracy" in cells[0]:
        top = max(c["accuracy"] for c in cells)
        return min((c for c in cells if c["accuracy"] >= top - 0.01), key=lambda c: c["frechet"])
    top = max(c["entropy_bits"] for c in cells)
    return min((c for c in cells if c["entropy_bits"] >= top - 0.5), key=lambda c: c["ngram_bits"])


def best(cells: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fewest forwards at the quality of `base`: accuracy within 0.02 and Frechet distance at most 1.1 times it; for text,
    n-gram bits at most 1.02 times it and entropy within 0.1 bits."""

    def good(c: Mapping[str, Any]) -> bool:
        if "accuracy" in c:
            return c["accuracy"] >= base["accuracy"] - 0.02 and c["frechet"] <= 1.1 * base["frechet"]
        return c["ngram_bits"] <= 1.02 * base["ngram_bits"] and c["entropy_bits"] >= base["entropy_bits"] - 0.1

    quality = "frechet" if "accuracy" in base else "ngram_bits"
    return min((c for c in [*cells, base] if good(c)), key=lambda c: (round(c["forwards"], 1), c[quality]))


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
