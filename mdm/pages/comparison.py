"""Runs side by side: their figures, learning curves, and samples of the same prompts, as one HTML page that needs no other.

A run is a folder with `metrics.json`; `history.jsonl` and `samples/` are shown where it has them. With one run it is that run's
gallery, which `mdm run evaluate` writes.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from components.data.reading import json_lines
from components.files import read_inside, read_json
from mdm.config import UserError
from mdm.pages import report
from mdm.pages.media import kind_of, media_type
from mdm.pages.report import Section
from mdm.pages.sheet import SIDE
from mdm.training.history import is_own, read_history

MOST = 20  # panels of learning curves


def figures(runs: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """The figures of each run's metrics.json. Raises UserError where there is none, or it is something else."""
    found = {}
    for name, folder in runs.items():
        path = folder / "metrics.json"
        if not path.is_file():
            raise UserError(f"runs: {folder} has no metrics.json; mdm run evaluate writes one")
        try:
            metrics = read_json(path)
        except ValueError as error:
            raise UserError(f"runs: {error}") from error
        found[name] = {k: report.figure(v) for k, v in metrics.items() if isinstance(v, (int, float))}
    return found


def table(runs: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[list[Any]]]:
    """Head and rows: a measure, its value in each run ("" where it was not taken), the others' differences from the first."""
    first, *others = runs
    head = ["measure", *runs, *(f"{name} - {first}" for name in others)]
    rows: list[list[Any]] = []
    for measure in dict.fromkeys(key for metrics in runs.values() for key in metrics):
        values = [metrics.get(measure, "") for metrics in runs.values()]
        steps = [v - values[0] if isinstance(v, float) and isinstance(values[0], float) else "" for v in values[1:]]
        rows.append([measure.replace("_", " "), *values, *steps])
    return head, rows


def markdown(head: list[str], rows: list[list[Any]]) -> str:
    """The table for a README or a terminal."""
    lines = [head, ["---"] * len(head), *([f"{c:.4g}" if isinstance(c, float) else c for c in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def page(path: Path, title: str, runs: Mapping[str, Path]) -> None:
    """Writes the page. Raises UserError for a run without figures."""
    head, rows = table(figures(runs))
    sections = [Section("Figures", "", report.table(rows, head))]
    histories = {name: read_history(f / "history.jsonl") for name, f in runs.items() if (f / "history.jsonl").is_file()}
    if _quantities(histories):
        sections.append(Section("Learning", "Held-out NELBO, and what the recipe logged.", report.picture(_curves(histories))))
    tasks = dict.fromkeys(t.name for f in runs.values() for t in _tasks(f))
    sections += [_samples(task, runs) for task in tasks if any(lines(f / "samples" / task) for f in runs.values())]
    report.write_report(path, title, ", ".join(str(f) for f in runs.values()), sections)


def _tasks(folder: Path) -> list[Path]:
    return sorted(p.parent for p in (folder / "samples").glob("*/outputs.jsonl"))


def _samples(task: str, runs: Mapping[str, Path]) -> Section:
    """A row for each prompt, a column for each run."""
    by_run = {name: lines(folder / "samples" / task) for name, folder in runs.items()}
    shown = {name: own for name, own in by_run.items() if own}
    count = min(len(own) for own in shown.values())
    first = next(iter(shown.values()))
    cells = [[given(first[i]), *(made(own[i]) for own in shown.values())] for i in range(count)]
    head = "".join(f"<th>{html.escape(h)}</th>" for h in ("given", *(shown if len(runs) > 1 else ("generated",))))
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in cells)
    return Section(task.replace("_", " "), f"The first {count}, not chosen.", f"<table><tr>{head}</tr>{body}</table>")


def lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a task's outputs.jsonl, with where its files lie; none where the run has no such samples."""
    path = folder / "outputs.jsonl"
    found = json_lines(path) if path.is_file() else ()
    return [{**line, "folder": folder} for _, line in found if isinstance(line, dict)]


def given(line: Mapping[str, Any]) -> str:
    """What a sample was asked for, as HTML."""
    return "".join(_part(value, line["folder"]) for key, value in line.items() if key.startswith("given_"))


def made(line: Mapping[str, Any]) -> str:
    """What was generated, as HTML."""
    parts = {k: v for k, v in line.items() if k != "folder" and not k.startswith("given_")}
    return "".join(_part(value, line["folder"]) for value in parts.values())


def _part(value: Any, folder: Path) -> str:
    """Words, or a file of the samples' own folder to look at or hear: one from elsewhere is not, whoever wrote the line."""
    name = str(value)
    kind = None if any(c.isspace() for c in name) else kind_of(name)
    if kind is None:
        return f"<div>{html.escape(name)}</div>"
    try:
        data = read_inside(folder, name)
    except (OSError, ValueError) as error:
        return f"<div>{html.escape(str(error))}</div>"
    source = html.escape(report.embedded(data, media_type(name)))
    if kind == "image":
        return f'<img class="sample"{_enlarged(data)} alt="{html.escape(name)}" src="{source}">'
    return f'<audio controls src="{source}"></audio>'


def _enlarged(data: bytes) -> str:
    """How a picture of few pixels is shown: every pixel a square, as large as all others; nothing for others."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            width, height = opened.size
    except Exception:  # a drawing in words (SVG), or a broken file: the browser shows what it can
        return ""
    times = SIDE // max(width, height)
    return f' style="width:{width * times}px;max-width:none;image-rendering:pixelated"' if times > 1 else ""


def _quantities(histories: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """What is drawn: `bits/<task>`, and behind them the numbers that the recipes logged."""
    every = dict.fromkeys(key for history in histories.values() for line in history for key in line)
    logged = [k for k in every if not is_own(k) and any(report.points(history, k) for history in histories.values())]
    return [*(key for key in every if key.startswith("bits/")), *logged][:MOST]


def _curves(histories: Mapping[str, list[dict[str, Any]]]) -> bytes:
    """Over the tokens seen, held-out bits per token of each task, and what the runs' recipes logged: a panel for each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = _quantities(histories)
    figure, axes = plt.subplots(1, len(tasks), figsize=(4 * len(tasks), 3.2), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for name, history in histories.items():
            points = [(x / 1e6, y) for x, y in report.points(history, task) if abs(y) < 1e30]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=name)
        axis.set_title(report.plain(task.removeprefix("bits/").replace("_", " ")), parse_math=False)
        axis.set_xlabel("tokens seen (millions)")
        axis.spines[["top", "right"]].set_visible(False)
    if tasks[0].startswith("bits/"):
        axes[0][0].set_ylabel("bits per token")
    if histories:
        axes[0][0].legend(frameon=False)
    return report.figure_png(figure)
