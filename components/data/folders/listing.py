"""What lies in a folder: the files of a kind, in one order everywhere, and what is left out and said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from components.places import AT_START, AnyPath, listing, within

Kind = Literal["text", "image", "audio"]

SUFFIXES: dict[str, tuple[str, ...]] = {
    "text": (".txt", ".md"),
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"),
    "audio": (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff"),
}
"""Endings of the files of a kind, in any case."""

UNREAD: dict[str, tuple[str, ...]] = {
    "text": (".pdf", ".docx", ".doc", ".odt", ".rtf", ".epub", ".html", ".htm", ".rst", ".tex", ".jsonl", ".json", ".parquet"),
    "image": (".heic", ".heif", ".svg", ".jp2", ".jxl", ".psd", ".dng", ".cr2", ".nef", ".arw", ".npy"),
    "audio": (".m4a", ".aac", ".wma", ".amr", ".webm", ".mp4", ".mov", ".mkv", ".npy"),
}
"""Files that somebody may well take for one of the kind, and that are not read."""


def listed(root: AnyPath, kind: Kind) -> tuple[list[AnyPath], list[AnyPath]]:
    """Files of a kind in a folder and below, and all that lies there; nothing whose name starts with a dot.

    Raises FileNotFoundError where there is no folder, ValueError where it holds no such file.
    """
    if kind not in SUFFIXES:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(SUFFIXES)}")
    found = listing(root, AT_START)
    files = [p for p in found if p.suffix.lower() in SUFFIXES[kind]]
    if not files:
        held = f"; it holds {by_ending(found)}" if found else ""
        raise ValueError(f"no {kind} files ({', '.join(SUFFIXES[kind])}) in {root}{held}")
    return files, found


def say_unread(root: AnyPath, kind: Kind, found: Iterable[AnyPath]) -> None:
    """Prints how many files may be of a kind and are not read."""
    if unread := [p for p in found if p.suffix.lower() in UNREAD[kind]]:
        print(f"{root}: {by_ending(unread)} not read as {kind}, the first is {within(root, unread[0])}; convert them")


def by_ending(files: Iterable[AnyPath]) -> str:
    """Numbers of files: "12 .heic, 1 .csv"."""
    counts = Counter(p.suffix.lower() or "without an ending" for p in files)
    return ", ".join(f"{count} {ending}" for ending, count in counts.most_common(4))
