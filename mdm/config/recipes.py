"""Recipes: found by name, listed with their configs, and copied.

    mdm cp RECIPE PATH.py      the recipe, and its config as PATH.yaml
    mdm cp NAME PATH.yaml      the config alone
    mdm cp NAME FOLDER         either under its own name

Modules beside a config that it names come along.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
from pathlib import Path

from mdm.config.errors import UserError
from mdm.config.files import find_config, layers, names_modules, recipe_root
from mdm.config.names import close, close_file

YAML = (".yaml", ".yml")
LONGEST = 200  # bytes of a name: a file system takes 255, and what is written beside it needs some


def find_recipe(name: str) -> Path:
    """A recipe's file, from its name or a path."""
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"recipe file not found: {name}{close_file(path)}")
        return path
    path = recipe_root() / f"{name}.py"
    if not path.is_file():
        names = recipe_names()
        if is_config(name):
            recipe = recipe_of(recipe_root() / "configs" / f"{name}.yaml")
            raise UserError(f"{name!r} is a config; run it with: mdm run {recipe} --config {name}")
        known = [*names, *(p.stem for p in (recipe_root() / "configs").glob("*.yaml"))]
        raise UserError(f"recipe {name!r} is not one of {', '.join(names)}, nor the path of a .py file{close(name, known)}")
    return path


def is_config(name: str) -> bool:
    """Whether a name is that of a config, and of no recipe."""
    return not (recipe_root() / f"{name}.py").is_file() and (recipe_root() / "configs" / f"{name}.yaml").is_file()


def recipe_names() -> list[str]:
    return sorted(p.stem for p in recipe_root().glob("*.py"))


def recipe_of(config: Path) -> str:
    """The recipe that a config is for: its header shows the command; one without is called like its recipe."""
    shown = re.search(rf"mdm run (\w+) --config {config.stem}\b", config.read_text())
    return shown.group(1) if shown else config.stem


def about(recipe: Path) -> tuple[str, str | None]:
    """What a recipe says of itself, and its CONFIG: read from the file, which is not run. None: a script that has no config."""
    try:
        tree = ast.parse(recipe.read_text())
    except SyntaxError as error:
        raise UserError(f"{recipe}, line {error.lineno}: {error.msg}") from error
    config = None
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="CONFIG")], value=ast.Constant(value=str(name))):
                config = name
    return ast.get_docstring(tree) or "", config


def called(recipe: Path) -> str:
    """A recipe as `mdm run` takes it: one of ours by its name, a user's own by its path."""
    return recipe.stem if recipe.resolve().parent == recipe_root().resolve() else str(recipe)


def config_of(recipe: Path, config: str) -> str:
    """The config of a recipe where none is named: of a copy, the one beside it; else the library's."""
    beside = recipe.with_suffix(".yaml")
    return str(beside) if called(recipe) != recipe.stem and beside.is_file() else config


def copy(name: str, path: str, force: bool = False) -> list[str]:
    """Copies, and returns what to say of it. Raises UserError where there is no such recipe, or a file cannot be written."""
    alone = Path(path).suffix in YAML and not Path(path).is_dir()
    recipe = None if alone or is_config(name) else find_recipe(name)
    target = _target(path, Path(name).stem, ".py" if recipe is not None else ".yaml")
    copies, config = _copies(name, recipe, target)
    for act in (_check, _write):  # all is copied, or nothing is
        for source, to in copies:
            try:
                act(source, to, force)
            except OSError as error:
                raise UserError(f"{to} cannot be written ({error.strerror or error}); choose another path") from error
    said = [f"{source.name} -> {to}" for source, to in copies]
    of = str(target) if recipe is not None else recipe_of(find_config(name))
    if recipe is not None or of in recipe_names():
        with_config = ["--config", str(target.with_suffix(".yaml") if recipe is not None else target)] if config else []
        said.append(f"Run it with: {shlex.join(['mdm', 'run', of, *with_config])}")
    return said


def _target(path: str, name: str, suffix: str) -> Path:
    """The file that PATH means. Raises UserError where it can mean none."""
    target = Path(path)
    if len(os.fsencode(target.name)) > LONGEST:
        raise UserError(f"PATH {path[:60]!r} is no file's name; write my.py, my.yaml or a folder")
    if path and (target.is_dir() or path.endswith(("/", os.sep))):
        target = target / f"{name}{suffix}"
    elif not target.suffix:
        target = target.with_name(f"{target.name}{suffix}") if target.name else target
    elif target.suffix not in (suffix, *(YAML if suffix == ".yaml" else ())):
        raise UserError(f"PATH {path!r} ends neither in .py nor in .yaml, and is no folder; write {target.stem}{suffix}")
    if not target.name:
        raise UserError(f"PATH {path!r} is no file's name; write my.py, my.yaml or a folder")
    return target


def _copies(name: str, recipe: Path | None, target: Path) -> tuple[list[tuple[Path, Path]], str | None]:
    """What is copied where, and the config, if there is one."""
    if recipe is None:
        copies, config, beside = [], name, target
    else:
        config, beside = about(recipe)[1], target.with_suffix(".yaml")
        copies, config = [(recipe, target)], config and config_of(recipe, config)
    if config is not None:
        source = find_config(config)
        copies.append((source, beside))
        beside = [(module, target.with_name(module.name)) for module in names_modules(source, layers(source)[source])]
        copies += [pair for pair in beside if not _is_there(*pair)]
    return copies, config


def _is_there(source: Path, to: Path) -> bool:
    """Whether a module has been copied before, with another config."""
    return to.is_file() and to.read_bytes() == source.read_bytes()


def _check(source: Path, to: Path, force: bool) -> None:
    """Raises UserError, or PermissionError, where a file may not be written."""
    if to.exists() and not force:
        raise UserError(f"{to} exists; choose another path, or --force to replace it")
    above = next(parent for parent in to.parents if parent.exists())
    if not above.is_dir():
        raise UserError(f"{to} cannot be written ({above} is a file, no folder); choose another path")
    if not os.access(to if to.exists() else above, os.W_OK):
        raise PermissionError(13, os.strerror(13))


def _write(source: Path, to: Path, force: bool) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, to)
