"""Reports: one HTML file that needs no other, with everything the run produced to look at and listen to."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from components.tasks import find_task
from components.tokenizers.clips import write_wav
from mdm.training.history import is_own

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:1000px;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.6rem}h2{margin-top:2.2rem;border-bottom:1px solid #ddd}table{border-collapse:collapse}
td,th{padding:.25rem .8rem;text-align:left;border-bottom:1px solid #eee}td.n{text-align:right;font-variant-numeric:tabular-nums}
img{max-width:100%;image-rendering:auto}.pair{display:flex;gap:2rem;flex-wrap:wrap}figure{margin:.5rem 0}
figcaption{color:#666;font-size:.85rem}.clip{display:inline-block;margin:.4rem .8rem .4rem 0;font-size:.85rem}
img.sample{min-width:96px;max-width:256px;border:1px solid #b0b0b0}
audio{width:220px;height:32px}pre{background:#f6f6f6;padding:.8rem;overflow-x:auto;white-space:pre-wrap;font-size:.85rem}
.ok{color:#0a7a2f}.no{color:#b00020}
"""

LOGGED = 12  # panels of what a recipe has logged, at the most


@dataclass(frozen=True)
class Section:
    """A heading, a sentence that says what is shown, and its HTML."""

    title: str
    text: str
    body: str


def write_report(path: Path, title: str, lead: str, sections: Sequence[Section], script: str = "") -> None:
    """Writes the page. script: JavaScript that runs when the sections are there."""
    body = "".join(f"<h2>{html.escape(s.title)}</h2><p>{html.escape(s.text)}</p>{s.body}" for s in sections)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>{body}"
        f"{f'<script>{script}</script>' if script else ''}</body></html>"
    )
    path.write_text(page, encoding="utf-8", errors="replace")  # half a surrogate pair is no character


def embedded(data: Image.Image | bytes, media: str = "image/png") -> str:
    """The address of a file that lies inside the page itself."""
    if isinstance(data, Image.Image):
        buffer = io.BytesIO()
        data.save(buffer, format="PNG")
        data = buffer.getvalue()
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


def picture(image: Image.Image | bytes, caption: str = "", kind: str = "png") -> str:
    """An image inside the page."""
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="{embedded(image, f"image/{kind}")}"><figcaption>{text}</figcaption></figure>'


def player(audio: np.ndarray, sample_rate: int, label: str) -> str:
    """An audio player inside the page."""
    buffer = io.BytesIO()
    write_wav(buffer, audio, sample_rate)
    source = embedded(buffer.getvalue(), "audio/wav")
    return f'<span class="clip">{html.escape(label)}<br><audio controls src="{source}"></audio></span>'


def table(rows: Sequence[Sequence[Any]], head: Sequence[str]) -> str:
    """A table; numbers are set right."""
    cells = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = ""
    for row in rows:
        body += "<tr>" + "".join(f"<td{' class=n' if isinstance(c, float) else ''}>{_cell(c)}</td>" for c in row) + "</tr>"
    return f"<table><tr>{cells}</tr>{body}</table>"


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else html.escape(str(value))


def figure(value: float) -> float:
    """A figure of a file as a float: JSON's whole numbers may be larger than any."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def points(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(tokens, value) of the lines of a history that have both, as finite numbers."""
    pairs = [(line.get("tokens"), line.get(key)) for line in history]
    found = [(figure(x), figure(y)) for x, y in pairs if isinstance(x, (int, float)) and isinstance(y, (int, float))]
    return [(x, y) for x, y in found if math.isfinite(x) and math.isfinite(y)]


def plain(name: str, most: int = 60) -> str:
    """A name as a figure can write it: printable, of a sensible length."""
    return "".join(c if c.isprintable() else "?" for c in name[:most])


