"""Configs are torchtune's: YAML with `_component_: dotted.path`, `${interpolation}` and `key=value` overrides.

A recipe declares its settings as a dataclass. Everything a user can get wrong is found here, before any data loads, and said
in one sentence: the key, its value, what it may be. A `_component_` of the library goes by its short name too (names.py):
`sampler=Confidence`. Keys that hold text take the words as they are typed.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import AnyNode, DictConfig, OmegaConf, StringNode
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

from components.files import in_one_line
from mdm.config.component import hints_of, locate
from mdm.config.errors import UserError
from mdm.config.files import is_ours, laid, layers, names_modules
from mdm.config.names import NAMES, close
from mdm.config.spelling import component_name, hint_at, is_name, spelled, takes_component, takes_keys

T = TypeVar("T")


WORDS = {"words": True}
"""Metadata of a setting that holds what a user says: words, or words by name (`prompt.text=007`); null where it is absent."""


_beside_configs: set[str] = set()


def found_beside(built: Any) -> Path | None:
    """The folder of a config, where an object's class comes from there: another command does not look in it."""
    module = sys.modules.get(type(built).__module__.partition(".")[0])
    file = getattr(module, "__file__", None)
    folder = None if file is None else Path(file).resolve().parent
    return folder if str(folder) in _beside_configs and folder != Path.cwd().resolve() else None


