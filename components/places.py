"""Where data lies: a local path, or a URL of any file system that fsspec knows (s3://, gs://, hf://, https://, memory://).

    place("s3://bucket/folder")     a path with the methods of pathlib's, whichever it is
    listing(root)                   the files below a folder, in one order
    publish(path, data)             writes a file, all of it or nothing

What is far away is asked for again, with growing pauses, where it does not answer (`patiently`); what it refuses (no such file,
no access, no credentials) is said at once. $MDM_PATIENCE (600) is the seconds that a run waits for a file system that is gone.
Copies on the local disk: `components.copies`.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias, TypeVar

from upath import UPath

from components.files import Unreachable, in_one_line

T = TypeVar("T")
AnyPath: TypeAlias = Path | UPath

EXTRAS = {
    "s3": "'trimodal-mdm[s3]'",
    "s3a": "'trimodal-mdm[s3]'",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface_hub",
}
"""What speaks a protocol, where it does not come with the library."""

REFUSALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ParamValidationError")
"""Errors of clients, by name, that waiting does not mend: they are no OSErrors, and their packages may not be there."""

CLIENTS = {"aiohttp", "aiobotocore", "botocore", "httpcore", "httpx", "requests", "urllib3"}
"""Packages whose errors are of a connection."""

HERE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError, NotImplementedError)
"""Answers: what is asked for is not there, or not of that kind."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE}
"""Of this machine, whatever is at the other end."""

FIRST_PAUSE = 0.5

AT_START = 20.0
"""Seconds that one waits before a run begins: nothing is lost yet, and a name may be wrong."""


def is_remote(path: str | AnyPath) -> bool:
    """Whether it is a URL, of whatever is not this machine's own files."""
    return not isinstance(path, Path) and "://" in str(path) and not str(path).startswith(("file://", "local://"))


def place(path: str | AnyPath) -> AnyPath:
    """The path of what a setting names. Raises ValueError for a URL that nothing here can open."""
    if not is_remote(path):
        return Path(str(path).removeprefix("file://").removeprefix("local://"))
    if isinstance(path, UPath):
        return path.resolve() if ".." in path.parts else path  # a key with two dots in it is none
    import fsspec

    protocol = str(path).partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        need = f"pip install {EXTRAS[protocol]}" if protocol in EXTRAS else in_one_line(error)
        raise ValueError(f"{path}: {protocol}:// needs a package: {need}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {protocol}:// is no file system that is known; s3, gs, hf, https, memory are") from error
    return place(UPath(path))


def amount(variable: str, default: float) -> float:
    """What a variable of the environment says. Raises Unreachable where it is no amount: a setting's fault, and no sample's."""
    said = os.environ.get(variable) or str(default)
    try:
        value = float(said)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise Unreachable(f"{variable}={said} in the environment: a number, 0 or more (default {default:g})")
    return value


def patience() -> float:
    """Seconds that a run waits for a file system that does not answer."""
    return amount("MDM_PATIENCE", 600)


def patiently(path: str | AnyPath, ask: Callable[[], T], seconds: float | None = None) -> T:
    """What `ask` gives; asked again where a remote file system does not answer, after 0.5, 1, 2, ... 30 seconds.

    seconds: until it is given up, where `patience()` is not less

    Raises Unreachable, in one line; at once what is an answer (FileNotFoundError), a refusal, or this machine's own fault; of a
    local path, whatever `ask` raises.
    """
    if not is_remote(path):
        return ask()

    def again(error: Exception) -> bool:
        if isinstance(error, HERE) or (isinstance(error, OSError) and error.errno in FULL):
            return False
        if isinstance(error, (PermissionError, TypeError, ValueError)) or type(error).__name__ in REFUSALS:
            raise Unreachable(f"{path} cannot be opened ({type(error).__name__}: {in_one_line(error)})") from error
        return True

    return retried(str(path), ask, again, seconds)


def retried(name: str, ask: Callable[[], T], again: Callable[[Exception], bool], seconds: float | None = None) -> T:
    """What `ask` gives, asked again after each error for which `again` says so. Raises Unreachable when it is given up."""
    started, pause, limit = time.monotonic(), FIRST_PAUSE, patience() if seconds is None else min(seconds, patience())
    while True:
        try:
            return ask()
        except Exception as error:
            if not again(error):
                raise
            why, waited = f"{type(error).__name__}: {in_one_line(error)}", time.monotonic() - started
            if waited >= limit:
                raise Unreachable(f"{name} does not answer, for {waited:.0f} seconds ({why})") from error
            if pause == FIRST_PAUSE:
                print(f"{name} does not answer ({why}); it is tried for {limit:.0f} seconds", file=sys.stderr, flush=True)
        time.sleep(min(pause * random.uniform(0.7, 1.3), max(limit - waited, 0.05)))
        pause = min(2 * pause, 30.0)


