"""The `mdm` command: it finds recipes, lists, copies, checks and starts them, and says a mistake in one line."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from mdm.config import UserError, find_config, load, recipe_root
from mdm.config.trust import trust_run
from mdm.recipe import exit_on_user_error, find_recipe, leave, load_recipe, recipe_names


def _ls(arguments: argparse.Namespace) -> None:
    print(f"{'RECIPE':<18}WHAT IT DOES, AND ITS CONFIGS")
    configs = sorted((recipe_root() / "configs").glob("*.yaml"))
    for name in recipe_names():
        own = [c.stem for c in configs if _recipe_of(c) == name]
        first = (find_recipe(name).read_text().split('"""')[1].strip().splitlines() or [""])[0]
        print(f"{name:<18}{first}\n{'':<18}  {', '.join(own)}")


def _recipe_of(config: Path) -> str:
    """The recipe that a config is for: its header shows the command; one without is called like its recipe."""
    shown = re.search(rf"mdm run (\w+) --config {config.stem}\b", config.read_text())
    return shown.group(1) if shown else config.stem


def _cp(arguments: argparse.Namespace) -> None:
    target = Path(arguments.path)
    copies = []
    if target.suffix in (".yaml", ".yml"):
        copies.append((find_config(arguments.recipe), target))
    else:
        target = target.with_suffix(".py")
        copies.append((find_recipe(arguments.recipe), target))
        config = recipe_root() / "configs" / f"{find_recipe(arguments.recipe).stem}.yaml"
        if config.is_file():
            copies.append((config, target.with_suffix(".yaml")))
    for _, to in copies:
        if to.exists() and not arguments.force:
            raise UserError(f"{to} exists; choose another path, or --force to replace it")
    for source, to in copies:
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, to)
        except OSError as error:
            raise UserError(f"{to} cannot be written ({error.strerror or error}); choose another path") from error
        print(f"{source.name} -> {to}")
    if len(copies) == 2:
        print(f"Run it with: mdm run {copies[0][1]} --config {copies[1][1]}")


def _run(arguments: argparse.Namespace) -> None:
    recipe = find_recipe(arguments.recipe)
    words = list(arguments.arguments)
    if "--config" not in words and not any(w.startswith("--config=") for w in words) and recipe.parent != recipe_root():
        beside = recipe.with_suffix(".yaml")
        if beside.is_file():
            words = ["--config", str(beside), *words]
    sys.path.insert(0, os.getcwd())  # a config may name components in the user's own folder
    if arguments.launcher:
        _validate_arguments(recipe, words)  # said once, here, rather than by every process
        from torch.distributed.run import main as torchrun

        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
        standalone = [] if any("rdzv" in w for w in arguments.launcher) else ["--standalone"]
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        try:
            torchrun([*standalone, *arguments.launcher, str(recipe), *words])
        except SignalException as error:  # it was passed on to every process
            leave(128 + error.sigval)
        except ChildFailedError as error:
            code = error.get_first_failure()[1].exitcode
            if code not in (2, 128 + signal.SIGINT, 128 + signal.SIGTERM):
                raise
            leave(code)  # the process has said why
        return
    sys.argv = [str(recipe), *words]
    runpy.run_path(str(recipe), run_name="__main__")


def _validate_arguments(recipe: Path, words: Sequence[str]) -> tuple[ModuleType, Any]:
    """The recipe, and its settings, whose keys are right."""
    module = load_recipe(str(recipe))
    parser = argparse.ArgumentParser(prog=f"mdm validate {recipe.stem}")
    parser.add_argument("--config", default=module.CONFIG)
    parser.add_argument("overrides", nargs="*")
    parsed = parser.parse_intermixed_args(words)
    filled = load(module.Settings, find_config(parsed.config), parsed.overrides)
    trust_run(asdict(filled), getattr(filled, "trust", False))
    module.validate(filled)
    return module, filled


def _validate(arguments: argparse.Namespace) -> None:
    """All keys, and then a trial of what they name (mdm/training/trial.py): the recipe's own `trial`, where it has one."""
    from mdm.training.trial import attempt

    sys.path.insert(0, os.getcwd())
    module, filled = _validate_arguments(find_recipe(arguments.recipe), arguments.arguments)
    for line in getattr(module, "trial", attempt)(filled).lines():
        print(line)
    print("The config is valid.")


