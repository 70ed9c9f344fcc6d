"""Config files: found by name, read, and laid on top of their base; the modules beside them."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from components.files import in_one_line
from mdm.config.errors import UserError
from mdm.config.names import close, close_file, named


def is_ours(config: Path) -> bool:
    """Whether a config is one of the library's: a module there is no business of a config that does not name it."""
    return config.parent.resolve() == (recipe_root() / "configs").resolve()


def names_modules(config: Path, own: DictConfig) -> list[Path]:
    """The modules beside a config that its own keys name, by `_component_` or in its place: it cannot run without them."""
    plain = OmegaConf.to_container(own, resolve=False)
    words = {*named(plain), *_dotted(plain)}
    return sorted(file for file in {config.parent / f"{word.partition('.')[0]}.py" for word in words} if file.is_file())


def _dotted(node: Any) -> Iterator[str]:
    """The dotted paths among the values of settings."""
    if isinstance(node, (Mapping, list)):
        for value in node.values() if isinstance(node, Mapping) else node:
            yield from _dotted(value)
    elif isinstance(node, str) and "." in node and all(part.isidentifier() for part in node.split(".")):
        yield node


def recipe_root() -> Path:
    """The folder of recipes."""
    return carried("recipes")


def carried(name: str) -> Path:
    """A folder that is no package: carried by the wheel as `mdm/_recipes`, beside `mdm` in a checkout."""
    package = Path(__file__).parents[1]
    return package / f"_{name}" if (package / f"_{name}").is_dir() else package.parent / name


def find_config(name: str) -> Path:
    """A config's file, from its name or a path."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    path = recipe_root() / "configs" / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.yaml"))
        hint = close(name, known)
        raise UserError(f"config {name!r} is not one of {', '.join(known)}, nor the path of a .yaml file{hint}")
    return path


def read_yaml(path: Path) -> DictConfig:
    """A config file; one with `base: NAME` is that config (a name, or a path from its own folder), with its own keys on top.

    Raises UserError where a file is missing, or is no YAML of keys and values.
    """
    return laid(layers(path))


def laid(files: Mapping[Path, DictConfig]) -> DictConfig:
    """The files of a config, as `layers` gives them, as one: each on top of those behind it."""
    merged: dict[Any, Any] = {}
    for config in reversed(list(files.values())):
        merged = _layered(merged, typing.cast(dict, OmegaConf.to_container(config, resolve=False)))
    return OmegaConf.create(merged)


def layers(path: Path) -> dict[Path, DictConfig]:
    """The files that a config is made of, each with its own keys: the config's, then its base's, the base's own base's."""
    found: dict[Path, DictConfig] = {}
    while True:
        found[path] = config = _read_file(path)
        base = config.pop("base", None)
        if base is None:
            return found
        if not isinstance(base, str):
            raise UserError(f"{path}: base must be a config's name or path, got {base!r}")
        path = path.parent / find_config(base)
        if path in found:
            raise UserError(f"{path} builds on itself: base={base}")


def _read_file(path: Path) -> DictConfig:
    if not path.is_file():
        raise UserError(f"config file not found: {path}{close_file(path)}")
    try:
        config = OmegaConf.load(path)
    except Exception as error:  # yaml's own errors carry the line
        raise UserError(f"{path} is not valid YAML: {in_one_line(error)}") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{path} must hold keys and values, got {type(config).__name__}")
    return config


def _layered(below: dict[Any, Any], above: dict[Any, Any]) -> dict[Any, Any]:
    """One config on top of another: tables are merged, but a node of another `_component_`, or an empty one, replaces what
    stood there, and null takes a table out."""
    merged = dict(below)
    for key, value in above.items():
        under = below.get(key)
        if value is None and isinstance(under, dict):
            del merged[key]
        elif value and isinstance(value, dict) and isinstance(under, dict) and _same_component(under, value):
            merged[key] = _layered(under, value)
        else:
            merged[key] = value
    return merged


def _same_component(below: Mapping[Any, Any], above: Mapping[Any, Any]) -> bool:
    return "_component_" not in above or above["_component_"] == below.get("_component_")
