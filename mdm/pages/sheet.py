"""One picture of many samples: numbered, framed, large enough to be seen, each with what it was asked for and says.

A part is as its tokenizer draws it; what is heard alone is its spectrogram: time to the right, pitch upwards.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from components.tokenizers.modality import Drawn, Played
from mdm.data.processor import Processor
from mdm.generation.editing import Edit

MOST = 100  # samples of a sheet
WIDTH = 1440  # pixels across, at the most: ten small pictures
SIDE = 128  # of a part that is small
FRAME, INK, PALE = "#b0b0b0", "#222222", "#777777"
GAP, LETTERS = 12, 13  # pixels between parts; size of what is written
LINES = 3  # of a caption, at the most


def sheet(
    processor: Processor, prompts: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]], first: int = 0
) -> Image.Image | None:
    """The first `MOST` samples in rows; None where there is nothing to look at.

    prompts: as `generate` takes them; first: number of the first sample
    """
    tiles = [
        ([looks(processor, prompt), looks(processor, output)], f"{words(prompt)} {words(output, '(empty)')}".strip())
        for prompt, output in list(zip(prompts, outputs, strict=True))[:MOST]
    ]
    if not any(part for pictures, _ in tiles for part in pictures):
        return None
    captions = {caption for _, caption in tiles}
    title = captions.pop() if len(captions) == 1 else ""
    cells = [cell(pictures, f"{i:04d}", "" if title else caption) for i, (pictures, caption) in enumerate(tiles, first)]
    width, height = (max(one.size[axis] for one in cells) + GAP for axis in (0, 1))
    columns = max(1, min(len(cells), 10, WIDTH // width))
    if len(outputs) > MOST:
        title = f"{title} (the first {MOST} of {len(outputs)})".strip()
    above = written(title, columns * width - GAP)
    top = GAP + (above.height + GAP // 2 if title else 0)
    whole = Image.new("RGB", (columns * width + GAP, top + -(-len(cells) // columns) * height), "white")
    if title:
        whole.paste(above, (GAP, GAP))
    for i, one in enumerate(cells):
        whole.paste(one, (GAP + i % columns * width, top + i // columns * height))
    return whole


def looks(processor: Processor, parts: Mapping[str, Any]) -> list[Image.Image]:
    """A picture of each part that can be looked at or heard; of words, of codes and of what is being edited there is none."""
    found = []
    for modality, raw in parts.items():
        tokenizer = processor.tokenizers.get(modality)
        if isinstance(raw, (str, Edit, Tensor)):
            continue
        if isinstance(tokenizer, Drawn):
            found.append(fitted(tokenizer.draw(raw)))
        elif isinstance(tokenizer, Played):
            found.append(spectrogram(*tokenizer.play(raw)))
    return found


def words(parts: Mapping[str, Any], empty: str = "") -> str:
    """What of the parts is words, on one line. empty: what to say of one that has nothing in it"""
    said = [" ".join(raw.split()) if isinstance(raw, str) else "" for raw in parts.values()]
    none = [empty for raw in parts.values() if hasattr(raw, "__len__") and len(raw) == 0]
    return " ".join(part for part in [*said, *none] if part)


def fitted(picture: Image.Image, side: int = SIDE) -> Image.Image:
    """A picture to be looked at: a small one so many times as large as `side` allows, every pixel a square; a large one, of
    more than twice `side`, smoothly smaller."""
    longest = max(picture.size)
    times = side // longest
    if times > 1:
        return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    if longest <= 2 * side:
        return picture
    size = [max(1, round(pixels * 2 * side / longest)) for pixels in picture.size]
    return picture.convert("RGB").resize((size[0], size[1]), Image.Resampling.LANCZOS)


def spectrogram(wave: Float[np.ndarray, " samples"], rate: int, height: int = 96) -> Image.Image:
    """How a clip sounds: windows of 32 ms, up to half its sample rate, over 60 dB; a pixel is 4 ms, of a long clip more."""
    window, hop = max(2, rate * 32 // 1000), max(1, rate // 250, len(wave) // (4 * SIDE))
    padded = np.pad(wave.astype(np.float64), (0, max(window - len(wave), 0)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    level = 20 * np.log10(np.abs(np.fft.rfft(frames * np.hanning(window))).T[::-1] + 1e-9)
    bright = np.clip(1 + (level - max(level.max(), -60)) / 60, 0, 1)
    stops = np.array([[255, 255, 255], [253, 190, 110], [200, 60, 90], [50, 10, 80]])
    colours = np.stack([np.interp(bright, np.linspace(0, 1, 4), stops[:, i]) for i in range(3)], axis=-1)
    return Image.fromarray(colours.astype(np.uint8)).resize((max(len(frames), 64), height), Image.Resampling.BILINEAR)


def cell(pictures: Sequence[Sequence[Image.Image]], number: str, caption: str) -> Image.Image:
    """What was given and what was made of it, side by side in frames; below them the number and the caption."""
    given, made = pictures
    every = [*given, *made]
    arrow = GAP if given and made else 0
    width = sum(one.width + 2 for one in every) + GAP // 2 * max(len(every) - 1, 0) + arrow
    height = max((one.height + 2 for one in every), default=0)
    below = written(caption, max(width, SIDE)) if caption else None
    size = (max(width, below.width if below else 0, 3 * LETTERS), height + 2 * LETTERS + (below.height if below else 0))
    whole = Image.new("RGB", size, "white")
    pen, left = ImageDraw.Draw(whole), 0
    for i, one in enumerate(every):
        if arrow and i == len(given):
            y, x = height // 2, left - GAP // 4
            pen.polygon([(x, y - 5), (x, y + 5), (x + 8, y)], fill=PALE)
            left += arrow
        pen.rectangle([left, 0, left + one.width + 1, one.height + 1], outline=FRAME)
        whole.paste(one.convert("RGB"), (left + 1, 1))
        left += one.width + 2 + GAP // 2
    pen.text((0, height + 3), number, fill=PALE, font=ImageFont.load_default(size=LETTERS - 1))
    if below:
        whole.paste(below, (0, height + 3 + LETTERS + 3))
    return whole


def written(text: str, width: int) -> Image.Image:
    """Words in a few lines, of which none is wider than `width` pixels; what is longer ends in dots."""
    font, lines = ImageFont.load_default(size=LETTERS), list[str]()
    for letters in range(max(8, width // 4), 7, -1):
        lines = textwrap.wrap(text, letters, max_lines=LINES, placeholder="...")
        if all(font.getlength(line) <= width for line in lines):
            break
    picture = Image.new("RGB", (width, max(1, len(lines)) * (LETTERS + 3)), "white")
    pen = ImageDraw.Draw(picture)
    for i, line in enumerate(lines):
        pen.text((0, i * (LETTERS + 3)), line, fill=INK, font=font)
    return picture
