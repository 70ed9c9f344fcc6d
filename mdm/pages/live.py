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

STYLE = """
.canvas{display:inline-block;margin:.3rem .6rem .3rem 0;vertical-align:top}
.canvas table{border-collapse:collapse!important;width:auto!important;table-layout:fixed;margin:0!important}
.canvas img{min-width:160px;image-rendering:pixelated}
.canvas td{width:20px;height:20px;min-width:20px;padding:0!important;border:1px solid #fff!important;line-height:0;font-size:0}
.canvas small{color:#666;display:block}.canvas.text{display:block}
.words{font-size:1.05rem;line-height:1.9;white-space:pre-wrap;font-family:ui-monospace,monospace;color:#111}
.words span{border-radius:3px;padding:1px 0}.masked{background:#78aad7!important;color:#78aad7!important}
"""


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
    sure = table(rows, f"{name}: a cell for each code, by confidence")
    if not hasattr(tokenizer, "partial"):
        return sure
    source = embedded(film.panel(processor, name, ids, scale=20))
    return f'<div class="canvas"><img alt="{name}" src="{source}"><small>{name}</small></div>{sure}'


def table(rows: Sequence[Sequence[str]], caption: str) -> str:
    body = "".join("<tr>" + "".join(row) + "</tr>" for row in rows)
    return f'<div class="canvas"><table>{body}</table><small>{caption}</small></div>'


def heat(confidence: float) -> str:
    """Unsure is orange, sure is green; what was given (0) is grey."""
    return "#ddd" if confidence == 0 else f"hsl({30 + 100 * confidence:.0f} 70% {80 - 15 * confidence:.0f}%)"


def tip(confidence: float) -> str:
    return "given" if confidence == 0 else f"confidence {confidence:.2f}"
