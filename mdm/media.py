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
    grid = Image.new("L", (columns * (width + gap) + gap, rows * (height + gap) + gap), 255)
    for i, image in enumerate(images):
        place = (gap + i % columns * (width + gap), gap + i // columns * (height + gap))
        grid.paste(image.convert("L").resize((width, height), Image.Resampling.NEAREST), place)
    return grid


def write_wav(file: str | Path | BinaryIO, audio: np.ndarray, sample_rate: int) -> None:
    """Mono 16-bit PCM, by the standard library: no package is needed to write it."""
    import wave

    with wave.open(str(file) if isinstance(file, Path) else file, "wb") as opened:
        opened.setnchannels(1)
        opened.setsampwidth(2)
        opened.setframerate(sample_rate)
        opened.writeframes((np.clip(audio, -1, 1) * 32767).astype("<i2").tobytes())


def save_outputs(
    folder: Path, prompts: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]], sample_rate: int
) -> list[dict[str, Any]]:
    """Writes each output (`0000.png`, `0000.wav`) and `outputs.jsonl`: prompts, texts, file names. Returns its lines."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    try:
        for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            line: dict[str, Any] = {f"given_{m}": v for m, v in prompt.items() if isinstance(v, str)}
            for modality, value in output.items():
                if isinstance(value, str):
                    line[modality] = value
                elif isinstance(value, Image.Image):
                    line[modality] = f"{i:04d}.png"
                    value.save(folder / line[modality])
                else:
                    line[modality] = f"{i:04d}.wav"
                    write_wav(folder / line[modality], value, sample_rate)
            lines.append(line)
        (folder / "outputs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        images = [o["image"] for o in outputs if "image" in o]
        if images:
            image_grid(images, columns=min(10, len(images))).save(folder / "grid.png")
    except OSError as error:
        raise UserError(f"output_dir {folder}: cannot write the outputs ({error})") from error
    return lines