def _study(words: Sequence[str]) -> None:
    from mdm.studies.page import write_page

    if len(words) != 1 or words[0].startswith("-"):
        raise UserError("mdm study takes one folder, the output_dir of mdm run study (which runs one: mdm run study --help)")
    print(f"Page: {write_page(Path(words[0])).resolve()}")


USAGE = """\
mdm ls                                             the recipes and their configs
mdm cp RECIPE PATH                                 copy a recipe (PATH.py, with its config) or a config (PATH.yaml)
mdm run [TORCHRUN FLAGS] RECIPE [--config CONFIG] [key=value ...]
                                                   run a recipe by name or path; torchrun's flags start several processes
mdm generate checkpoint=DIR [key=value ...]        short for `mdm run generate ...`; --film writes a GIF of the unmasking
mdm demo checkpoint=DIR [key=value ...]            short for `mdm run demo ...`: a page to generate and edit on
mdm plan --config CONFIG --gpu h100:8              what a training run needs, and how fast it will be
mdm study FOLDER                                   a page of a study's runs, curves and samples (mdm run study makes one)
mdm validate RECIPE [--config CONFIG] [key=value ...]
                                                   check a config without running it
mdm run RECIPE --help                              what a recipe does

examples:
  mdm run quickstart
  mdm generate checkpoint=runs/quickstart task=text_to_image prompt="a handwritten seven"
  mdm cp pretrain my.py && mdm run my.py --config my.yaml model.num_layers=2
  mdm run --nproc_per_node 2 pretrain batch.physical=224
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mdm", usage=USAGE, description="Masked diffusion on text, images and speech.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    ls = commands.add_parser("ls", help="list recipes and configs")
    ls.set_defaults(work=_ls)
    cp = commands.add_parser("cp", help="copy a recipe or a config")
    cp.add_argument("recipe", help="name of the recipe (or, for PATH.yaml, of the config)")
    cp.add_argument("path", help="where to: .py copies the recipe with its config, .yaml the config alone")
    cp.add_argument("--force", action="store_true", help="replace existing files")
    cp.set_defaults(work=_cp)
    validate = commands.add_parser("validate", help="check a config without running it")
    validate.add_argument("recipe")
    validate.add_argument("arguments", nargs=argparse.REMAINDER, metavar="[--config CONFIG] [key=value ...]")
    validate.set_defaults(work=_validate)
    return top


def split_launcher(words: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """torchrun's flags (everything before the recipe), the recipe, and the recipe's own arguments."""
    flags: list[str] = []
    rest = list(words)
    while rest and rest[0].startswith("-"):
        flag = rest.pop(0)
        flags.append(flag)
        if "=" not in flag and flag not in ("--standalone",) and rest:
            flags.append(rest.pop(0))
    if not rest:
        raise UserError(f"mdm run needs a recipe: one of {', '.join(recipe_names())}, or the path of a .py file")
    return flags, rest[0], rest[1:]


def main() -> None:
    """Entry point of `mdm`."""
    words = sys.argv[1:]

    def work() -> None:
        if words[:1] == ["run"] and words[1:2] not in (["-h"], ["--help"]):
            launcher, recipe, arguments = split_launcher(words[1:])
            _run(argparse.Namespace(launcher=launcher, recipe=recipe, arguments=arguments))
        elif words[:1] in (["generate"], ["demo"], ["plan"]):
            rest = ["film=true" if w == "--film" else w for w in words[1:]]
            if "--gpu" in rest[:-1]:
                at = rest.index("--gpu")
                rest[at : at + 2] = [f"gpu={rest[at + 1]}"]
            _run(argparse.Namespace(launcher=[], recipe=words[0], arguments=rest))
        elif words[:1] == ["study"]:
            _study(words[1:])
        elif not words or words[:1] == ["run"]:
            parser().print_help()
        elif words[0] not in ("ls", "cp", "validate", "-h", "--help"):
            raise UserError(
                f"command {words[0]!r} is not one of ls, cp, run, generate, demo, plan, study, validate "
                "(mdm --help explains them)"
            )
        else:
            arguments = parser().parse_args(words)
            arguments.work(arguments)

    exit_on_user_error(work)


if __name__ == "__main__":
    main()
