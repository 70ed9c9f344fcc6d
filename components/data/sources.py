"""The user's own data: a local folder, JSONL, or a Hugging Face dataset.

Samples are dicts with any of `text` (str), `image` (PIL, L or RGB), `audio` (a waveform, with its `sample_rate` in Hz), read by
`components.data.reading`. A sample that cannot be used keeps its place: it is a `BadSample` when it is drawn
(on_corrupt: skip), or ends the run by name (on_corrupt: refuse). An indexable source names each of its samples (`name_of`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np

from components.data.bad import BadSample, OnCorrupt, checked_policy
from components.data.clips import read_audio, waveform
from components.data.folders.captions import Caption, captioned, other_captions, read_caption, say_alone
from components.data.folders.listing import Kind, listed, say_unread
from components.data.folders.splits import Split, part
from components.data.hub import Convert, Shorter, labels_of, load_split, undecoded
from components.data.images import read_image
from components.data.indexed import Indexed, Iterated, Mapped
from components.data.reading import checked_text, json_lines, read_text
from components.places import AT_START, AnyPath, exists, listing, place, within
from components.progress import Bar
from components.resampling import resample
from components.templates import fill

LOOKED_AT = 16
"""Files of a folder that are read when the source is made, evenly spread: however many there are, a wrong folder is seen."""


class Folder(Indexed[dict[str, Any]]):
    """Files of a folder and its sub-folders, read when they are drawn.

    kind "text":  every .txt or .md file is a document
    kind "image": every image, with its caption
    kind "audio": every clip, with its transcript

    A document, caption or transcript that is empty or missing is corrupt, as is a file that cannot be read. Files and folders
    whose name starts with a dot are no part of it. Captions without a file, files that a table does not name, and files that
    look like the kind and are not read (.heic, .m4a) are counted and printed.

    size:        images are cropped to a square and resized to so many pixels; None leaves them
    sample_rate: clips are mixed to mono and resampled to it, in Hz
    captions:    "beside", a .txt file of the same name; "folder", the name of the one that it lies in; a table, e.g.
                 "captions.csv"; None, samples have no text (`components.data.folders.captions`)
    columns:     of a table, where they are called otherwise, e.g. {file: image_id, text: description}
    split:       "train" or "validation": all but a share of `held_out`, or that; None is all (`components.data.folders.splits`)
    on_corrupt:  "skip": a corrupt file is a `BadSample` when it is drawn, and a few are looked at when the source is made;
                 "refuse": every file is read when the source is made
    """

    called = "file"

    def __init__(
        self,
        path: str,
        kind: Kind,
        size: int | None = None,
        sample_rate: int = 8000,
        captions: str | None = "beside",
        columns: dict[str, str] | None = None,
        split: Split | None = None,
        held_out: float = 0.1,
        on_corrupt: OnCorrupt = "skip",
    ) -> None:
        root = place(path)
        self.kind: Kind = kind
        self.size = size
        self.sample_rate = sample_rate
        self.on_corrupt: OnCorrupt = checked_policy(on_corrupt)
        files, found = listed(root, kind)
        every = captioned(root, files, captions if kind != "text" else None, columns)
        here = part([within(root, file).as_posix() for file, _ in every], split, held_out)
        self.samples: list[tuple[AnyPath, Caption]] = [every[i] for i in here]
        count = len(self) if on_corrupt == "refuse" else min(len(self), LOOKED_AT)
        corrupt: list[BadSample] = []
        for i in Bar(np.linspace(0, len(self) - 1, count), desc=f"checking {path}", disable=count < 1000):
            try:
                self[int(i)]
            except BadSample as bad:
                corrupt.append(bad)
        looked_at = f"{count} files" if count == len(self) else f"{count} files looked at"
        if len(corrupt) == count:
            how = kind != "text" and captions == "beside" and not ({c for _, c in every} & set(found))
            help_ = f"; {other_captions(root, found)}" if how else ""
            raise ValueError(f"all {looked_at} in {path} are corrupt as {kind}, the first is {corrupt[0]}{help_}")
        if corrupt:
            print(f"{path}: skipped {len(corrupt)} corrupt of {looked_at}, the first is {corrupt[0]}")
        if split != "validation":  # which lies in the same folder: said once
            say_unread(root, kind, found)
            say_alone(root, kind, files, found, every)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def files(self) -> list[AnyPath]:
        """The file of each sample: what it is known by where the folder changes later."""
        return [file for file, _ in self.samples]

    def name_of(self, index: int) -> str:
        return str(self.samples[index][0])

    def read(self, index: int) -> dict[str, Any]:
        file, caption = self.samples[index]
        if self.kind == "text":
            return {"text": checked_text(read_text(file), str(file))}
        sample: dict[str, Any] = {} if caption is None else {"text": read_caption(file, caption)}
        if self.kind == "image":
            return {**sample, "image": read_image(file, self.size)}
        return {**sample, "audio": read_audio(file, self.sample_rate), "sample_rate": self.sample_rate}


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
    on_corrupt: OnCorrupt = "skip",
) -> Mapped | Iterated:
    """A Hugging Face dataset: from the hub, or from a folder that `save_to_disk` or the hub's own layout wrote.

    text, image, audio: the columns to take, None for none; of a column of classes a text is the name of the class
    split:              also a part of one: "train[:90%]" and "train[90%:]"
    data_files:         of a format, with its name as the path: `path: webdataset, data_files: shards/*.tar`
    streaming:          read as it comes; shuffled block by block, and resumed at the next sample all the same
    max_seconds:        longer clips are left out: what would not fit its canvas
    on_corrupt:         "skip": a row that cannot be used is a `BadSample`; "refuse": it is an error when it is drawn

    Raises ValueError for a column that it does not have.
    """
    checked_policy(on_corrupt)
    columns = {"text": text, "image": image, "audio": audio}
    wanted = {modality: column for modality, column in columns.items() if column is not None}
    dataset = load_split(path, split, name, streaming, data_files, wanted)
    known = dataset.column_names or list(next(iter(dataset), {}))
    for modality, column in wanted.items():
        if column not in known:
            dots = "; of a.b.png in a WebDataset the sample is a, the column b.png" if "__key__" in known else ""
            raise ValueError(f"{path} has no column {column!r} for {modality}; it has {', '.join(known)}{dots}")
    dataset = dataset.select_columns([*wanted.values(), *(c for c in ("__key__", "__url__") if c in known)])
    dataset = undecoded(dataset)
    if audio is not None and max_seconds is not None:
        dataset = dataset.filter(Shorter(audio, max_seconds))
    convert = Convert(wanted, size, sample_rate, labels_of(dataset))
    return (Iterated if streaming else Mapped)(dataset, convert, path, on_corrupt)


class Jsonl(Indexed[dict[str, Any]]):
    """Samples of a JSONL file, or of every one in a folder: a line for each, with any of these keys.

    {"text": "...", "image": "a.png", "audio": "a.wav"}     files are named from where the JSONL file lies
    {"prompt": "...", "text": "..."}                        an instruction and its response

    Each is a string, and a text is not empty (a prompt may be). A line that is none, or lacks a field of `fields`, is corrupt.

    fields:      our names of theirs, where they differ, e.g. {prompt: instruction, text: output}
    template:    what is made of a prompt; "{}" is the prompt, in which control tokens are text (`components.templates`)
    size, sample_rate, split, held_out: as in `Folder`; lines with one image or clip are on one side of a split
    on_corrupt:  "skip": corrupt lines are counted when the source is made, and they and files that cannot be read are a
                 `BadSample` when they are drawn; "refuse": every line and file is read when the source is made

    Raises FileNotFoundError, and ValueError naming file and line where no line can be used.
    """

    called = "line"

    def __init__(
        self,
        path: str,
        fields: dict[str, str] | None = None,
        template: str = "{}",
        size: int | None = None,
        sample_rate: int = 8000,
        split: Split | None = None,
        held_out: float = 0.1,
        on_corrupt: OnCorrupt = "skip",
    ) -> None:
        root = place(path)
        try:
            files = [root] if exists(root, AT_START) else [f for f in listing(root, AT_START) if f.name.endswith(".jsonl")]
        except FileNotFoundError:
            files = []
        if not files:
            raise FileNotFoundError(f"no JSONL file at {path}")
        self.fields: dict[str, str] = fields or {}
        self.template = template
        self.size = size
        self.sample_rate = sample_rate
        self.on_corrupt: OnCorrupt = checked_policy(on_corrupt)
        every = [
            (file, number, self._parsed(value, f"{file}, line {number}"))
            for file in files
            for number, value in json_lines(file)
        ]
        if not every:
            raise ValueError(f"{path} holds no line")
        here = part([_shown(row) for _, _, row in every], split, held_out)
        self.rows: list[tuple[AnyPath, int, dict[str, str] | BadSample]] = [every[i] for i in here]
        corrupt = [row for _, _, row in self.rows if isinstance(row, BadSample)]
        if len(corrupt) == len(self.rows):
            raise ValueError(f"no line of {path} can be used; {corrupt[0]}")
        for i in range(len(self)) if on_corrupt == "refuse" else ():
            self[i]
        if corrupt:
            print(f"{path}: skipped {len(corrupt)} corrupt of {len(self.rows)} lines, the first is {corrupt[0]}")

    def _parsed(self, value: Any, where: str) -> dict[str, str] | BadSample:
        """The parts of a line by our names, each a string."""
        if isinstance(value, BadSample):
            return value
        if not isinstance(value, dict):
            return BadSample(where, f"it must hold keys and values, got {'null' if value is None else type(value).__name__}")
        names = {"prompt": "prompt", "text": "text", "image": "image", "audio": "audio", **self.fields}
        has = ", ".join(value) or "none"
        if missing := [theirs for theirs in self.fields.values() if theirs not in value]:
            return BadSample(where, f"it has no field {missing[0]!r}; it has {has}")
        row = {ours: value[theirs] for ours, theirs in names.items() if theirs in value}
        if not row:
            return BadSample(where, f"it has no field of {', '.join(names.values())}; it has {has}")
        try:
            return {k: v if k == "prompt" and v == "" else checked_text(v, where, names[k]) for k, v in row.items()}
        except BadSample as bad:
            return bad

    def __len__(self) -> int:
        return len(self.rows)

    def name_of(self, index: int) -> str:
        file, number, _ = self.rows[index]
        return f"{file}, line {number}"

    def read(self, index: int) -> dict[str, Any]:
        file, number, row = self.rows[index]
        if isinstance(row, BadSample):
            raise BadSample(row.name, row.why)  # a new one: a raised exception keeps its traceback
        sample: dict[str, Any] = dict(row)
        if "prompt" in row:
            sample["prompt"] = fill(self.template, row["prompt"])
        try:
            if "image" in row:
                sample["image"] = read_image(file.parent / row["image"], self.size)
            if "audio" in row:
                sample |= {"audio": read_audio(file.parent / row["audio"], self.sample_rate), "sample_rate": self.sample_rate}
        except BadSample as bad:
            raise BadSample(f"{file}, line {number}", f"{PurePath(bad.name).name}: {bad.why}") from bad
        return sample


def _shown(row: Mapping[str, str] | BadSample) -> str:
    """What a line is about, which is on one side of a split: its image or clip, else what is asked, else all of it."""
    if isinstance(row, BadSample):
        return row.name
    return next((row[key] for key in ("image", "audio", "prompt", "text") if row.get(key)), "")


def adapted(
    source: Any,
    size: int | None = None,
    sample_rate: int | None = None,
    count: int | None = None,
    on_corrupt: OnCorrupt = "skip",
) -> Mapped | Iterated:
    """Another source's samples as a tokenizer wants them.

    size:        images cropped to a square and resized to so many pixels;  sample_rate: clips resampled to it, in Hz
    count:       only the first so many samples
    on_corrupt:  as in `hugging_face`
    """

    def convert(sample: Mapping[str, Any], name: str) -> dict[str, Any]:
        own = dict(sample)
        if size is not None and "image" in own:
            own["image"] = read_image(own["image"], size, name)
        if sample_rate is not None and "audio" in own:
            if "sample_rate" not in own:
                raise BadSample(name, "its audio has no sample_rate")
            own["audio"] = resample(waveform(own["audio"], name), own["sample_rate"], sample_rate)
            own["sample_rate"] = sample_rate
        return own

    if hasattr(source, "__len__"):
        return Mapped(source, convert, type(source).__name__, checked_policy(on_corrupt), count)
    return Iterated(source, convert, type(source).__name__, checked_policy(on_corrupt), count)
