"""What a newcomer brings: 60 photographs with captions, 40 recordings with transcripts, and a folder of texts; nothing tidy."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, ImageDraw

from components.data.reference import language_reference
from components.data.speech import spoken_words
from components.resampling import resample

COLOURS = {
    "red": (200, 40, 40), "green": (40, 150, 60), "blue": (40, 70, 200), "yellow": (230, 200, 40), "black": (20, 20, 20),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross")


def shape(name: str, colour: tuple[int, int, int], size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A shape somewhere near the middle of a light picture."""
    image = Image.new("RGB", size, tuple(int(v) for v in rng.integers(225, 256, 3)))
    draw, r = ImageDraw.Draw(image), 0.3 * min(size) * rng.uniform(0.85, 1.15)
    x, y = size[0] / 2 + rng.uniform(-0.06, 0.06) * size[0], size[1] / 2 + rng.uniform(-0.06, 0.06) * size[1]
    if name == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), colour)
    elif name == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), colour)
    elif name == "triangle":
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], colour)
    else:
        draw.line((x - r, y, x + r, y), colour, int(r / 2))
        draw.line((x, y - r, x, y + r), colour, int(r / 2))
    return image


def bring(folder: Path) -> None:
    """Writes images/, clips/ and texts/: pictures of several sizes and formats, stereo at 16 kHz, an ending in capitals."""
    for name in ("images", "clips", "texts"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, (colour, kind, _) in enumerate(itertools.product(COLOURS, SHAPES, range(3))):
        size, suffix = [((64, 64), ".png"), ((96, 72), ".jpg"), ((60, 80), ".JPEG")][i % 3]
        path = folder / "images" / ("more" if i % 10 == 9 else "") / f"{i:02d}{suffix}"
        path.parent.mkdir(exist_ok=True)
        shape(kind, COLOURS[colour], size, rng).save(path, quality=92)
        path.with_suffix(".txt").write_text(f"a {colour} {kind}\n", encoding="utf-8-sig" if i % 7 == 0 else "utf-8")
    words = sorted(spoken_words("train", "{}", voices=4), key=lambda sample: sample["label"])
    for i, sample in enumerate(words[round(k * len(words) / 40)] for k in range(40)):
        heard = resample(sample["audio"], sample["sample_rate"], 16000)
        soundfile.write(folder / "clips" / f"{i:02d}.wav", np.stack([heard, 0.8 * heard], axis=1), 16000)
        (folder / "clips" / f"{i:02d}.txt").write_text(sample["text"])
    for i, sample in enumerate(language_reference("train")):
        (folder / "texts" / f"{i:02d}.md").write_text(sample["text"])