def of_network(error: BaseException | None) -> bool:
    """Whether an error, or what it comes of, is one of a connection, which another time may be there."""
    while error is not None:
        package = type(error).__module__.partition(".")[0]
        if isinstance(error, (*HERE, PermissionError)) or type(error).__name__ in REFUSALS:
            return False
        if isinstance(error, (ConnectionError, TimeoutError)) or package in CLIENTS:
            return True
        error = error.__cause__ or error.__context__
    return False


def system(at: UPath) -> Any:
    """The file system of a URL, of this process: a connection does not survive a fork."""
    import fsspec

    return fsspec.filesystem(at.protocol, **at.storage_options)


def read_bytes(path: str | AnyPath, seconds: float | None = None) -> bytes:
    """All of a file. Raises FileNotFoundError, Unreachable, OSError."""
    at = place(path)
    if isinstance(at, Path):
        return at.read_bytes()
    return patiently(at, lambda: system(at).cat_file(at.path), seconds)


def exists(path: str | AnyPath, seconds: float | None = None) -> bool:
    """Whether a file lies there."""
    at = place(path)
    if isinstance(at, Path):
        return at.is_file()
    try:
        return patiently(at, lambda: system(at).info(at.path), seconds)["type"] == "file"  # isfile() takes any error for a no
    except FileNotFoundError:
        return False


def sizes(folder: str | AnyPath, seconds: float | None = None) -> dict[str, int]:
    """The files that lie in a folder itself, by their names, and how large they are; none where there is no folder."""
    at = place(folder)
    if isinstance(at, Path):
        try:
            return {file.name: file.stat().st_size for file in at.iterdir() if file.is_file()}
        except (FileNotFoundError, NotADirectoryError):  # or another process has removed it meanwhile
            return {}
    found = _entries(at, seconds)
    return {PurePosixPath(file["name"]).name: int(file["size"] or 0) for file in found if file["type"] == "file"}


def folders(root: str | AnyPath, seconds: float | None = None) -> list[AnyPath]:
    """The folders that lie in a folder itself, by their names; none where there is no folder."""
    at = place(root)
    if isinstance(at, Path):
        try:
            return sorted(path for path in at.iterdir() if path.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []
    names = (PurePosixPath(entry["name"]).name for entry in _entries(at, seconds) if entry["type"] == "directory")
    return [at / name for name in sorted(names)]


def _entries(at: UPath, seconds: float | None) -> list[dict[str, Any]]:
    """What lies in a folder itself, as fsspec tells it; none where there is no folder."""
    far = system(at)
    far.invalidate_cache()  # somebody else writes there
    try:
        return patiently(at, lambda: far.ls(at.path, detail=True), seconds)
    except FileNotFoundError:
        return []


def within(root: AnyPath, file: AnyPath) -> PurePosixPath:
    """A file by its path from a folder; one that lies elsewhere, by all of it."""
    if isinstance(root, Path) and isinstance(file, Path):
        return PurePosixPath((file.relative_to(root) if file.is_relative_to(root) else file).as_posix())
    return PurePosixPath(str(file).removeprefix(f"{root}".rstrip("/") + "/"))


def listing(root: str | AnyPath, seconds: float | None = None) -> list[AnyPath]:
    """The files of a folder and of those below it, sorted by their path from it; nothing whose name starts with a dot.

    Raises FileNotFoundError where there is no folder.
    """
    at = place(root)
    if isinstance(at, Path):
        if not at.is_dir():
            raise FileNotFoundError(f"folder not found: {root}")
        found = {}
        for parent, folders, names in os.walk(at):
            folders[:] = [name for name in folders if not name.startswith(".")]
            files = (Path(parent, name) for name in names)
            found |= {file.relative_to(at).parts: file for file in files if file.is_file()}
    else:
        names = [str(name) for name in patiently(at, lambda: system(at).find(at.path), seconds)]
        if not names:
            raise FileNotFoundError(f"folder not found, or empty: {root}")
        prefix = at.path.rstrip("/") + "/"
        inside = [name[name.index(prefix) + len(prefix) :] for name in names if prefix in name]
        found = {tuple(name.split("/")): at / name for name in inside}
    return [found[parts] for parts in sorted(found) if not any(part.startswith(".") for part in parts)]


def remove(path: AnyPath) -> None:
    """Removes a file, where it is there."""
    if isinstance(path, Path):
        return path.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        patiently(path, lambda: system(path).rm_file(path.path))


def publish(path: str | AnyPath, data: bytes | str | Path, seconds: float | None = None) -> None:
    """Writes a file, all of it or nothing: a reader never sees half of one.

    data: what it holds, or a local file that has it (which is moved)
    """
    at = place(path)
    if isinstance(at, Path):
        at.parent.mkdir(parents=True, exist_ok=True)
        partial = data if isinstance(data, Path) else at.with_name(f"{at.name}.partial")
        if not isinstance(data, Path):
            partial.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(partial, at)
        return
    if isinstance(data, Path):
        patiently(at, lambda: system(at).put_file(str(data), at.path), seconds)
        data.unlink()
        return
    content = data.encode() if isinstance(data, str) else data
    patiently(at, lambda: system(at).pipe_file(at.path, content), seconds)
