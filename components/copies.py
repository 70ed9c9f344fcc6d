"""Copies of what lies far away, on the local disk.

    fetched(path)       a file: itself where it is local, or its copy in a cache that several processes of a machine share
    copied(folder)      a folder's small files, for as long as this process lives

The cache lies in $MDM_CACHE (default ~/.cache/mdm) and holds $MDM_CACHE_GB (20): what was not used for longest goes first.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from components.places import AT_START, AnyPath, amount, listing, patiently, place, read_bytes, system, within

UNFINISHED = 3600.0
"""Seconds after its last byte came for which a copy that is being made is left alone."""


def fetched(path: str | AnyPath, version: str = "", seconds: float | None = None) -> Path:
    """A file on the local disk: itself, or its copy in the cache, which is made where there is none.

    version: of what lies there now, where one knows it (a checksum); else its size and its tag or time are asked for

    Raises FileNotFoundError, Unreachable, and OSError where the disk is full.
    """
    at = place(path)
    if isinstance(at, Path):
        return at
    from filelock import FileLock

    version = version or str(patiently(at, lambda: system(at).ukey(at.path), seconds))
    cache = Path(os.environ.get("MDM_CACHE") or Path.home() / ".cache" / "mdm")
    cache.mkdir(parents=True, exist_ok=True)
    kept = cache / (hashlib.blake2b(f"{at}\n{version}".encode(), digest_size=16).hexdigest() + at.suffix)
    with FileLock(f"{kept}.lock"):  # of several processes of a machine one fetches
        if not kept.is_file():
            partial = Path(tempfile.mkstemp(dir=cache, prefix="partial_")[1])
            try:
                patiently(at, lambda: system(at).get_file(at.path, str(partial)), seconds)
                os.replace(partial, kept)
            finally:
                partial.unlink(missing_ok=True)
            _evict(cache, keep=kept)
        with contextlib.suppress(OSError):
            os.utime(kept, ns=(time.time_ns(), kept.stat().st_mtime_ns))
    return kept


def copied(folder: str | AnyPath, but: str = "shard_") -> Path:
    """A folder on the local disk: itself, or a copy of its files, but those whose name begins with `but`.

    Raises FileNotFoundError, Unreachable.
    """
    at = place(folder)
    if isinstance(at, Path):
        return at
    made = Path(tempfile.mkdtemp(prefix="mdm_"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    for file in listing(at, AT_START):
        if not file.name.startswith(but):
            local = made / within(at, file)
            local.parent.mkdir(parents=True, exist_ok=True)
            local.write_bytes(read_bytes(file))
    return made


def forget(copy: Path) -> None:
    """Takes a copy out of the cache: it is not what it should be."""
    copy.unlink(missing_ok=True)


def _evict(cache: Path, keep: Path) -> None:
    """Removes the copies that were not used for longest, until the rest fits. One that is open stays readable to who has it."""
    limit = amount("MDM_CACHE_GB", 20) * 2**30
    ages = []
    for file in cache.iterdir():
        with contextlib.suppress(OSError):  # another process removes too
            if file.suffix != ".lock" and file.is_file():
                about = file.stat()
                making = file.name.startswith("partial_") and time.time() - about.st_mtime < UNFINISHED  # by another process
                ages.append((about.st_atime, about.st_size, file, making))
    total = sum(size for _, size, _, _ in ages)
    for _, size, file, making in sorted(ages, key=lambda age: age[0]):
        if total <= limit:
            return
        if file != keep and not making:
            file.unlink(missing_ok=True)
            total -= size