def load(schema: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """The settings of a recipe: `schema` (a dataclass) filled from a YAML file and `key=value` overrides.

    Raises UserError for a missing file, an unknown key, a value of the wrong type, a key without a value.
    """
    path = Path(path)
    files = layers(path)
    for file, own in files.items():
        folder = str(file.parent.resolve())
        if folder not in sys.path and (not is_ours(file) or names_modules(file, own)):
            sys.path.append(folder)
            _beside_configs.add(folder)
    written = laid({file: OmegaConf.create(spelled(_plain(own), schema)) for file, own in files.items()})
    from_file = OmegaConf.create(spelled(_plain(written), schema))  # again: one may name the component, another its arguments
    spoken = [f.name for f in dataclasses.fields(typing.cast(Any, schema)) if f.metadata.get("words")]
    said = {key: _said(key, from_file.pop(key, None), path) for key in spoken}
    try:
        merged = _override(schema, _merged(OmegaConf.structured(schema), from_file), overrides, said)
        filled = typing.cast(T, OmegaConf.to_object(merged))
        for key, value in said.items():
            setattr(filled, key, value)
        refuse_nan(filled)
        return filled
    except ConfigKeyError as error:
        raise UserError(_unknown_key(schema, error)) from error
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key}: no value, neither in {path} nor as {error.full_key}=VALUE") from error
    except ValidationError as error:
        said = str(error).splitlines()[0]
        null = "is not Optional" in said or "value 'None'" in said
        why = "null is no value of it (and takes out only what the config builds on)" if null else said
        why = (
            f"keys and values stand there (as {error.full_key}.KEY=VALUE)"
            if "Cannot assign" in said or "a subclass" in said
            else why
        )
        raise UserError(f"{error.full_key}: {why}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error


def _said(key: str, value: Any, path: Path) -> str | dict[str, str] | None:
    """Words as a file has them. Raises UserError for what YAML has read as something else."""
    plain: Any = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    parts = plain.items() if isinstance(plain, dict) else [(None, plain)]
    for name, part in parts:
        if not isinstance(part, str) and (name is not None or part is not None):
            where = key if name is None else f"{key}.{name}"
            raise UserError(f"{where}: {path} says {part!r}, and it is words; write them in quotes")
    return plain


def _say(said: dict[str, Any], key: str, value: str) -> bool:
    """Puts the words of an argument where they belong; False where its key does not hold words."""
    top, _, part = key.partition(".")
    if top not in said:
        return False
    if part:
        said[top] = {**(said[top] if isinstance(said[top], dict) else {}), part: value}
    else:
        said[top] = value
    return True


def _override(schema: type, config: DictConfig, arguments: Sequence[str], said: dict[str, Any]) -> DictConfig:
    """The config with `key=value` arguments merged in.

    A whole `_component_` node, its short name, or {}, replaces what stood there, deeper ones too; null takes an entry out of a
    table, and empties a table. A value of a key that holds text is that text, and not YAML: 007, no, 12:30.

    said: the settings that are words, filled in place
    """
    for argument in _in_order(arguments, said):
        key, sign, typed = argument.partition("=")
        if not sign or not key or key.startswith("-"):
            arrow = ', and an arrow in quotes ("text->image")' if argument == "-" else ""  # what a shell leaves of a bare ->
            raise UserError(f"{argument!r} is not an override; write key=value{arrow}")
        if _say(said, key, typed):
            continue
        if "${" in typed:  # an interpolation, resolved when all is merged
            config = _merged(config, OmegaConf.from_dotlist([argument]))
            continue
        _opened(config, key)
        (hint, of_component), stood = hint_at(schema, config, key), _node_at(config, key)
        if is_name(typed) and not key.endswith("._component_") and _names_component(hint, of_component, stood, typed):
            one = OmegaConf.create({})
            OmegaConf.update(one, key, {"_component_": component_name(key, typed)})
        elif _holds_text(config, key, stood) and not (typed == "null" and _may_be_null(stood)):
            one = OmegaConf.create({})
            OmegaConf.update(one, key, typed)
        else:
            one = _parsed(argument)
            full = spelled(_plain(OmegaConf.select(one, key)), hint, key, of_component, _plain(stood))
            OmegaConf.update(one, key, full, merge=False)
        value = OmegaConf.select(one, key)
        if OmegaConf.is_dict(OmegaConf.select(config, key)):
            if value is None and _take_out(config, key):
                continue
            empty = value in (None, "", {})
            if not (isinstance(value, DictConfig) or empty) and (takes_component(hint, of_component) or takes_keys(hint)):
                raise UserError(f"{key}: keys and values stand there (as {key}.KEY=VALUE), got {typed!r}")
            if empty or not isinstance(value, DictConfig) or "_component_" in value:
                OmegaConf.update(config, key, {}, merge=False)
            if empty:
                continue
            _make_way(config, key, value)
        config = _merged(config, one)
    return config


def _parsed(argument: str) -> DictConfig:
    """A `key=value` whose value is YAML. Raises UserError where it is none."""
    try:
        return OmegaConf.from_dotlist([argument])
    except yaml.YAMLError as error:
        key, _, typed = argument.partition("=")
        raise UserError(f"{key}: {typed!r} is not valid YAML: {in_one_line(error)}") from error


def _make_way(config: DictConfig, key: str, value: Any) -> None:
    """Empties what stands where a value has a node of another `_component_`, however deep: the arguments were the other's."""
    stood = _node_at(config, key)
    if not (OmegaConf.is_dict(value) and isinstance(stood, DictConfig)) or stood._is_none():
        return
    if "_component_" in stood and value.get("_component_", stood["_component_"]) != stood["_component_"]:
        OmegaConf.update(config, key, {}, merge=False)
        return
    for name in value:
        _make_way(config, f"{key}.{name}", value._get_node(name))


def _plain(value: Any) -> Any:
    """A value out of a config, without omegaconf's own containers; what is interpolated stays as it is written."""
    return OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else value


def _merged(below: Any, above: DictConfig) -> DictConfig:
    """Of keys and values keys and values are made."""
    return typing.cast(DictConfig, OmegaConf.merge(below, above))


def _node_at(config: DictConfig, key: str) -> Any:
    """The node that stands at a key; None where there is none."""
    above, _, name = key.rpartition(".")
    try:
        parent = OmegaConf.select(config, above) if above else config
    except OmegaConfBaseException:
        return None
    return parent._get_node(name) if isinstance(parent, DictConfig) and name in list(parent.keys()) else None


def _names_component(hint: Any, argument: bool, node: Any, word: str) -> bool:
    """Whether a word is a component's name: by what its setting is annotated with, by what stands there, or, where neither
    tells, because it is the name of a class of ours."""
    stands = isinstance(node, DictConfig) and not node._is_none() and "_component_" in node
    return takes_component(hint, argument) or stands or (hint is Any and word in NAMES and word[0].isupper())


def _in_order(arguments: Sequence[str], said: Mapping[str, Any]) -> list[str]:
    """The arguments, but a component's name before those that are inside it, wherever it was written."""
    ordered: list[str] = []
    for argument in arguments:
        key, _, typed = argument.partition("=")
        inside = [i for i, other in enumerate(ordered) if other.startswith(f"{key}.")]
        named = bool(inside) and is_name(typed) and key.partition(".")[0] not in said
        ordered.insert(inside[0] if named else len(ordered), argument)
    return ordered


def _opened(config: DictConfig, key: str) -> None:
    """Of a word that an argument is given for, which is a component's name then, its node is made in place."""
    above = key.rpartition(".")[0]
    while above:
        node = _node_at(config, above)
        word = node._value() if isinstance(node, AnyNode) else None
        if isinstance(word, str) and is_name(word):
            OmegaConf.update(config, above, {"_component_": component_name(above, word)}, merge=False)
        above = above.rpartition(".")[0]


def _holds_text(config: DictConfig, key: str, node: Any) -> bool:
    """Whether a setting is declared as text, or is an argument that a component declares so."""
    if isinstance(node, StringNode) and not isinstance(node, AnyNode):
        return True
    above, _, name = key.rpartition(".")
    parent = _node_at(config, above) if above else None
    if not isinstance(parent, DictConfig) or parent._is_none() or not isinstance(parent.get("_component_"), str):
        return False
    try:
        hint = hints_of(locate(parent["_component_"], above)).get(name)
    except UserError:  # said when the whole config is checked
        return False
    return hint is str or set(typing.get_args(hint)) == {str, type(None)}


def _may_be_null(node: Any) -> bool:
    return node is None or node._is_optional()


def _take_out(config: DictConfig, key: str) -> bool:
    """Sets a key to null where it may be, or removes it from its table; False where it is neither."""
    above, _, name = key.rpartition(".")
    parent: Any = OmegaConf.select(config, above) if above else config
    if parent._get_node(name)._metadata.optional:
        parent[name] = None
    elif not dataclasses.is_dataclass(parent._metadata.object_type):
        del parent[name]
    else:
        return False
    return True


def _unknown_key(schema: type, error: ConfigKeyError) -> str:
    parent, _, key = str(error.full_key).rpartition(".")
    at = schema
    for name in filter(None, parent.split(".")):
        at = typing.get_type_hints(at)[name]
        at = next((part for part in typing.get_args(at) if dataclasses.is_dataclass(part)), at)  # of a table that may be null
    known = list(typing.get_type_hints(at))
    return f"unknown key {error.full_key!r}{close(key, known)}; {parent or 'the recipe'} has {', '.join(known)}"


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
