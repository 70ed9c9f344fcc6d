"""Writing what a model generates: lines of words, the files of whatever has some, and one picture of all that has a look."""

from __future__ import annotations

import json
import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from components.tokenizers.clips import write_wav
from components.tokenizers.modality import Drawn, Played, suffix
from mdm.config import UserError
from mdm.config.errors import said
from mdm.data.processor import Processor
from mdm.generation.editing import Edit
from mdm.pages.sheet import FRAME, sheet


def image_grid(images: Sequence[Image.Image], columns: int, scale: int = 8, gap: int = 4) -> Image.Image:
    """Images in rows of `columns`, on white, each in a frame; small ones enlarged by up to `scale`, without smoothing."""
    images = [enlarged(image, scale) for image in images]
    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    rows = -(-len(images) // columns)
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    grid = Image.new(mode, (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    pen = ImageDraw.Draw(grid)
    for i, image in enumerate(images):
        left, top = gap + i % columns * (width + gap), gap + i // columns * (height + gap)
        pen.rectangle([left - 1, top - 1, left + image.width, top + image.height], outline=FRAME)
        grid.paste(image.convert(mode), (left, top))
    return grid


def enlarged(image: Image.Image, scale: int, largest: int = 256) -> Image.Image:
    """A small image `scale` times as large, or as often as it stays within `largest` pixels: to be looked at."""
    times = max(1, min(scale, largest // max(image.size)))
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def next_number(folder: Path) -> int:
    """The number of the next output of a folder: behind its lines and its files."""
    lines = folder / "outputs.jsonl"
    found = [len(lines.read_text().splitlines()) if lines.is_file() else 0]
    found += [int(file.name[:4]) + 1 for file in folder.glob("[0-9][0-9][0-9][0-9]*.*")]
    return max(found)


def save_outputs(
    folder: Path,
    processor: Processor,
    prompts: Sequence[Mapping[str, Any]],
    outputs: Sequence[Mapping[str, Any]],
    first: int = 0,
    raw: Sequence[Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Writes each output (`0000.png`, `0000.wav`) and `outputs.jsonl`: prompts, words, file names. Returns its lines.

    What of the prompts is no words is written too, as `0000_given.png` and `0000_given.wav`; and beside a file that a page
    cannot show, how it looks or sounds: `"pen": "0000.json", "pen_drawn": "0000_pen.png"`. These are exact, to be read again;
    for a person's eyes there is `samples.png` (see mdm/pages/sheet.py).

    first: number of the first one; from 1 on they are added to those that are there
    raw:   the prompts as `generate` took them, where they are written in another way
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines, begun = [], list[Written]()
    try:
        for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True), first):
            begun += [Written(folder, f"{i:04d}", processor), Written(folder, f"{i:04d}_given", processor)]
            made, given = begun[-2:]
            lines.append({f"given_{key}": value for key, value in given.all(prompt).items()} | made.all(output))
        with (folder / "outputs.jsonl").open("a" if first else "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        seen = sheet(processor, prompts if raw is None else raw, outputs, first)
        if seen is not None:
            seen.save(folder / sheet_name(first))
    except OSError as error:
        raise UserError(f"output_dir {folder}: cannot write the outputs ({error})") from error
    except Exception as error:  # of a tokenizer of the user's own
        for name in {name for files in begun for name in files.names}:
            (folder / name).unlink(missing_ok=True)
        raise UserError(f"output_dir {folder}: cannot write the outputs: {said(error)}") from error
    return lines


def sheet_name(first: int) -> str:
    """Of the picture of all samples from that number on."""
    return f"samples_{first:04d}.png" if first else "samples.png"


class Written:
    """The files of one sample: `stem` and the modality's suffix, with its name where another has that already."""

    def __init__(self, folder: Path, stem: str, processor: Processor) -> None:
        self.folder, self.stem, self.tokenizers, self.names = folder, stem, processor.tokenizers, set[str]()

    def all(self, parts: Mapping[str, Any]) -> dict[str, str]:
        """What a line says of the parts: words themselves, or the names of their files; of an edit, or of codes, nothing."""
        return {key: value for m, raw in parts.items() for key, value in self.part(m, raw).items()}

    def part(self, modality: str, raw: Any) -> dict[str, str]:
        if isinstance(raw, (str, Edit, Tensor)):
            return {modality: str(raw)} if isinstance(raw, str) else {}
        tokenizer: Any = self.tokenizers[modality]
        line, own = dict[str, str](), suffix(tokenizer)
        if own is not None:
            line[modality] = self._name(modality, own)
            tokenizer.write(raw, self.folder / line[modality])
        kind = kind_of(line.get(modality, ""))
        if isinstance(tokenizer, Drawn) and kind != "image":
            line[f"{modality}_drawn"] = self._name(modality, f"_{modality}.png")
            tokenizer.draw(raw).save(self.folder / line[f"{modality}_drawn"])
        if isinstance(tokenizer, Played) and kind != "audio":
            line[f"{modality}_played"] = self._name(modality, f"_{modality}.wav")
            write_wav(self.folder / line[f"{modality}_played"], *tokenizer.play(raw))
        return line or {modality: str(raw)}

    def _name(self, modality: str, ending: str) -> str:
        name = self.stem + ending if self.stem + ending not in self.names else f"{self.stem}_{modality}{ending}"
        self.names.add(name)
        return name


def kind_of(name: str) -> str | None:
    """Of a file that a page can show, by its name: "image" or "audio"."""
    kind = media_type(name).partition("/")[0]
    return kind if kind in ("image", "audio") else None


def media_type(name: str) -> str:
    """Of a file, by its suffix: "image/png"; nothing where it is unknown."""
    return mimetypes.guess_type(f"file{Path(name).suffix}")[0] or ""
