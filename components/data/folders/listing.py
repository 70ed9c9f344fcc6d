"""What lies in a folder: the files of a kind, in one order everywhere, and what is left out and said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

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


def listed(root: Path, kind: Kind) -> tuple[list[Path], list[Path]]:
    """Files of a kind in a folder and below, and all that lies there; nothing whose name starts with a dot.

    Raises FileNotFoundError where there is no folder, ValueError where it holds no such file.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"folder not found: {root}")
    if kind not in SUFFIXES:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(SUFFIXES)}")
    inside = (p for p in root.rglob("*") if not any(part.startswith(".") for part in p.relative_to(root).parts))
    found = sorted(p for p in inside if p.is_file())
    files = [p for p in found if p.suffix.lower() in SUFFIXES[kind]]
    if not files:
        held = f"; it holds {by_ending(found)}" if found else ""
        raise ValueError(f"no {kind} files ({', '.join(SUFFIXES[kind])}) in {root}{held}")
    return files, found


def say_unread(root: Path, kind: Kind, found: Iterable[Path]) -> None:
    """Prints how many files may be of a kind and are not read."""
    if unread := [p for p in found if p.suffix.lower() in UNREAD[kind]]:
        print(f"{root}: {by_ending(unread)} not read as {kind}, the first is {unread[0].relative_to(root)}; convert them")


def by_ending(files: Iterable[Path]) -> str:
    """Numbers of files: "12 .heic, 1 .csv"."""
    counts = Counter(p.suffix.lower() or "without an ending" for p in files)
    return ", ".join(f"{count} {ending}" for ending, count in counts.most_common(4))
