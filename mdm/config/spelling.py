"""What a user writes in short, by what a setting is annotated with.

sampler: Confidence      {_component_: Confidence}, where a setting or a component's argument takes one (names.py)
tokens: 5M               5000000, where it is a whole number: 5_000_000 and 5e6 as well; k, M, B (or G) and T are powers of 1000
"""

from __future__ import annotations

import dataclasses
import decimal
import enum
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from mdm.config.component import hints_of, locate
from mdm.config.errors import UserError
from mdm.config.names import NAMES, SAMPLERS, close

SUFFIXES = {"k": 3, "K": 3, "M": 6, "B": 9, "G": 9, "T": 12}
_NUMBER = re.compile(r"([+-]?[\d_]*\.?[\d_]*(?:[eE][+-]?\d+)?)\s*([kKMBGT]?)")
_PLAIN = {*sys.stdlib_module_names, "torch", "numpy"}
"""Packages of classes that a word may stand for as it is: a path, a dtype."""


def spelled(value: Any, hint: Any, key: str = "", argument: bool = False, stood: Any = None) -> Any:
    """A value with all that is written in short in full.

    hint:  what it is annotated with: a setting of a recipe, or an `argument` of a component
    stood: what it is laid upon, which may name the component that its keys are arguments of

    Raises UserError for a name that is none, or a number that is not whole.
    """
    if isinstance(value, Mapping):
        under = stood if isinstance(stood, Mapping) and "_component_" not in value else {}
        below = {k: (v, *_of_key(hint, under or value, k, argument)) for k, v in value.items()}
        return {k: spelled(v, of, f"{key}.{k}" if key else str(k), own, under.get(k)) for k, (v, of, own) in below.items()}
    if isinstance(value, list):
        of = next((typing.get_args(arm)[0] for arm in _arms(hint) if _is_sequence(arm)), Any)
        return [spelled(v, of, f"{key}[{i}]", argument) for i, v in enumerate(value)]
    if isinstance(value, str) and (value == "???" or "${" in value):  # no value yet
        return value
    if isinstance(value, str) and is_name(value) and takes_component(hint, argument):
        return {"_component_": component_name(key, value)}
    if value is not None and not argument and any(map(_is_settings, _arms(hint))) and not dataclasses.is_dataclass(value):
        raise UserError(f"{key}: keys and values stand there (as {key}.KEY=VALUE), got {value!r}")
    if isinstance(value, (str, float)) and _arms(hint) & {int, float, str, Any} == {int}:
        return whole(value, key)
    return value


def whole(value: Any, key: str) -> int:
    """A whole number, however it is written. Raises UserError, naming the key."""
    written = _NUMBER.fullmatch(str(value).strip())
    try:
        exact = decimal.Decimal(written[1].replace("_", "")).scaleb(SUFFIXES.get(written[2], 0)) if written else None
    except decimal.InvalidOperation:
        exact = None
    if exact is None or abs(exact) >= 2**63 or exact != exact.to_integral_value():
        raise UserError(f"{key}: {value!r} is no whole number; write it as 5000000, 5_000_000, 5e6 or 5M")
    return int(exact)


def is_name(word: str) -> bool:
    """Whether a word could be a component's name, as no table, list, number or null is."""
    return all(part.isidentifier() for part in word.split(".")) and word not in ("null", "true", "false")


def component_name(key: str, word: str) -> str:
    """A short name of ours, or a dotted path. Raises UserError for a word that is neither."""
    if word not in NAMES and "." not in word:
        known = SAMPLERS if key.rpartition(".")[2] == "sampler" else NAMES
        raise UserError(f"{key}: {word!r} is not one of {', '.join(known)}{close(word, known)}, nor a dotted path")
    return word


def typed(built: Any) -> list[str]:
    """The words that stand for a component: its name, and as key=value what differs from its defaults. `spelled` reads them."""
    short = type(built).__name__
    known = short in NAMES and locate(NAMES[short], short) is type(built)
    words = [short if known else f"{type(built).__module__}.{type(built).__qualname__}"]
    for f in dataclasses.fields(built) if dataclasses.is_dataclass(built) else ():
        value = getattr(built, f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if value == default:
            continue
        if dataclasses.is_dataclass(value):
            name, *inner = typed(value)
            words += [f"{f.name}={name}", *(f"{f.name}.{word}" for word in inner)]
        else:
            words.append(f"{f.name}={'null' if value is None else str(value).lower() if isinstance(value, bool) else value}")
    return words


def takes_component(hint: Any, argument: bool = False) -> bool:
    """Whether a word can only be a component's name: a table of anything stands there, or, as an argument, an object."""
    arms = _arms(hint)
    return not arms & {str, Any} and any(_is_node(arm) or (argument and _is_class(arm)) for arm in arms)


def takes_keys(hint: Any) -> bool:
    """Whether nothing but keys and values can stand there."""
    return all(arm is type(None) or _is_settings(arm) or typing.get_origin(arm) in (dict, Mapping) for arm in _arms(hint))


def hint_at(schema: Any, config: DictConfig, key: str) -> tuple[Any, bool]:
    """What a dotted key is annotated with, in the schema or by the component whose argument it is; and whether it is one."""
    hint, argument = schema, False
    node: Any = config
    for name in key.split("."):
        hint, argument = _of_key(hint, node, name, argument)
        known = isinstance(node, DictConfig) and not node._is_none() and name in list(node.keys())
        node = node._get_node(name) if known else None
    return hint, argument


def _of_key(hint: Any, node: Any, name: Any, argument: bool) -> tuple[Any, bool]:
    """The annotation of what stands below a node at a name, Any where it is not known; and whether that is an argument."""
    named = node.get("_component_") if isinstance(node, (Mapping, DictConfig)) and not _is_null(node) else None
    if isinstance(named, str):
        try:
            return hints_of(locate(named, "")).get(name, Any), True
        except UserError:  # said where the component is checked, with its key
            return Any, True
    for arm in _arms(hint):
        if dataclasses.is_dataclass(arm):
            return hints_of(arm).get(name, Any), argument
        if typing.get_origin(arm) in (dict, Mapping):
            return typing.get_args(arm)[1], argument
    return Any, argument


def _is_null(node: Any) -> bool:
    return isinstance(node, DictConfig) and node._is_none()


def _arms(hint: Any) -> set[Any]:
    """What a union is made of, or the one that it is."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return {found for arm in typing.get_args(hint) for found in _arms(arm)}
    return {hint}


def _is_sequence(arm: Any) -> bool:
    return typing.get_origin(arm) in (list, tuple, Sequence)


def _is_node(arm: Any) -> bool:
    return typing.get_origin(arm) in (dict, Mapping) and typing.get_args(arm)[1] is Any


def _is_settings(arm: Any) -> bool:
    return isinstance(arm, type) and dataclasses.is_dataclass(arm)


def _is_class(arm: Any) -> bool:
    if not isinstance(arm, type) or issubclass(arm, (str, enum.Enum)):
        return False
    return arm.__module__.partition(".")[0] not in _PLAIN
