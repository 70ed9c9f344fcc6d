"""Configs are torchtune's: YAML with `_component_: dotted.path`, `${interpolation}` and `key=value` overrides.

A recipe declares its settings as a dataclass. Everything a user can get wrong is found here, before any data loads, and said
in one sentence: the key, its value, what it may be.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

T = TypeVar("T")


class UserError(Exception):
    """A mistake that the user can mend: printed as one line, exit code 2."""


def load(schema: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """The settings of a recipe: `schema` (a dataclass) filled from a YAML file and `key=value` overrides.

    Raises UserError for a missing file, an unknown key, a value of the wrong type, a key without a value.
    """
    path = Path(path)
    from_file = read_yaml(path)
    try:
        merged = _override(OmegaConf.merge(OmegaConf.structured(schema), from_file), overrides)
        filled = typing.cast(T, OmegaConf.to_object(merged))
        refuse_nan(filled)
        return filled
    except ConfigKeyError as error:
        raise UserError(_unknown_key(schema, error)) from error
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key}: no value, neither in {path} nor as {error.full_key}=VALUE") from error
    except ValidationError as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error


def recipe_root() -> Path:
    """The folder of recipes: carried by the wheel as `mdm/_recipes`, beside `mdm` in a checkout."""
    package = Path(__file__).parent
    return package / "_recipes" if (package / "_recipes").is_dir() else package.parent / "recipes"


def find_config(name: str) -> Path:
    """A config's file, from its name or a path."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    path = recipe_root() / "configs" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise UserError(f"config {name!r} is not one of {known}, nor the path of a .yaml file")
    return path


def read_yaml(path: Path) -> DictConfig:
    """A config file; one with `base: NAME` is that config (a name, or a path from its own folder), with its own keys on top.

    Raises UserError where a file is missing, or is no YAML of keys and values.
    """
    if not path.is_file():
        raise UserError(f"config file not found: {path}")
    try:
        config = OmegaConf.load(path)
    except Exception as error:  # yaml's own errors carry the line
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{path} must hold keys and values, got {type(config).__name__}")
    base = config.pop("base", None)
    if base is None:
        return config
    below = read_yaml(path.parent / find_config(base))
    plain = (typing.cast(dict, OmegaConf.to_container(c, resolve=False)) for c in (below, config))
    return OmegaConf.create(_layered(*plain))


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


def _override(config: DictConfig, arguments: Sequence[str]) -> DictConfig:
    """The config with `key=value` arguments merged in.

    A whole `_component_` node, or {}, replaces what stood there; null takes an entry out of a table, and empties a table.
    """
    for argument in arguments:
        key, sign, _ = argument.partition("=")
        if not sign or not key or key.startswith("-"):
            raise UserError(f"{argument!r} is not an override; write key=value")
        one = OmegaConf.from_dotlist([argument])
        value = OmegaConf.select(one, key)
        if OmegaConf.is_dict(OmegaConf.select(config, key)):
            if value is None and _take_out(config, key):
                continue
            if value is None or not value or "_component_" in value:
                OmegaConf.update(config, key, {}, merge=False)
                value = value or None
            if value is None:
                continue
        config = OmegaConf.merge(config, one)
    return config


def _take_out(config: DictConfig, key: str) -> bool:
    """Sets a key to null where it may be, or removes it from its table; False where it is neither."""
    above, _, name = key.rpartition(".")
    parent = OmegaConf.select(config, above) if above else config
    if parent._get_node(name)._metadata.optional:
        parent[name] = None
    elif not dataclasses.is_dataclass(parent._metadata.object_type):
        del parent[name]
    else:
        return False
    return True


def _unknown_key(schema: type, error: ConfigKeyError) -> str:
    parent, _, key = error.full_key.rpartition(".")
    at = schema
    for name in filter(None, parent.split(".")):
        at = typing.get_type_hints(at)[name]
    known = list(typing.get_type_hints(at))
    return f"unknown key {error.full_key!r}{_close(key, known)}; {parent or 'the recipe'} has {', '.join(known)}"


