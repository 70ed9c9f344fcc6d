"""The folder that a recipe writes to."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from components.places import AT_START, is_remote, place, publish, remove
from mdm.config import UserError


def check_output_dir(output_dir: str, far: bool = False, key: str = "output_dir") -> None:
    """Raises UserError where a folder cannot be made or written to. One that was not there is not left behind.

    far: it may be a URL
    """
    name = f".writable_{os.environ.get('RANK', '0')}"  # several processes try at once
    if is_remote(output_dir):
        if not far:
            raise UserError(
                f"{key}={output_dir}: a run is written to a disk of this machine; name a folder of it (its checkpoints may "
                "go to a URL: checkpoint_dir)"
            )
        try:
            probe = place(output_dir) / name
            publish(probe, b"", AT_START)
            remove(probe)
        except (OSError, ValueError) as error:
            raise UserError(f"{key}={output_dir} cannot be written to: {error}") from error
        return
    folder = Path(output_dir)
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
        (folder / name).unlink()
    except OSError as error:
        raise UserError(f"{key}={output_dir} cannot be written to: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # another run has begun to write there
            for parent in made if "RANK" not in os.environ else ():  # of several processes, others write there
                parent.rmdir()


def output_folder(output_dir: str) -> Path:
    """The folder of this machine that a recipe writes to, made where there is none."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def in_place_of(path: Path) -> str:
    """What to say behind the name of a result that replaces one of an earlier run: to be asked before it is written."""
    return ", in place of the one that was there" if path.exists() else ""
