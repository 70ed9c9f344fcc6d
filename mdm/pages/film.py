"""Pictures of the unmasking, step by step: patches of an image, codes of a clip, words of a text. Masked ones are blue."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from components.types import Batch
from mdm.data.processor import Processor

MASKED = (120, 170, 215)  # the colour of what is still masked
MASK_SIGN = "\u2592"


def frame(processor: Processor, batch: Batch, tokens: Int[Tensor, "batch seq"], scale: int = 6, gap: int = 4) -> Image.Image:
    """One step: what is generated of every row, side by side; a text is a line of its own."""
    panels: dict[str, list[Image.Image]] = {}
    for i in batch.modality[batch.maskable].unique().tolist():
        name = processor.vocabulary.modalities[i]
        draw = {"image": image_panel, "audio": audio_panel, "text": text_panel}[name]
        panels[name] = [draw(processor, tokens[row][batch.modality[row] == i], scale) for row in range(len(tokens))]
    bands = [_beside(panels[n], gap) if n != "text" else strip(panels[n]) for n in panels]
    return strip(bands)


def image_panel(processor: Processor, ids: Int[Tensor, " n"], scale: int) -> Image.Image:
    """An image, masked patches in blue."""
    picture, hidden = partial_image(processor, ids)
    colours = np.asarray(picture.convert("RGB")).copy()
    colours[hidden] = MASKED
    return Image.fromarray(np.kron(colours, np.ones((scale, scale, 1), dtype=np.uint8)))


def partial_image(processor: Processor, ids: Int[Tensor, " n"]) -> tuple[Image.Image, Bool[np.ndarray, "height width"]]:
    """An image so far, and which of its pixels are still masked (whatever they show)."""
    tokenizer = processor.tokenizers["image"]
    masked = ids == processor.vocabulary.mask_id
    start = processor.vocabulary.ranges[processor.vocabulary.ranges_of("image")[0]].start
    side = tokenizer.size // tokenizer.patch
    hidden = np.kron(masked.numpy().reshape(side, side), np.ones((tokenizer.patch, tokenizer.patch))).astype(bool)
    return processor.decode("image", torch.where(masked, start, ids)), hidden


def audio_panel(processor: Processor, ids: Int[Tensor, " n"], scale: int) -> Image.Image:
    """A clip as its codes: a column for each frame, a row for each codebook, the code as grey; end fill is white."""
    ranges = [processor.vocabulary.ranges[r] for r in processor.vocabulary.ranges_of("audio")]
    grid = np.full((len(ranges), len(ids) // len(ranges), 3), 255, dtype=np.uint8)
    for i, token in enumerate(ids.tolist()):
        own = ranges[i % len(ranges)]
        if token == processor.vocabulary.mask_id:
            grid[i % len(ranges), i // len(ranges)] = MASKED
        elif token != processor.vocabulary.end_id:
            grid[i % len(ranges), i // len(ranges)] = int(20 + 200 * (token - own.start) / own.size)
    return Image.fromarray(np.kron(grid, np.ones((2 * scale, scale, 1), dtype=np.uint8)))


def text_panel(processor: Processor, ids: Int[Tensor, " n"], scale: int, columns: int = 84) -> Image.Image:
    """A text, each masked token a blue sign."""
    words = text_with_gaps(processor, ids)
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


def text_with_gaps(processor: Processor, ids: Int[Tensor, " n"]) -> str:
    """A text so far, on one line: a sign for every masked token, nothing for what lies behind the end."""
    end, mask = processor.vocabulary.end_id, processor.vocabulary.mask_id
    pieces: list[str] = []
    run: list[int] = []
    for token in [*ids.tolist(), end]:
        if token in (mask, end):
            if run:
                pieces.append(processor.decode("text", torch.tensor(run)))
                run = []
            if token == mask:
                pieces.append(MASK_SIGN)
        else:
            run.append(token)
    return " ".join("".join(pieces).split("\n"))


def _beside(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    width, height = pictures[0].size
    row = Image.new("RGB", (len(pictures) * (width + gap) + gap, height + 2 * gap), "white")
    for i, picture in enumerate(pictures):
        row.paste(picture, (gap + i * (width + gap), gap))
    return row


def strip(frames: Sequence[Image.Image]) -> Image.Image:
    """Frames below one another: time runs downwards."""
    whole = Image.new("RGB", (max(f.width for f in frames), sum(f.height for f in frames)), "white")
    top = 0
    for one in frames:
        whole.paste(one, (0, top))
        top += one.height
    return whole


def every_other(whole: Image.Image, steps: int) -> Image.Image:
    """Each second row of a strip of `steps` frames."""
    height = whole.height // steps
    return strip([whole.crop((0, i * height, whole.width, (i + 1) * height)) for i in range(0, steps, 2)])


def gif(frames: Sequence[Image.Image], milliseconds: int = 250) -> bytes:
    """Frames as a GIF that loops and rests on its last one."""
    buffer = io.BytesIO()
    durations = [milliseconds] * (len(frames) - 1) + [6 * milliseconds]
    palette = [f.convert("P", palette=Image.Palette.ADAPTIVE) for f in frames]
    palette[0].save(buffer, format="GIF", save_all=True, append_images=palette[1:], duration=durations, loop=0)
    return buffer.getvalue()
