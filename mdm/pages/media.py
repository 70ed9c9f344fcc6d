"""Writing what a model generates: text lines, image files and grids, WAV files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from mdm.config import UserError


def image_grid(images: Sequence[Image.Image], columns: int, scale: int = 8, gap: int = 4) -> Image.Image:
    """Images in rows of `columns`, enlarged without smoothing, on white."""
    width, height = images[0].width * scale, images[0].height * scale
    rows = -(-len(images) // columns)
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    grid = Image.new(mode, (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, image in enumerate(images):
        place = (gap + i % columns * (width + gap), gap + i // columns * (height + gap))
        grid.paste(image.convert(mode).resize((width, height), Image.Resampling.NEAREST), place)
    return grid


def write_wav(file: str | Path | BinaryIO, audio: np.ndarray, sample_rate: int) -> None:
    """Mono 16-bit PCM, by the standard library: no package is needed to write it."""
    import wave

    with wave.open(str(file) if isinstance(file, Path) else file, "wb") as opened:
        opened.setnchannels(1)
        opened.setsampwidth(2)
        opened.setframerate(sample_rate)
        opened.writeframes((np.clip(audio, -1, 1) * 32767).astype("<i2").tobytes())


def next_number(folder: Path) -> int:
    """The number of the next output of a folder: behind its lines and its files."""
    lines = folder / "outputs.jsonl"
    found = [len(lines.read_text().splitlines()) if lines.is_file() else 0]
    found += [int(file.name[:4]) + 1 for file in folder.glob("[0-9][0-9][0-9][0-9]*.*")]
    return max(found)


def save_outputs(
    folder: Path,
    prompts: Sequence[Mapping[str, Any]],
    outputs: Sequence[Mapping[str, Any]],
    sample_rate: int,
    first: int = 0,
) -> list[dict[str, Any]]:
    """Writes each output (`0000.png`, `0000.wav`) and `outputs.jsonl`: prompts, texts, file names. Returns its lines.

    Images and clips among the prompts are written too, as `0000_given.png` and `0000_given.wav`.

    first: number of the first one; from 1 on they are added to those that are there
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    try:
        for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True), first):
            line = {f"given_{m}": _saved(v, folder / f"{i:04d}_given", sample_rate) for m, v in prompt.items()}
            line |= {m: _saved(v, folder / f"{i:04d}", sample_rate) for m, v in output.items()}
            lines.append({key: value for key, value in line.items() if value is not None})
        with (folder / "outputs.jsonl").open("a" if first else "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        images = [o["image"] for o in outputs if "image" in o]
        if images:
            grid = folder / (f"grid_{first:04d}.png" if first else "grid.png")
            image_grid(images, columns=min(10, len(images))).save(grid)
    except OSError as error:
        raise UserError(f"output_dir {folder}: cannot write the outputs ({error})") from error
    return lines


def _saved(value: Any, stem: Path, sample_rate: int) -> str | None:
    """A text itself, or the name of the file that an image or a clip was written to; None for what is neither (an edit)."""
    if isinstance(value, str):
        return value
    if isinstance(value, Image.Image):
        value.save(stem.with_suffix(".png"))
        return stem.with_suffix(".png").name
    if isinstance(value, np.ndarray):
        write_wav(stem.with_suffix(".wav"), value, sample_rate)
        return stem.with_suffix(".wav").name
    return None