def preformatted(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def figure_png(figure: Any) -> bytes:
    """A matplotlib figure as PNG, closed."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def loss_curves(history: Sequence[Mapping[str, Any]], unigram: float | None = None) -> bytes:
    """Training bits per masked position by modality, and validation NELBO per task, over tokens seen; then a panel for each
    number that the recipe has logged."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    logged = {k: points(history, k) for line in history for k in line if not is_own(k)}
    logged = {k: found for k, found in list(logged.items())[:LOGGED] if found}
    rows = 1 + -(-len(logged) // 2)
    figure, panels = plt.subplots(rows, 2, figsize=(10, 3.6 * rows), squeeze=False, layout="constrained" if logged else None)
    (left, right), others = panels[0], panels[1:].flatten()
    for axis in others[len(logged) :]:
        axis.set_visible(False)
    for axis, (key, found) in zip(others, logged.items(), strict=False):
        axis.plot([x / 1e6 for x, _ in found], [y for _, y in found], color="0.2")
        axis.set_title(plain(key), parse_math=False)
        axis.set_xlabel("tokens seen (millions)")
        axis.spines[["top", "right"]].set_visible(False)
    looks = _looks([key for line in history for key in line])
    for axis, prefix, title in ((left, "train_bits/", "training"), (right, "bits/", "held-out NELBO")):
        keys = list(dict.fromkeys(k for line in history for k in line if k.startswith(prefix)))
        for key in keys:
            x, y = zip(*((line["tokens"] / 1e6, line[key]) for line in history if key in line), strict=True)
            name = key.removeprefix(prefix)
            color, line = looks.get(name, (None, "-."))
            axis.plot(x, _smooth(y) if prefix == "train_bits/" else y, line, color=color, label=name.replace("_", " "))
        axis.set(title=title, xlabel="tokens seen (millions)")
    left.set_ylabel("bits per token of content")
    right.set_ylabel("bits per token")
    if unigram is not None:
        right.axhline(unigram, color="0.5", lw=0.8)
        right.annotate(
            "text, unigram entropy", (right.get_xlim()[1], unigram), ha="right", va="bottom", fontsize=8, color="0.4"
        )
    for axis in (left, right):
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    return figure_png(figure)


def _looks(keys: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a dash for each modality as they come; the first task that generates it alone has the same."""
    modalities = dict.fromkeys(key.removeprefix("train_bits/") for key in keys if key.startswith("train_bits/"))
    looks = {modality: (f"C{i}", ("-", "--", ":")[i % 3]) for i, modality in enumerate(modalities)}
    free = dict(looks)
    for task in dict.fromkeys(key.removeprefix("bits/") for key in keys if key.startswith("bits/")):
        with contextlib.suppress(ValueError):  # instruct is none of the tasks by name
            made = find_task(task).generated
            looks |= {task: free.pop(made[0])} if len(made) == 1 and made[0] in free else {}
    return looks


def _smooth(values: Sequence[float], window: int = 9) -> np.ndarray:
    """Running mean, shorter at the ends: single batches are noisy."""
    own = np.asarray(values, dtype=float)
    kernel = np.ones(min(window, len(own)))
    return np.convolve(own, kernel, "same") / np.convolve(np.ones(len(own)), kernel, "same")


def spectrograms(rows: Mapping[str, Sequence[np.ndarray]], labels: Sequence[str], sample_rate: int) -> bytes:
    """A row of log-mel spectrograms for each named set of clips, a column for each label."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from components.metrics.mel import SAMPLE_RATE, log_mel
    from components.resampling import resample

    seconds = max(len(clip) / sample_rate for clips in rows.values() for clip in clips)
    figure, axes = plt.subplots(
        len(rows), len(labels), figsize=(1.3 * len(labels), 1.5 * len(rows)), squeeze=False, sharey=True
    )
    for axis_row, (name, clips) in zip(axes, rows.items(), strict=True):
        for axis, clip, label in zip(axis_row, clips, labels, strict=True):
            own = resample(clip, sample_rate, SAMPLE_RATE) if len(clip) else clip
            mel = log_mel(own)
            end = max(len(clip) / sample_rate, 0.01)
            axis.imshow(mel.T, origin="lower", aspect="auto", cmap="magma", extent=(0, end, 0, mel.shape[1]))
            axis.set(xticks=[0, round(0.7 * seconds, 1)], yticks=[], xlim=(0, max(seconds, 0.01)))
            axis.tick_params(labelsize=7)
            if name == next(iter(rows)):
                axis.set_title(label, fontsize=9)
        axis_row[0].set_ylabel(name, fontsize=9)
    figure.supxlabel("seconds; vertical: mel bands, 0 to 4 kHz", fontsize=8, y=-0.02, va="top")
    return figure_png(figure)


def overview(panels: Mapping[str, Image.Image], metrics: str) -> bytes:
    """Named pictures below one another, and a line of figures: the run at a glance."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ratios = [p.height / p.width for p in panels.values()]
    figure, axes = plt.subplots(len(panels), 1, figsize=(6.5, 6.5 * sum(ratios) + 0.4 * len(panels)), height_ratios=ratios)
    for axis, (name, panel) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        axis.imshow(panel, cmap="gray", interpolation="nearest")
        axis.set_title(name, fontsize=11, loc="left")
        axis.axis("off")
    figure.supxlabel(metrics, fontsize=10)
    figure.tight_layout()
    return figure_png(figure)


def settings(config: Any) -> str:
    """A config as it was used."""
    return preformatted(json.dumps(config, indent=1, default=str))
