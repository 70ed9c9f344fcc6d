"""A canvas as HTML while it is unmasked: every token in its place, coloured by the confidence it was drawn with."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from components.tokenizers.modality import fixed_length
from components.types import Batch
from mdm.data.processor import Processor
from mdm.generation.generate import Step
from mdm.pages import film
from mdm.pages.report import embedded
from mdm.pages.sheet import fitted

STYLE = """
.sample{display:inline-block;vertical-align:top;margin:0 .7rem .7rem 0;padding:.4rem .7rem .6rem;background:#fff;color:#111;
border:1px solid #ccc;border-radius:8px;max-width:100%;overflow-x:auto}
.sample.wide{display:block;margin-right:0}.sample>b{display:block;color:#666;font-size:.85rem;margin-bottom:.3rem}
.canvas{display:inline-block;margin-right:.6rem;vertical-align:top}.canvas:last-child{margin-right:0}
.canvas table{border-collapse:collapse!important;width:auto!important;table-layout:fixed;margin:0!important}
.canvas table,.canvas tr{border:0!important}
.canvas img{border:1px solid #b0b0b0;margin:0;max-width:100%}.canvas.text{display:block}
.canvas td{width:var(--cell);height:var(--cell);min-width:var(--cell);
padding:0!important;border:0!important;line-height:0;font-size:0}
.canvas small{color:#666;display:block;line-height:1.5}
.words{font-size:1.05rem;line-height:1.9;white-space:pre-wrap;font-family:ui-monospace,monospace;color:#111}
.words span{border-radius:3px;padding:1px 0}.masked{background:#78aad7!important;color:#78aad7!important}
.chip{display:inline-block;width:.9em;height:.9em;border-radius:3px;vertical-align:-.1em;margin:0 .25em 0 .7em}
"""
PICTURE, MAP, ACROSS = 192, 96, 560  # pixels: of a small picture, of a square of codes, of frames of codes
LARGEST_CELL = 20


def page(processor: Processor, batch: Batch, step: Step) -> str:
    """Every row of a batch, numbered from 1."""
    return "".join(sample(processor, batch, step, row) for row in range(len(batch.tokens)))


def sample(processor: Processor, batch: Batch, step: Step, row: int) -> str:
    """A row in its frame; one of words alone is as wide as the page."""
    shown = canvas(processor, batch, step, row)
    wide = "" if "<td" in shown else " wide"
    return f'<div class="sample{wide}"><b>{row + 1}</b>{shown}</div>'


def legend() -> str:
    """What the colours say."""
    colours = (("masked", "#78aad7"), ("unsure", heat(0.05)), ("sure", heat(1.0)), ("given", heat(0.0)))
    chips = "".join(f'<span class="chip" style="background:{colour}"></span>{name}' for name, colour in colours)
    return f"Each token by the confidence it was drawn with:{chips}. Point at one for its number."


def canvas(processor: Processor, batch: Batch, step: Step, row: int) -> str:
    """What a row has generated so far, every modality of it, as HTML."""
    parts = []
    for i in batch.modality[row][batch.maskable[row]].unique().tolist():
        name = processor.vocabulary.modalities[i]
        own = batch.modality[row] == i
        show = words if film.is_spelled(processor.tokenizers[name]) else codes
        parts.append(show(processor, name, step.tokens[row][own], step.confidence[row][own]))
    return "".join(parts)


def words(processor: Processor, name: str, ids: Int[Tensor, " n"], confidence: Float[Tensor, " n"]) -> str:
    """A text, a span for each token."""
    vocabulary, spans = processor.vocabulary, []
    for token, sure in zip(ids.tolist(), confidence.tolist(), strict=True):
        if token == vocabulary.mask_id:
            spans.append('<span class="masked">____</span> ')
        elif token != vocabulary.end_id:
            piece = html.escape(str(processor.decode(name, torch.tensor([token]))))
            spans.append(f'<span style="background:{heat(sure)}" title="{tip(sure)}">{piece}</span>')
    return f'<div class="canvas text"><div class="words">{"".join(spans)}</div></div>'


def codes(processor: Processor, name: str, ids: Int[Tensor, " n"], confidence: Float[Tensor, " n"]) -> str:
    """What the codes show so far, where their tokenizer draws that, and the confidence of each; behind the end it is white.

    A row for each codebook and a column for each frame; of a modality of fixed length, e.g. patches of an image, a square.
    """
    vocabulary, tokenizer, cells = processor.vocabulary, processor.tokenizers[name], []
    for token, sure in zip(ids.tolist(), confidence.tolist(), strict=True):
        if token == vocabulary.mask_id:
            cells.append('<td class="masked"></td>')
        elif token == vocabulary.end_id:
            cells.append('<td title="end"></td>')
        else:
            cells.append(f'<td style="background:{heat(sure)}" title="{tip(sure)}"></td>')
    books = len(tokenizer.codebooks)
    side = math.isqrt(len(cells) // books)
    square = fixed_length(tokenizer) is not None and side * side * books == len(cells)
    rows = (
        [cells[i : i + side * books] for i in range(0, len(cells), side * books)]
        if square
        else [cells[b::books] for b in range(books)]
    )
    sure = table(rows, MAP if square else ACROSS, "confidence")
    if not hasattr(tokenizer, "partial"):
        return sure
    source = embedded(fitted(film.drawn_so_far(processor, name, ids), PICTURE))
    return f'<div class="canvas"><img alt="{name}" src="{source}"><small>{name}</small></div>{sure}'


def table(rows: Sequence[Sequence[str]], width: int, caption: str) -> str:
    """Cells without gaps, all of one size, in about so many pixels."""
    cell = max(3, min(LARGEST_CELL, width // max(1, *map(len, rows))))
    body = "".join("<tr>" + "".join(row) + "</tr>" for row in rows)
    return f'<div class="canvas"><table style="--cell:{cell}px">{body}</table><small>{caption}</small></div>'


def heat(confidence: float) -> str:
    """Unsure is orange, sure is green; what was given (0) is grey."""
    return "#ddd" if confidence == 0 else f"hsl({30 + 100 * confidence:.0f} 70% {80 - 15 * confidence:.0f}%)"


def tip(confidence: float) -> str:
    return "given" if confidence == 0 else f"confidence {confidence:.2f}"
