"""A folder of yours may be called `components` or `mdm`, as ours are: Python imports one of the two, and which one is said.

/home/me/components/mine.py     beside your script; `import components` finds this library's, and `components.mine` nothing
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
NAMES = ("components", "mdm")


def module_in(folder: str | Path, name: str) -> Path | None:
    """The file, or the folder with Python files, that a folder has under a module's name."""
    file, package = Path(folder, f"{name}.py").resolve(), Path(folder, name).resolve()
    return file if file.is_file() else package if next(package.glob("*.py"), None) else None


def imported_from(name: str) -> Path | None:
    """Where Python finds a module or package of a name; None where it finds none."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    places = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
    return next((Path(place).resolve() for place in places if place not in (None, "namespace")), None)


def hidden(name: str, folder: str | Path) -> str | None:
    """A line where a folder has a module of a name that Python finds elsewhere."""
    theirs, found = module_in(folder, name), imported_from(name)
    if theirs is None or found is None or found.is_relative_to(theirs):
        return None
    return f"{theirs} is hidden by {found.parent if found.name == '__init__.py' else found}; give yours another name"


@functools.cache
def say(folder: str) -> None:
    """Says, once, where `import components` or `import mdm` could be meant for what stands in a folder."""
    for name in NAMES:
        theirs, found = module_in(folder, name), imported_from(name)
        if theirs is None or found is None or theirs == HOME / name or os.environ.get("LOCAL_RANK", "0") != "0":
            continue
        gives = "yours" if found.is_relative_to(theirs) else "the library's"
        print(
            f"{theirs} has the name of this library's {HOME / name}: `import {name}` is {gives}; give yours another name",
            file=sys.stderr,
        )
