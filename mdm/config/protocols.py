"""Whether what a config names has the members of its part, said by name before anything runs: masker: mine.Bad lacks pairs."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from mdm.config import UserError, hints_of, instantiate, locate


def members(protocol: type) -> list[str]:
    """The public attributes and methods that a Protocol asks for, and its call."""
    every: dict[str, None] = {}
    for part in reversed(protocol.__mro__):
        if getattr(part, "_is_protocol", False):
            every |= dict.fromkeys((*getattr(part, "__annotations__", {}), *vars(part)))
    return [name for name in every if name == "__call__" or not name.startswith("_")]


def lacking(built: Any, names: list[str]) -> list[str]:
    """Those of the names that an object, or a class, does not have. A class has what it declares without a value too."""
    declared = (
        {name for part in built.__mro__ for name in vars(part).get("__annotations__", ())} if isinstance(built, type) else ()
    )
    return [name for name in names if not hasattr(built, name) and name not in declared]


def conforming(node: Mapping[str, Any], key: str, protocol: type, **supplied: Any) -> Any:
    """Builds a `_component_` node that has to follow a protocol, and the components inside it those of its annotations.

    Raises UserError, naming the component, for members that one lacks.
    """
    inside(node, key)
    built = instantiate(node, key, **supplied)
    require_members(built, node, key, members(protocol), f", which a {protocol.__name__} has")
    return built


def require_members(built: Any, node: Mapping[str, Any], key: str, names: list[str], why: str = "") -> None:
    """Raises UserError, naming the component of the node, for members that it lacks. why: the end of the sentence"""
    if lacks := lacking(built, names):
        raise UserError(f"{key}: {node['_component_']} lacks {', '.join(lacks)}{why}")


def inside(node: Mapping[str, Any], key: str) -> None:
    """Checks the components inside a node, alone or by name, whose arguments are annotated with a protocol."""
    hints = hints_of(locate(node["_component_"], key))
    for name, value in node.items():
        asked = [arm for arm in (hints.get(name), *_arms(hints.get(name))) if getattr(arm, "_is_protocol", False)]
        if not asked or not isinstance(value, Mapping):
            continue
        named = {f"{key}.{name}": value} if "_component_" in value else {f"{key}.{name}.{k}": v for k, v in value.items()}
        for where, inner in named.items():
            if isinstance(inner, Mapping) and "_component_" in inner:
                conforming(inner, where, typing.cast(type, asked[0]))


def _arms(hint: Any) -> list[Any]:
    """What a union or a mapping is made of."""
    return [found for arm in typing.get_args(hint) for found in (arm, *_arms(arm))]


def source_members(source: Any, endless: bool = False) -> list[str]:
    """What a source has to have: a length and its samples by place; or, one after the other, where it may be gone on with."""
    if hasattr(source, "__len__") or not hasattr(source, "__iter__"):
        return ["__len__", "__getitem__"]
    return ["state_dict", "load_state_dict"] if endless else []
