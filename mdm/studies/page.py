"""A study as one HTML page that needs no other file: its finding and figure, all runs to filter and sort, curves, samples."""

from __future__ import annotations

import html
import importlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.files import inside, read_inside
from mdm.config import UserError, one_line
from mdm.pages import report
from mdm.pages.comparison import given, lines, made
from mdm.pages.report import Section
from mdm.studies.table import read_table
from mdm.training.history import read_history

QUESTIONS = ("scaling", "mixing", "schedules", "corruption", "blocks", "orders", "batch", "inference")
ALONE = "There is no folder runs/ beside the table, so there are no learning curves and no samples to show."
SCRIPT = Path(__file__).with_suffix(".js")
POINTS = 200  # of a curve, at the most
SAMPLES = 24  # of a run, at the most


def write_page(study: Path) -> Path:
    """Writes folder/study.html from what a study left in its folder; of a table alone, TABLE.html, with the finding drawn anew.

    Raises UserError where there is no study.
    """
    alone = study.suffix == ".parquet"
    folder = study.parent if alone else study
    rows = read_table(study if alone else folder / "runs.parquet")
    title, finding, figure = _of_table(study, rows) if alone else _of_folder(folder)
    runs = [_run(folder, row) for row in rows]
    data = json.dumps(runs, allow_nan=False).replace("<", "\\u003c")  # nothing in it ends the script, or begins a comment
    there = {"curves": any(run["curves"] for run in runs), "samples": any(run["samples"] for run in runs)}
    ticked = " and ".join(what for what, found in there.items() if found)
    how = "Type to filter (words that a run must have), click a head to sort"
    sections = [
        Section("Finding", "", _paragraphs(finding)),
        Section("Figure", "", report.picture(figure, "figure.png")),
        Section("Runs", f"{how}, tick runs to see their {ticked}." if ticked else f"{how}. {ALONE}", RUNS),
        *([Section("Curves", "", CURVES)] if there["curves"] else []),
        *([Section("Samples", "", SAMPLES_HERE)] if there["samples"] else []),
    ]
    path = study.with_suffix(".html") if alone else folder / "study.html"
    of = f"made from {study.name} alone" if alone else "runs.parquet and summary.json lie beside this page"
    lead = f"{len(rows):,} runs; {of}."
    report.write_report(path, _titled(title), lead, sections, script=f"const RUNS = {data};\n{SCRIPT.read_text()}")
    return path


def _of_folder(folder: Path) -> tuple[str, str, bytes]:
    """Title, finding and figure as a study wrote them. Raises UserError where it has not."""
    missing = [name for name in ("finding.md", "figure.png") if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} has no {missing[0]}; mdm run study writes it (`rebuild=true`: from the table alone)")
    title, _, finding = _shown(folder, "finding.md").decode(errors="replace").partition("\n\n")
    return title.removeprefix("# "), finding, _shown(folder, "figure.png")


def _of_table(table: Path, rows: list[dict[str, Any]]) -> tuple[str, str, bytes]:
    """The same, made of a table whose name begins with that of the question that it answers. Raises UserError."""
    name = next((q for q in QUESTIONS if table.stem == q or table.stem.startswith(f"{q}_")), None)
    if name is None:
        raise UserError(f"{table}: it is to be named after the question that it answers: {', '.join(QUESTIONS)}")
    module = importlib.import_module(f"mdm.studies.{name}")
    with one_line(str(table)):
        summary, finding = module.conclude(rows)
        return name.capitalize(), finding, module.draw(rows, summary)


def _titled(title: str) -> str:
    """A title with what one of our questions asks: the first sentence of its module."""
    if title.lower() not in QUESTIONS:
        return title
    return f"{title}: {(importlib.import_module(f'mdm.studies.{title.lower()}').__doc__ or '').partition('?')[0]}?"


def _shown(folder: Path, name: str) -> bytes:
    try:
        return read_inside(folder, name)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error


def _run(folder: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row, its learning curves and its samples, as JSON takes them."""
    try:
        if row.get("cell") is None:
            raise ValueError(f"{folder}: a row of runs.parquet has no cell")
        own = inside(folder / "runs", str(row["cell"]))
        kept = sorted(own.glob("samples/**/outputs.jsonl"))
        history = read_history(own / "history.jsonl") if (own / "history.jsonl").is_file() else []
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    return {
        "row": {k: _plain(v) for k, v in row.items() if v is not None},
        "curves": _curves(history),
        "samples": [html_of for path in kept for html_of in _samples(path.parent)][-SAMPLES:],
    }


def _plain(value: Any) -> Any:
    """A cell as JSON takes it: a finite number, a truth, or words."""
    plain = isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))
    return value if plain else str(value)


def _curves(history: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Quantity -> points (tokens, value), thinned evenly; what is no quantity of a run's progress is left out."""
    keys = dict.fromkeys(k for line in history for k in line if k not in ("step", "tokens", "seconds"))
    found = {}
    for key in keys:
        points = [[x, y] for x, y in report.points(history, key)]
        every = max(math.ceil(len(points) / POINTS), 1)
        if points:
            found[key] = points[::every] + ([points[-1]] if (len(points) - 1) % every else [])
    return found


def _samples(folder: Path) -> list[str]:
    """What a run generated, each as HTML."""
    return [f'<span class="clip">{given(line)}{made(line)}</span>' for line in lines(folder)[:SAMPLES]]


def _paragraphs(finding: str) -> str:
    """The finding's paragraphs; `**name**` is bold."""
    text = html.escape(finding.strip())
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    return "".join(f"<p>{p}</p>" for p in re.split(r"\n+", text))


RUNS = """<p><input id="filter" type="search" placeholder="width 64  seed 0  finished" size="40" aria-label="filter runs">
<button id="all">tick all shown</button> <button id="none">untick all</button> <span id="count"></span></p>
<div style="max-height:32rem;overflow:auto;width:calc(100vw - 4rem);margin-left:calc(50% - 50vw + 2rem)">
<table id="runs" style="font-size:.85rem;margin:0 auto"></table></div><p id="same" style="font-size:.85rem;color:#666"></p>"""
CURVES = """<p>Quantity <select id="quantity"></select> over tokens
<label><input type="checkbox" id="log"> logarithmic tokens</label></p><div id="plot"></div><p id="legend"></p>"""
SAMPLES_HERE = '<div id="samples">Tick a run that kept samples.</div>'
