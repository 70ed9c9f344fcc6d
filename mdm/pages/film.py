"""Pictures of the unmasking, step by step: each modality as its tokenizer draws a half-made one, or words. Masked is blue."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from components.tokenizers import Tokenizer
from components.tokenizers.modality import MASKED, is_words, partial
from components.types import Batch
from mdm.data.processor import Processor
from mdm.pages.media import enlarged, image_grid

MASK_SIGN = "\u2592"
SMALLEST = 96  # of a panel, in pixels
WIDTH = 1040  # of the samples side by side, in pixels: what is wider goes on below


def frame(processor: Processor, batch: Batch, tokens: Int[Tensor, "batch seq"], scale: int = 6, gap: int = 4) -> Image.Image:
    """One step: what is generated of every row, side by side; a text is a line of its own."""
    bands = []
    for i in batch.modality[batch.maskable].unique().tolist():
        name = processor.vocabulary.modalities[i]
        own = [tokens[row][batch.modality[row] == i] for row in range(len(tokens))]
        if is_spelled(processor.tokenizers[name]):
            bands.append(strip([text_panel(processor, name, ids, scale) for ids in own]))
            continue
        panels = [panel(processor, name, ids, scale) for ids in own]
        bands.append(image_grid(panels, min(len(panels), max(1, WIDTH // (panels[0].width + gap))), scale=1, gap=gap))
    return strip(bands)


def is_spelled(tokenizer: Tokenizer) -> bool:
    """Whether a canvas is words, token by token: codes of several codebooks say something in whole frames alone."""
    return is_words(tokenizer) and len(tokenizer.codebooks) == 1


def panel(processor: Processor, name: str, ids: Int[Tensor, " n"], scale: int) -> Image.Image:
    """A half-made canvas of a modality, enlarged."""
    picture = drawn_so_far(processor, name, ids)
    return enlarged(picture, max(scale, SMALLEST // max(picture.size)))


def drawn_so_far(processor: Processor, name: str, ids: Int[Tensor, " n"]) -> Image.Image:
    """A half-made canvas of a modality, as large at every step: as it is where all is masked."""
    tokenizer = processor.tokenizers[name]
    whole = partial(tokenizer, torch.zeros_like(ids), torch.zeros(len(ids), dtype=torch.bool))
    sheet = Image.new("RGB", whole.size, "white")
    codes, known = half_made(processor, name, ids)
    if len(codes):
        sheet.paste(partial(tokenizer, codes, known))
    return sheet


def half_made(processor: Processor, name: str, ids: Int[Tensor, " n"]) -> tuple[Int[Tensor, " m"], Bool[Tensor, " m"]]:
    """The codes of a canvas so far up to its end, in whole frames, and which are known; a masked one is 0."""
    ends = (ids == processor.vocabulary.end_id).nonzero()
    stop = int(ends[0]) if len(ends) else len(ids)
    ids = ids[: stop // (books := len(processor.tokenizers[name].codebooks)) * books]
    known = ids != processor.vocabulary.mask_id
    return torch.where(known, processor.vocabulary.to_codes(name, ids), 0), known


def text_panel(processor: Processor, name: str, ids: Int[Tensor, " n"], scale: int, columns: int = 84) -> Image.Image:
    """A text, each masked token a blue sign."""
    words = text_with_gaps(processor, name, ids)
    lines = textwrap.wrap(words, columns, drop_whitespace=False) or [""]
    font = ImageFont.load_default(size=2 * scale)
    height = 3 * scale * (len(ids) * 8 // columns + 1) + scale  # the same for every step: a token is eight letters at the most
    picture = Image.new("RGB", ((columns + 2) * scale, height), "white")
    pen = ImageDraw.Draw(picture)
    for k, line in enumerate(lines):
        x = float(scale)
        for piece in line.replace(MASK_SIGN, f"\0{MASK_SIGN}\0").split("\0"):
            if piece == MASK_SIGN:
                pen.rectangle([x, 3 * scale * k + scale // 2, x + 3 * scale, 3 * scale * (k + 1) - scale // 2], fill=MASKED)
                x += 3.5 * scale
            else:
                pen.text((x, 3 * scale * k), piece, fill="black", font=font)
                x += pen.textlength(piece, font=font)
    return picture


def text_with_gaps(processor: Processor, name: str, ids: Int[Tensor, " n"]) -> str:
    """A text so far (or whatever has neither file nor look), on one line: a sign for a masked token, nothing behind the end."""
    return " ".join(half_written(processor, name, ids).split("\n"))


def half_written(processor: Processor, name: str, ids: Int[Tensor, " n"]) -> str:
    """The same, on the lines that it has."""
    end, mask = processor.vocabulary.end_id, processor.vocabulary.mask_id
    pieces: list[str] = []
    run: list[int] = []
    for token in [*ids.tolist(), end]:
        if token in (mask, end):
            if run:
                pieces.append(str(processor.decode(name, torch.tensor(run))))
                run = []
            if token == mask:
                pieces.append(MASK_SIGN)
        else:
            run.append(token)
    return "".join(pieces)


def strip(frames: Sequence[Image.Image]) -> Image.Image:
    """Frames below one another: time runs downwards."""
    whole = Image.new("RGB", (max(f.width for f in frames), sum(f.height for f in frames)), "white")
    top = 0
    for one in frames:
        whole.paste(one, (0, top))
        top += one.height
    return whole


def thinned(frames: Sequence[Image.Image], most: int) -> list[Image.Image]:
    """So many of the frames at the most, from the first to the last."""
    count = min(most, len(frames))
    return [frames[round(i * (len(frames) - 1) / max(count - 1, 1))] for i in range(count)]


def gif(frames: Sequence[Image.Image], milliseconds: int = 250) -> bytes:
    """Frames as a GIF that loops and rests on its last one."""
    buffer = io.BytesIO()
    durations = [milliseconds] * (len(frames) - 1) + [6 * milliseconds]
    palette = [f.convert("P", palette=Image.Palette.ADAPTIVE) for f in frames]
    palette[0].save(buffer, format="GIF", save_all=True, append_images=palette[1:], duration=durations, loop=0)
    return buffer.getvalue()
