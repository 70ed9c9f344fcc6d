"""Where the tensors of a checkpoint are copied to, written and read: a folder of this machine, or a URL of any of fsspec's.

torch.distributed.checkpoint does both; of a URL, each file is made on the local disk first and sent whole, and fetched whole,
with the patience of `components.places`: an upload that breaks off is begun again.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem, FsspecReader, FsspecWriter
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from components.places import AnyPath, exists, patiently, place, publish, read_bytes, remove, system


class Stager(DefaultStager):
    """Copies tensors to memory, pinned where they come from a GPU, which is kept for the next time.

    torch's own copies plain tensors and sharded ones; here those of any type that is made of tensors (8-bit moments).
    """

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        super().__init__(StagingOptions(cuda, False, False, cuda))

    def stage(self, state_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        parts, how = _apart(state_dict)
        return _together(super().stage(parts, **kwargs), how)


def _apart(value: Any) -> tuple[Any, Any]:
    """The plain tensors of a value, and how they are put together again."""
    if isinstance(value, dict):
        both = {key: _apart(part) for key, part in value.items()}
        return {key: parts for key, (parts, _) in both.items()}, {key: how for key, (_, how) in both.items()}
    if not is_traceable_wrapper_subclass(value):
        return value, None
    names, about = value.__tensor_flatten__()
    both = {name: _apart(getattr(value, name)) for name in names}
    inner = {name: how for name, (_, how) in both.items()}
    made = (type(value).__tensor_unflatten__, about, value.size(), value.stride())
    return {name: parts for name, (parts, _) in both.items()}, (inner, made)


def _together(parts: Any, how: Any) -> Any:
    if isinstance(how, dict):
        return {key: _together(parts[key], own) for key, own in how.items()}
    if how is None:
        return parts
    inner, (make, about, size, stride) = how
    return make({name: _together(parts[name], own) for name, own in inner.items()}, about, size, stride)


class Far(FileSystem):
    """What DCP asks of a file system, of one that is far away."""

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[IO[Any]]:  # pyright: ignore[reportIncompatibleMethodOverride] (its own says IOBase)
        at: Any = place(str(path))
        with tempfile.TemporaryDirectory() as here:
            copy = Path(here) / "file"
            if "r" in mode:
                patiently(at, lambda: system(at).get_file(at.path, str(copy)))
            with copy.open(mode) as stream:
                yield stream
            if "w" in mode:
                publish(at, copy)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        publish(str(new_path), read_bytes(str(path)))  # of object stores, none has a rename
        remove(place(str(path)))

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Object stores have no folders."""

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return exists(str(path))

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        remove(place(str(path)))


def writer(folder: AnyPath) -> FileSystemWriter:
    """Writes the tensors of a checkpoint."""
    if isinstance(folder, Path):
        return FileSystemWriter(folder)
    made = FsspecWriter(str(folder))
    made.fs = Far()
    return made


def reader(folder: AnyPath) -> FileSystemReader:
    """Reads them."""
    if isinstance(folder, Path):
        return FileSystemReader(folder)
    made = FsspecReader(str(folder))
    made.fs = Far()
    return made
