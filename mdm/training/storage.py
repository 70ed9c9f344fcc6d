"""Where the tensors of a checkpoint are written and read: a folder of this machine, or a URL of any file system of fsspec's.

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

from torch.distributed.checkpoint._fsspec_filesystem import FileSystem, FsspecReader, FsspecWriter
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

from components.places import AnyPath, exists, patiently, place, publish, read_bytes, remove, system


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