def _close(name: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def refuse_nan(value: Any, key: str = "") -> None:
    """Raises UserError for a nan, wherever it stands: it passes every comparison that a setting is checked by."""
    if isinstance(value, float) and value != value:
        raise UserError(f"{key}: nan is no value")
    if dataclasses.is_dataclass(value):
        value = vars(value)
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        refuse_nan(part, f"{key}.{name}" if key else str(name))


def at_least_one(settings: Any, *keys: str) -> None:
    """Raises UserError for a key under 1; null is whatever null means there."""
    at_least(1, settings, *keys)


def at_least(least: float, settings: Any, *keys: str) -> None:
    """Raises UserError for a key under `least`; null is whatever null means there."""
    for key in keys:
        value = getattr(settings, key)
        if value is not None and not value >= least:
            raise UserError(f"{key} must be at least {least}, got {value}")


def check(node: Any, key: str, supplied: Sequence[str] = ()) -> None:
    """Checks a `_component_` node (and those inside it) without building it: importable, keys known, simple types right.

    key:      where it stands in the config, for the message
    supplied: arguments the recipe passes itself
    """
    if not isinstance(node, Mapping):
        raise UserError(f"{key}: expected a _component_, got {node!r}")
    if "_component_" not in node:
        raise UserError(f"{key}: it needs a _component_ (a dotted path to a class or function); it has {', '.join(node)}")
    component = locate(node["_component_"], key)
    parameters = inspect.signature(component).parameters
    hints = _hints(component)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in node.items():
        if name == "_component_":
            continue
        if name not in parameters and not open_ended:
            raise UserError(
                f"unknown key '{key}.{name}'{_close(name, list(parameters))}; {node['_component_']} has {', '.join(parameters)}"
            )
        if isinstance(value, Mapping) and "_component_" in value:
            check(value, f"{key}.{name}")
        elif name in hints and not _fits(value, hints[name]):
            raise UserError(f"{key}.{name} must be {_spell(hints[name])}, got {value!r}")
    for name, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if required and name not in node and name not in supplied:
            raise UserError(f"{key}.{name}: no value, and {node['_component_']} needs one")


def instantiate(node: Mapping[str, Any], key: str, **supplied: Any) -> Any:
    """Builds a `_component_` node, the ones inside it first. `supplied` fills what the node leaves out.

    Raises UserError with the key where the component refuses its arguments.
    """
    check(node, key, tuple(supplied))
    component = locate(node["_component_"], key)
    accepted = inspect.signature(component).parameters
    arguments = {name: value for name, value in supplied.items() if name in accepted}
    for name, value in node.items():
        if name != "_component_":
            arguments[name] = _build(value, f"{key}.{name}")
    try:
        return component(**arguments)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"{key}: {error}") from error
    except ImportError as error:
        raise UserError(f"{key}: {node['_component_']} needs a package that is not installed: {error}") from error


def _build(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        if "_component_" in value:
            return instantiate(value, key)
        return {name: _build(inner, f"{key}.{name}") for name, inner in value.items()}
    if isinstance(value, list):
        return [_build(inner, f"{key}[{i}]") for i, inner in enumerate(value)]
    return value


def locate(path: str, key: str) -> Any:
    """The object at a dotted path, importing what is needed. Raises UserError where there is none."""
    from torchtune.config._errors import InstantiationError
    from torchtune.config._utils import _get_component_from_path

    try:
        return _get_component_from_path(path)
    except (InstantiationError, ValueError, ImportError) as error:
        raise UserError(f"{key}: unknown component {path!r}: {_root_cause(error)}") from error


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())


def _hints(component: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(component.__init__ if inspect.isclass(component) else component)
    except Exception:  # annotations of others may not resolve; then only names are checked
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain YAML value fits an annotation; annotations that are not plain fit anything."""
    if value is None or hint is type(None):
        return hint is type(None) or type(None) in typing.get_args(hint) or not _plain(hint)
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, arm) for arm in typing.get_args(hint))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    return True


def _plain(hint: Any) -> bool:
    return hint in (int, float, str, bool)


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    return getattr(hint, "__name__", str(hint).replace("typing.", ""))
