"""The user's own data: a local folder, or a Hugging Face dataset.

Samples are dicts with any of `text` (str), `image` (PIL), `audio` (float waveform, with its `sample_rate` in Hz).
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from components.templates import fill

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


class Folder(Sequence):
    """Files of a folder and its sub-folders, read when they are drawn.

    kind "text":  every .txt or .md file is a document
    kind "image": every image with a caption in a .txt file of the same name
    kind "audio": every clip with a transcript in a .txt file of the same name

    Every file is opened once when the source is made: a corrupt one is skipped and counted, or refused by name.

    size:        images are cropped to a square and resized to so many pixels; None leaves them
    sample_rate: clips are mixed to mono and resampled to it, in Hz
    on_corrupt:  "skip" or "refuse"
    """

    def __init__(
        self,
        path: str,
        kind: Literal["text", "image", "audio"],
        size: int | None = None,
        sample_rate: int = 8000,
        on_corrupt: Literal["skip", "refuse"] = "skip",
    ) -> None:
        root = Path(path)
        if not root.is_dir():
            raise FileNotFoundError(f"folder not found: {path}")
        suffixes = {"text": (".txt", ".md"), "image": IMAGE_SUFFIXES, "audio": AUDIO_SUFFIXES}
        if kind not in suffixes:
            raise ValueError(f"kind {kind!r} is not one of {', '.join(suffixes)}")
        if on_corrupt not in ("skip", "refuse"):
            raise ValueError(f"on_corrupt {on_corrupt!r} is not one of skip, refuse")
        self.kind, self.size, self.sample_rate = kind, size, sample_rate
        found = sorted(p for p in root.rglob("*") if p.suffix.lower() in suffixes[kind] and p.is_file())
        if not found:
            raise ValueError(f"no {kind} files ({', '.join(suffixes[kind])}) in {path}")
        self.files, self.corrupt = [], []
        for file in tqdm(found, desc=f"checking {path}", disable=len(found) < 1000):
            try:
                self._read(file)
                self.files.append(file)
            except (OSError, ValueError, UnidentifiedImageError, RuntimeError) as error:
                if on_corrupt == "refuse":
                    raise ValueError(f"corrupt file {file}: {error} (on_corrupt: skip leaves such files out)") from error
                self.corrupt.append(file)
        if self.corrupt:
            print(f"{path}: skipped {len(self.corrupt)} corrupt of {len(found)} files, the first is {self.corrupt[0]}")
        if not self.files:
            raise ValueError(f"all {len(found)} {kind} files in {path} are corrupt")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._read(self.files[index])

    def _read(self, file: Path) -> dict[str, Any]:
        if self.kind == "text":
            return {"text": file.read_text(encoding="utf-8")}
        caption_file = file.with_suffix(".txt")
        if not caption_file.is_file():
            raise ValueError(f"its caption {caption_file.name} is missing")
        text = caption_file.read_text(encoding="utf-8").strip()
        if self.kind == "image":
            return {"text": text, "image": read_image(file, self.size)}
        return {"text": text, "audio": read_audio(file, self.sample_rate), "sample_rate": self.sample_rate}


def read_image(file: str | Path | io.BytesIO, size: int | None) -> Image.Image:
    """An image, cropped to its central square and resized where a size is asked for."""
    with Image.open(file) as opened:
        image = opened.convert("L") if opened.mode in ("L", "1", "I", "F", "I;16") else opened.convert("RGB")
    return image if size is None else fit(image, size)


def fit(image: Image.Image, size: int) -> Image.Image:
    """The central square of an image at `size` pixels."""
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


def read_audio(file: str | Path | io.BytesIO, sample_rate: int) -> np.ndarray:
    """A clip as mono float32 in [-1, 1] at `sample_rate` Hz. Raises ValueError where it holds no samples."""
    import soundfile

    samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    if len(samples) == 0:
        raise ValueError("it holds no samples")
    return resample(samples.mean(axis=1), rate, sample_rate)


def resample(audio: np.ndarray, rate: int, to: int) -> np.ndarray:
    """Polyphase resampling (SciPy) from `rate` to `to` Hz."""
    if rate == to:
        return audio.astype(np.float32)
    from scipy.signal import resample_poly

    divisor = int(np.gcd(rate, to))
    return resample_poly(audio, to // divisor, rate // divisor).astype(np.float32)


def hugging_face(
    path: str,
    split: str = "train",
    name: str | None = None,
    streaming: bool = False,
    text: str | None = "text",
    image: str | None = None,
    audio: str | None = None,
    size: int | None = None,
    sample_rate: int = 8000,
    data_files: str | None = None,
    max_seconds: float | None = None,
) -> Any:
    """A Hugging Face dataset: from the hub, or from a folder that `save_to_disk` or the hub's own layout wrote.

    text, image, audio: the columns to take, None for none
    data_files:         of a format, with its name as the path: `path: webdataset, data_files: shards/*.tar`
    streaming:          read as it comes; shuffled block by block, and resumed at the next sample all the same
    max_seconds:        longer clips are left out: what would not fit its canvas

    Raises ValueError for a column that it does not have.
    """
    import datasets

    if Path(path).is_dir() and any((Path(path) / f).is_file() for f in ("dataset_dict.json", "state.json")):
        loaded = datasets.load_from_disk(path)
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise ValueError(f"{path} has no split {split!r}; it has {', '.join(loaded)}")
            loaded = loaded[split]
        dataset = loaded.to_iterable_dataset() if streaming else loaded
    else:
        dataset = datasets.load_dataset(path, name, split=split, streaming=streaming, data_files=data_files)
    columns = {"text": text, "image": image, "audio": audio}
    wanted = {modality: column for modality, column in columns.items() if column is not None}
    known = dataset.column_names or list(next(iter(dataset)))
    for modality, column in wanted.items():
        if column not in known:
            raise ValueError(f"{path} has no column {column!r} for {modality}; it has {', '.join(known)}")
    dataset = dataset.select_columns(list(wanted.values()))
    if audio is not None:  # decoded here, by soundfile: the dataset's own decoder needs a package more
        dataset = dataset.cast_column(audio, datasets.Audio(decode=False))
        if max_seconds is not None:
            dataset = dataset.filter(_Shorter(audio, max_seconds))
    convert = _Convert(wanted, size, sample_rate)
    if streaming:
        return dataset.map(convert, remove_columns=[c for c in known if c in wanted.values() and c not in wanted])
    return Mapped(dataset, convert)


class _Convert:
    """A dataset's row -> a sample."""

    def __init__(self, columns: Mapping[str, str], size: int | None, sample_rate: int) -> None:
        self.columns, self.size, self.sample_rate = dict(columns), size, sample_rate

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        sample = {modality: row[column] for modality, column in self.columns.items()}
        if "image" in sample and self.size is not None:
            sample["image"] = fit(sample["image"], self.size)
        if "audio" in sample:
            sample["audio"] = read_audio(_opened(sample["audio"]), self.sample_rate)
            sample["sample_rate"] = self.sample_rate
        return sample


