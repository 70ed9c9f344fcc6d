"""What a file that travels may have built: a checkpoint's `processor.json`, token shards' one, a `defaults.yaml`.

A config is its user's own code: its `_component_`s are anything importable. What travels is data: only what a closed table
lists for the purpose is built (names.py), from plain values and files of the same folder. Anything else is built where

    the config that is being run names the class itself       (evaluation, resume and finetuning of what it trained)
    the user trusts who made the file, by `trust=true`        (then what is run is printed)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.files import inside
from mdm.config import UserError, hints_of, locate
from mdm.config.names import full_path, named
from mdm.config.spelling import spelled

FILES = ("path", "subfolder")
"""Arguments that are names of files."""
MAX_VALUES = 10_000  # of a node: far more than any has, and soon counted

_named_by_run: frozenset[str] = frozenset()
_everything = False


def trust_run(config: Any, everything: bool = False) -> None:
    """What a config names is trusted in the run that it is the config of; that of the run before is forgotten.

    everything: `trust=true` of the command
    """
    global _named_by_run, _everything
    _say_once.cache_clear()
    _named_by_run, _everything = frozenset(map(full_path, named(config))), everything


def trust_saved(node: Any) -> None:
    """What this process has written, it may read back."""
    global _named_by_run
    _named_by_run |= frozenset(map(full_path, named(node)))


def _trusted_by_run(path: str) -> bool:
    """Whether the config names it, or the class that it belongs to (`mine.Tokens.load` by `mine.Tokens.train`)."""
    if path in _named_by_run:
        return True
    above, _, last = path.rpartition(".")
    for name in _named_by_run:
        owner = name.rpartition(".")[0]
        same = above in (name, owner) and not last.startswith("_")
        if (path == owner and _is_class(owner)) or (same and _is_class(above)):
            return True
    return False


def _is_class(path: str) -> bool:
    """Of a path that the config has named, and so has imported."""
    try:
        return inspect.isclass(locate(path, ""))
    except UserError:
        return False


def is_listed(built: Any, table: Mapping[str, str]) -> bool:
    """Whether an object is of a class that the table lists, and so is built from its file without trust."""
    own = f"{type(built).__module__}.{type(built).__qualname__}"
    return any(path == own or path.startswith(f"{own}.") for path in table.values())


def check_travelled(node: Any, key: str, file: str | Path, table: Mapping[str, str], trust: bool = False) -> Any:
    """A node out of a file that has travelled, ready to be built: its names in full, its files in that file's folder.

    table: what it may name;  trust: it may name anything

    Raises UserError for a name that is not in the table, a value that is not plain, a file elsewhere.
    """
    try:
        return _checked(node, key, Path(file), table, trust or _everything, [MAX_VALUES])
    except RecursionError:
        raise UserError(f"{file}: {key} is nested too deeply") from None


def _checked(node: Any, key: str, file: Path, table: Mapping[str, str], trust: bool, left: list[int]) -> Any:
    left[0] -= 1
    if left[0] < 0:
        raise UserError(f"{file}: {key} has more than {MAX_VALUES:,} values")
    if isinstance(node, list):
        return [_checked(value, f"{key}[{i}]", file, table, trust, left) for i, value in enumerate(node)]
    if not isinstance(node, Mapping):
        if node is None or isinstance(node, (str, int, float, bool)):
            return node
        raise UserError(f"{file}: {key} must be plain, got {type(node).__name__}")
    if not all(isinstance(name, str) for name in node):
        raise UserError(f"{file}: {key}: keys must be words")
    allowed = None
    if "_component_" in node:
        allowed = _allowed(node["_component_"], key, file, table, trust)
        node = {**node, **_spelled(node, allowed, key)} if allowed in table.values() else node
    out = {name: _checked(value, f"{key}.{name}", file, table, trust, left) for name, value in node.items()}
    if allowed is not None:
        out["_component_"] = allowed
        for name in FILES:
            if out.get(name) is not None:
                out[name] = _beside(file, out[name], name, key)
        if out["_component_"] in table.values() and out.get("path") is None and _has_file(out["_component_"]):
            raise UserError(f"{file}: {key} names no path: weights of its own come in a file, not out of a size that it states")
    return out


def _spelled(node: Mapping[str, Any], path: str, key: str) -> dict[str, Any]:
    """The words among the arguments of one of the library's own, those that name a component in full; nothing is gone into."""
    hints, words = hints_of(locate(path, key)), {name: value for name, value in node.items() if isinstance(value, str)}
    return {name: spelled(word, hints.get(name, Any), f"{key}.{name}", argument=True) for name, word in words.items()}


def _has_file(path: str) -> bool:
    """Whether one of the library's own is read from a file."""
    return "path" in inspect.signature(locate(path, "")).parameters


def _beside(file: Path, value: Any, name: str, key: str) -> str:
    """A file name as it is to be opened: `path` from the folder on, `subfolder` is inside `path`."""
    try:
        path = inside(file.parent, value)
    except ValueError as error:
        raise UserError(f"{key}.{name}: {error}") from error
    if name == "path" and not path.exists():  # some would then look for it on the hub
        raise UserError(f"{key}.path: {path} is not there")
    return str(path) if name == "path" else value


def _allowed(name: Any, key: str, file: Path, table: Mapping[str, str], trust: bool) -> str:
    if not isinstance(name, str):
        raise UserError(f"{file}: {key}._component_ must be a name, got {name!r}")
    path = full_path(name)
    module = path.partition(".")[0]
    if path in table.values():
        return path
    known = _trusted_by_run(path)
    if not (known or trust):
        raise UserError(
            f"{file}: {key} names {name!r}, which is none of the library's own ({', '.join(table)}); "
            f"if you trust who made that file, set trust=true, and have {module}.py in this folder or in PYTHONPATH=FOLDER"
        )
    try:
        found = inspect.getmodule(locate(path, key))
    except UserError as error:
        if f"No module named {module!r}" in str(error):
            hint = f"run this in the folder of {module}.py, put it beside the config, or set PYTHONPATH=FOLDER"
            raise UserError(f"{file}: {key} names {path!r}, and there is no {module}.py here; {hint}") from error
        if not known:  # else it is said where it is built
            raise UserError(f"{file}: {error}") from error
        return path
    if known:
        return path
    where = getattr(found, "__file__", None)
    _say_once(f"trust=true: {file} names {path}, which is run{f' out of {where}' if where else ''}")
    return path


@functools.cache
def _say_once(line: str) -> None:
    print(line, flush=True)
