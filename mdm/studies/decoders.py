"""What several seeds say of decoders (columns MODALITY/FIGURE/DECODER of `mdm.studies.measures.Scored`), in words and lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from components.tasks import find_task
from mdm.config import UserError
from mdm.studies.seeds import Rows, compared, values, with_error

FIGURES = {  # at an axis; in a sentence, with how many decimals
    "accuracy": ("judged right", "accuracy", 3),
    "frechet": ("Frechet distance", "Frechet distance", 2),
    "ngram_bits": ("n-gram bits a token", "n-gram bits", 2),
    "entropy_bits": ("entropy of the tokens (bits)", "entropy", 2),
    "distinct": ("distinct", "distinct", 2),
    "forwards": ("forward passes a sample", "passes", 1),
    "seconds": ("seconds a sample", "seconds", 4),
}
SHOWN = ("accuracy", "ngram_bits", "entropy_bits", "forwards", "seconds")  # in words


def by_group(rows: Rows) -> dict[str, Rows]:
    """The finished runs of each group. Raises UserError where the first has none."""
    done = [r for r in rows if r["status"] == "finished"]
    names = dict.fromkeys(r["group"] for r in rows)
    own: dict[str, Rows] = {name: runs for name in names if (runs := [r for r in done if r["group"] == name])}
    if rows[0]["group"] not in own:
        raise UserError(f"groups.{rows[0]['group']}: none of its runs finished, and the others are compared with it")
    return own


def bits_of(runs: Rows, first: Rows, prefix: str = "bits/") -> dict[str, dict[str, Any]]:
    """Task -> what the runs have of it in bits per token, beside the first group's."""
    tasks = [key for key, value in first[0].items() if key.startswith(prefix) and value is not None]
    return {key[len(prefix) :]: compared(runs, key, first, key) for key in tasks if len(values(runs, key))}


def measured(row: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The columns of three parts that a row has, but those of real samples: of figures modality, figure and decoder."""
    parts = [tuple(k.split("/")) for k, v in row.items() if v is not None]
    return [(p[0], p[1], p[2]) for p in parts if len(p) == 3 and p[2] != "real"]


def kinds(rows: Rows) -> set[tuple[str, str]]:
    """What of them was measured, by whichever decoder."""
    return {k[:2] for r in rows for k in measured(r)}


def decoded(runs: Rows, first: Rows) -> dict[str, dict[str, dict[str, Any]]]:
    """Modality -> decoder -> its figures: mean over seeds and, where the first group was decoded so too, the difference."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for modality, figure, decoder in dict.fromkeys(k for r in runs for k in measured(r)):
        key = f"{modality}/{figure}/{decoder}"
        if figure in FIGURES:
            theirs = key if len(values(first, key)) else None
            own = compared(runs, key, first if theirs else runs, key)
            if theirs is None:
                own |= {"difference": None, "difference_error": None}
            found.setdefault(modality, {}).setdefault(decoder, {})[figure] = own
    return found


def in_words(figures: Mapping[str, Any]) -> str:
    """The figures of a decoder."""
    return ", ".join(f"{FIGURES[f][1]} {with_error(figures[f], FIGURES[f][2])}" for f in SHOWN if f in figures)


def spoken(task: str) -> str:
    return task.replace("_", " ")


def of_each(seeds: int) -> str:
    """How many seeds."""
    return f"{seeds} seed{'s' if seeds > 1 else ''} of each"


def reservations(summary: Mapping[str, Any]) -> list[str]:
    """What is to be kept in mind: how few the seeds are, and what was left out."""
    luck = "with three, two of them are exceeded in one of eight comparisons of equals."
    few = "Fewer than three seeds: no difference here is a finding."
    lines = [few if summary["seeds"] < 3 else f"Standard errors of {summary['seeds']} seeds: {luck}"]
    for key, what in (("left_out", "Left out"), ("not_measured", "Not measured, or in part")):
        lines += [f"{what}: {', '.join(summary[key])}."] if summary[key] else []
    return lines


def tasks_of(modality: str, tasks: Sequence[str]) -> list[str]:
    """Those of the tasks that generate a modality."""
    return [task for task in tasks if modality in find_task(task).generated]


def line(axis: Any, points: Sequence[tuple[float, Mapping[str, Any]]], style: Mapping[str, Any]) -> None:
    """Means joined by a line, with bars of a standard error."""
    if points:
        points = sorted(points, key=lambda p: p[0])
        x, y, error = zip(*((n, m["mean"], m["standard_error"] or 0) for n, m in points), strict=True)
        axis.errorbar(x, y, error, ms=4.5, lw=1.3, elinewidth=0.9, capsize=2, **style)
