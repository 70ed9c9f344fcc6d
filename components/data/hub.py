"""Datasets in the layouts of Hugging Face: a split of one opened, its rows undecoded, and a row read as a sample."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.data.bad import BadSample
from components.data.clips import duration, read_audio
from components.data.folders.captions import spoken
from components.data.images import read_image
from components.data.reading import checked_text
from components.files import in_one_line

PARTS = 1024  # of a dataset on the disk that is read as a stream: as many lanes can share it


def load_split(
    path: str, split: str, name: str | None, streaming: bool, data_files: str | None, wanted: Mapping[str, str]
) -> Any:
    """A split of a dataset. Raises ValueError in one line where its files cannot be read."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    if Path(path).is_dir() and any((Path(path) / f).is_file() for f in ("dataset_dict.json", "state.json")):
        loaded = datasets.load_from_disk(path)
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise ValueError(f"{path} has no split {split!r}; it has {', '.join(map(str, loaded))}")
            loaded = loaded[split]
        return loaded.to_iterable_dataset(num_shards=max(1, min(len(loaded), PARTS))) if streaming else loaded
    if data_files is not None and data_files.startswith(("s3://", "s3a://")):
        _accept_block_size()
    ask = {"path": path, "name": name, "split": split, "streaming": streaming, "data_files": data_files}
    try:
        try:
            return datasets.load_dataset(**ask)
        except ValueError as error:
            if "share the same prefix" not in str(error):
                raise
        # a WebDataset guesses its columns from its first samples, and one of those lacks a part: say what they are
        kinds = {"text": datasets.Value("string"), "image": datasets.Image(decode=False), "audio": datasets.Audio(decode=False)}
        own = {column: kinds[modality] for modality, column in wanted.items()}
        own |= {key: datasets.Value("string") for key in ("__key__", "__url__")}
        return datasets.load_dataset(**ask, features=datasets.Features(own))
    except OSError:  # not found, not connected
        raise
    except Exception as error:  # of readers of many formats
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        raise ValueError(f"{path} cannot be read: {in_one_line(cause)}") from error


@functools.cache
def _accept_block_size() -> None:
    """`datasets` names a block size to every file system that it streams from, and s3fs knows none by that name."""
    import fsspec

    theirs = fsspec.get_filesystem_class("s3")

    class S3(theirs):
        def __init__(self, *args: Any, block_size: int | None = None, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    for protocol in ("s3", "s3a"):
        fsspec.register_implementation(protocol, S3, clobber=True)


def undecoded(dataset: Any) -> Any:
    """Images and clips as bytes or paths: `components.data.reading` decodes them, as it does those of every other source."""
    import datasets

    for kind in (datasets.Image, datasets.Audio):
        for column in [c for c, feature in (dataset.features or {}).items() if isinstance(feature, kind)]:
            dataset = dataset.cast_column(column, kind(decode=False))
    return dataset


def labels_of(dataset: Any) -> dict[str, list[str]]:
    """The columns of a dataset that hold classes, and the names of those."""
    import datasets

    return {c: f.names for c, f in (dataset.features or {}).items() if isinstance(f, datasets.ClassLabel)}


class Convert:
    """A dataset's row -> a sample. Raises BadSample.

    labels: of columns of classes, what each number is called: a class is a caption
    """

    def __init__(
        self, columns: Mapping[str, str], size: int | None, sample_rate: int, labels: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self.columns: dict[str, str] = dict(columns)
        self.labels: dict[str, Sequence[str]] = dict(labels or {})
        self.size = size
        self.sample_rate = sample_rate

    def __call__(self, row: Mapping[str, Any], name: str) -> dict[str, Any]:
        if row.get("__key__"):
            name = f"{row.get('__url__')}, sample {row['__key__']}"
        sample: dict[str, Any] = {}
        for modality, column in self.columns.items():
            try:
                if modality == "text":
                    sample["text"] = checked_text(self._word(row[column], column), name, column)
                elif modality == "image":
                    sample["image"] = read_image(row[column], self.size, name)
                else:
                    sample["audio"] = read_audio(row[column], self.sample_rate, name)
                    sample["sample_rate"] = self.sample_rate
            except BadSample as bad:
                raise BadSample(name, bad.why if modality == "text" else f"{column}: {bad.why}") from bad
        return sample

    def _word(self, value: Any, column: str) -> Any:
        names = self.labels.get(column, ())
        return spoken(names[value]) if isinstance(value, int) and 0 <= value < len(names) else value


class Shorter:
    """Whether a row's clip is no longer than so many seconds, by its header; one that cannot be read is left to the draw."""

    def __init__(self, column: str, seconds: float) -> None:
        self.column = column
        self.seconds = seconds

    def __call__(self, row: Mapping[str, Any]) -> bool:
        try:
            return duration(row[self.column]) <= self.seconds
        except BadSample:
            return True
