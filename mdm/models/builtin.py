"""Models that come with the library, `checkpoint=builtin:quickstart`: each a folder in bfloat16 with its card, README.md."""

from __future__ import annotations

from pathlib import Path

from mdm.config import UserError

PREFIX = "builtin:"
FOLDER = Path(__file__).parent / "trained"
"""`mdm run push repo=builtin:NAME` writes one."""


def builtin_folder(checkpoint: str) -> Path:
    """Where `builtin:NAME` lies. Raises UserError for a name that there is not."""
    name, known = checkpoint.removeprefix(PREFIX), sorted(p.name for p in FOLDER.iterdir() if p.is_dir())
    if name not in known:
        raise UserError(
            f"checkpoint={checkpoint}: the library has no such model; it has {', '.join(PREFIX + k for k in known)}"
        )
    return FOLDER / name
