"""A `_component_` node: checked without building it, then built: whatever is importable, the user's own file included."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from components.files import Unreachable, in_one_line
from components.namesakes import hidden
from mdm.config.errors import UserError
from mdm.config.names import NAMES, close, full_path


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
    hints = hints_of(component)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in node.items():
        if name == "_component_":
            continue
        if name not in parameters and not open_ended:
            raise UserError(
                f"unknown key '{key}.{name}'{close(name, list(parameters))}; {node['_component_']} has {', '.join(parameters)}"
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
    except (ValueError, FileNotFoundError, Unreachable) as error:
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

    if not isinstance(path, str):
        raise UserError(f"{key}: _component_ must be a name, got {path!r}")
    try:
        return _get_component_from_path(_said_if_moved(path))
    except (InstantiationError, ValueError, ImportError, SyntaxError) as error:
        theirs = hidden(path.partition(".")[0], os.getcwd())
        why = "; ".join(filter(None, [_root_cause(error, path), theirs]))
        raise UserError(f"{key}: unknown component {path!r}{close(path, NAMES)}: {why}") from error


@functools.cache
def _said_if_moved(path: str) -> str:
    """The full path of a name; of one of ours that has moved, it is said once where it is now."""
    now = full_path(path)
    if now != path and path not in NAMES and os.environ.get("RANK", "0") == "0":
        print(f"mdm: {path} has moved; it is {now} now", file=sys.stderr)
    return now


def looked_for(module: str) -> str:
    """Where a module of the user's own may lie."""
    return f"{module}.py is looked for beside the config, in this folder ({os.getcwd()}), and in PYTHONPATH=FOLDER"


def _root_cause(error: BaseException, path: str) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    own = path.partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        if error.name == own:
            return f"No module named {own!r}; {looked_for(own)}"
        if error.name.partition(".")[0] != own:
            return f"{own} imports {error.name}, which is not installed"
    said = in_one_line(error)
    if absent := re.match(r"No module named '([\w.]+)\.(\w+)'; '.*' is not a package$", said):
        return f"{absent[1]} has no {absent[2]}"  # Python took the name for a module's
    return said


def hints_of(component: Any) -> dict[str, Any]:
    """The annotations of what a component is called with; none where they cannot be resolved."""
    try:
        if dataclasses.is_dataclass(component):  # whose fields may be of a base in another module
            return typing.get_type_hints(component)
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
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join("null" if arm is type(None) else _spell(arm) for arm in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint).replace("typing.", ""))