def _opened(clip: Mapping[str, Any]) -> io.BytesIO | str:
    """An undecoded clip of a dataset: its bytes, or where they lie."""
    return io.BytesIO(clip["bytes"]) if clip.get("bytes") else clip["path"]


class _Shorter:
    """Whether a row's clip is no longer than so many seconds; its header says so."""

    def __init__(self, column: str, seconds: float) -> None:
        self.column, self.seconds = column, seconds

    def __call__(self, row: Mapping[str, Any]) -> bool:
        import soundfile

        return soundfile.info(_opened(row[self.column])).duration <= self.seconds


class Jsonl(Sequence):
    """Samples of a JSONL file, or of every one in a folder: a line for each, with any of these keys.

    {"text": "...", "image": "a.png", "audio": "a.wav"}     files are named from where the JSONL file lies
    {"prompt": "...", "text": "..."}                        an instruction and its response

    fields:      our names of theirs, where they differ, e.g. {prompt: instruction, text: output}
    template:    what is made of a prompt; "{}" is the prompt, in which control tokens are text (`components.templates`)
    size, sample_rate: as in `Folder`

    Raises FileNotFoundError, and ValueError naming file and line for what is no JSON or lacks a field.
    """

    def __init__(
        self,
        path: str,
        fields: dict[str, str] | None = None,
        template: str = "{}",
        size: int | None = None,
        sample_rate: int = 8000,
    ) -> None:
        root = Path(path)
        files = sorted(root.rglob("*.jsonl")) if root.is_dir() else [root]
        if not files or not files[0].is_file():
            raise FileNotFoundError(f"no JSONL file at {path}")
        self.fields, self.template, self.size, self.sample_rate = fields or {}, template, size, sample_rate
        self.rows: list[tuple[Path, dict[str, Any]]] = []
        for file in files:
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                if line.strip():
                    self.rows.append((file.parent, self._parse(line, f"{file}, line {number}")))
        if not self.rows:
            raise ValueError(f"{path} holds no line")

    def _parse(self, line: str, where: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where} must hold keys and values, got {type(row).__name__}")
        missing = [theirs for theirs in self.fields.values() if theirs not in row]
        if missing:
            raise ValueError(f"{where} has no field {missing[0]!r}; it has {', '.join(row)}")
        names = {"prompt": "prompt", "text": "text", "image": "image", "audio": "audio", **self.fields}
        return {ours: row[theirs] for ours, theirs in names.items() if theirs in row}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        folder, row = self.rows[index]
        sample = dict(row)
        if "prompt" in sample:
            sample["prompt"] = fill(self.template, sample["prompt"])
        if "image" in sample:
            sample["image"] = read_image(folder / sample["image"], self.size)
        if "audio" in sample:
            sample |= {"audio": read_audio(folder / sample["audio"], self.sample_rate), "sample_rate": self.sample_rate}
        return sample


def adapted(source: Any, size: int | None = None, sample_rate: int | None = None, count: int | None = None) -> Mapped:
    """Another source's samples as a tokenizer wants them.

    size:        images cropped to a square and resized to so many pixels;  sample_rate: clips resampled to it, in Hz
    count:       only the first so many samples
    """

    def convert(sample: Mapping[str, Any]) -> dict[str, Any]:
        own = dict(sample)
        if size is not None and "image" in own:
            own["image"] = fit(own["image"], size)
        if sample_rate is not None and "audio" in own:
            own["audio"] = resample(own["audio"], own["sample_rate"], sample_rate)
            own["sample_rate"] = sample_rate
        return own

    return Mapped(source if count is None else [source[i] for i in range(min(count, len(source)))], convert)


class Mapped(Sequence):
    """An indexable dataset with a function applied to each row when it is drawn."""

    def __init__(self, dataset: Any, convert: Callable[[Any], dict[str, Any]]) -> None:
        self.dataset, self.convert = dataset, convert

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.convert(self.dataset[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))
