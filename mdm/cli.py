"""The `mdm` command: it finds recipes, lists, copies, checks and starts them, and says a mistake in one line."""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.namesakes import say
from mdm.config import UserError, carried, recipe_root
from mdm.config.names import close
from mdm.config.recipes import about, called, config_of, copy, find_recipe, recipe_names, recipe_of
from mdm.recipe import Parser, exit_on_user_error, explain, import_from_here, load_module, prepare, takes_config


def _ls(parser: Parser, words: Sequence[str]) -> None:
    parser.read(words)
    print(f"{'RECIPE':<18}WHAT IT DOES, AND ITS CONFIGS")
    configs = sorted((recipe_root() / "configs").glob("*.yaml"))
    for name in recipe_names():
        own = [c.stem for c in configs if recipe_of(c) == name]
        first = about(find_recipe(name))[0].partition("\n")[0]
        print(f"{name:<18}{first}\n{'':<18}  {', '.join(own)}")


def _cp(parser: Parser, words: Sequence[str]) -> None:
    arguments = parser.read(words)
    print(*copy(arguments.recipe, arguments.path, arguments.force), sep="\n")


def _run(parser: Parser, words: Sequence[str]) -> None:
    if not words:
        parser.print_help()
    elif words[0].startswith("-") and words[0] not in ("-h", "--help"):
        _launch(words)
    else:
        arguments = parser.read(words)
        _start(find_recipe(arguments.recipe), arguments.arguments)


def _start(recipe: Path, words: Sequence[str]) -> None:
    """Runs a recipe in this process."""
    if _explained(recipe, words):
        return
    say(os.getcwd())
    import_from_here(recipe)
    sys.argv = [str(recipe), *words]
    runpy.run_path(str(recipe), run_name="__main__")


def _explained(recipe: Path, words: Sequence[str], command: str = "run") -> bool:
    """Prints a recipe's help where that is asked for; without a CONFIG it is any script, which has its own."""
    if "-h" not in words and "--help" not in words:
        return False
    doc, config = about(recipe)
    if config is not None:
        parser = Parser(prog=f"mdm {command} {called(recipe)}", description=doc, add_help=False)
        takes_config(parser, config_of(recipe, config))
        explain(parser, parser.read(words).config)
    return config is not None


def _launch(words: Sequence[str]) -> None:
    """Runs a recipe in several processes: torchrun's own parser tells the flags from the recipe; a launcher starts them."""
    from mdm.hardware import supposing
    from mdm.launch import ray_train, torchrun

    launched, given = torchrun.read(words)
    if launched.training_script is None:
        raise UserError(f"mdm run needs a recipe: one of {', '.join(recipe_names())}, or the path of a .py file")
    if launched.module or launched.no_python or launched.run_path:
        raise UserError("mdm run takes a recipe or the path of a .py file; --module, --no_python and --run_path name none")
    workers = ray_train.asked_for(launched, given) if launched.ray is not None else None
    recipe, own = find_recipe(launched.training_script), launched.training_script_args
    if _explained(recipe, own):
        return
    import_from_here(recipe)
    if workers is None:
        with supposing(_processes(launched)):
            prepare(recipe, own)  # its mistakes are said once, here, rather than by every process
        torchrun.start(launched, recipe, own)
    else:
        say(os.getcwd())
        ray_train.start(workers, launched.max_restarts if "max_restarts" in given else ray_train.RESTARTS, recipe, own)


def _processes(launched: argparse.Namespace) -> int:
    """Processes that torchrun will start; 0 where that depends on the machines: a range of them, or one for each GPU."""
    least, _, most = str(launched.nnodes).partition(":")
    try:
        return int(least) * int(launched.nproc_per_node) if most in ("", least) else 0
    except ValueError:
        return 0


def _named_recipe(parser: Parser, words: Sequence[str]) -> None:
    """`mdm generate` and the other commands that are recipes, with options of their own."""
    recipe = find_recipe(parser.get_default("recipe"))
    parser.description, config = about(recipe)
    arguments = takes_config(parser, config or recipe.stem).read(words)
    if arguments.help:
        return explain(parser, arguments.config)
    _start(recipe, ["--config", arguments.config, *arguments.overrides, *(arguments.options or ())])


def _validate(parser: Parser, words: Sequence[str]) -> None:
    """All keys, and then a trial of what they name (mdm/training/trial.py): the recipe's own `trial`, where it has one."""
    arguments = parser.read(words)
    recipe = find_recipe(arguments.recipe)
    if _explained(recipe, arguments.arguments, "validate"):
        return
    from mdm.hardware import supposing
    from mdm.training.trial import try_out

    say(os.getcwd())
    import_from_here(recipe)
    look, words = _looked_for(arguments.arguments)
    with supposing(0):  # how many it will be run by is not said
        module, filled = prepare(recipe, words)
        found = getattr(module, "trial", try_out)(filled)
    for line in found.lines():
        print(line)
    if look is not None:
        from mdm.pages.look import write_look

        print(write_look(Path(look), found))
    print("The config is valid.")


def _looked_for(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The folder of --look, and what else was asked. Options of a recipe stand behind its name, and this is none of it."""
    own = Parser(prog="mdm validate", add_help=False, allow_abbrev=False)
    own.add_argument("--look")
    found, rest = own.parse_known_args(words)
    return found.look, rest


def _study(parser: Parser, words: Sequence[str]) -> None:
    from mdm.studies.page import write_page

    print(f"Page: {write_page(Path(parser.read(words).folder)).resolve()}")


def _bench(parser: Parser, words: Sequence[str]) -> None:
    """The benchmarks are a package of no name that others could have: in a checkout they are `benchmarks` too."""
    load_module("mdm_benchmarks", carried("benchmarks") / "__init__.py")
    importlib.import_module("mdm_benchmarks.__main__").main(words, parser.prog)


EXAMPLES = """\
mdm COMMAND --help explains a command, mdm run RECIPE --help a recipe, with every key of its config.

examples:
  mdm run quickstart
  mdm generate checkpoint=runs/quickstart task=text_to_image prompt="a handwritten seven" --film
  mdm chat checkpoint=hub:GSAI-ML/LLaDA-8B-Instruct
  mdm cp pretrain my.py && mdm run my.py --config my.yaml model.num_layers=2
  mdm run --nproc_per_node 2 pretrain batch.physical=224
"""

TORCHRUN = """\
Flags of torchrun, before the recipe, start several processes (torchrun --help explains all of them):
  mdm run --nproc_per_node 8 pretrain
  mdm run --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 pretrain
  mdm run --nnodes 1:8 --max-restarts 3 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 pretrain
Processes that die are started again up to --max-restarts times, on the machines that are left of at most 8 and at least 1;
SIGTERM and SIGUSR1 to this command reach every process, which may take --shutdown-timeout seconds (300) to save.

--ray starts them as the workers of a Ray cluster (RAY_ADDRESS, one that runs here, or else one of this machine):
  mdm run --ray 16 pretrain
  mdm run --ray 16 --max-restarts 10 pretrain

mdm run RECIPE --help explains a recipe, with every key of its config.
"""


def parser() -> tuple[Parser, dict[str, Parser]]:
    """The command's parser, and that of each command below it, with the function that does its `work`."""
    top = Parser(prog="mdm", description="Masked diffusion on text, images and speech.", epilog=EXAMPLES)
    below = top.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)

    def command(name: str, work: Any, help: str, more: str = "", **options: Any) -> Parser:
        made = below.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.{more}", **options)
        made.set_defaults(work=work)
        return made

    command("ls", _ls, "list the recipes and their configs")
    along = " Modules beside a config that it names come along."
    cp = command("cp", _cp, "copy a recipe with its config, or a config alone", along)
    cp.add_argument("recipe", metavar="RECIPE", help="name of a recipe or of a config (mdm ls)")
    takes = "PATH.py takes the recipe with its config, PATH.yaml the config alone, a folder either under its own name"
    cp.add_argument("path", metavar="PATH", help=takes)
    cp.add_argument("--force", action="store_true", help="replace existing files")

    own = "RECIPE [--config CONFIG] [key=value ...]"
    usage = f"mdm run [TORCHRUN FLAGS] {own}"
    run = command("run", _run, "run a recipe, in one process or in several", usage=usage, epilog=TORCHRUN)
    usage, trial = f"mdm validate {own}", "check a config: its keys, its tokenizers, a few of its samples; nothing is trained"
    more = " --look FOLDER writes those samples, and what their codes say of them."
    check = command("validate", _validate, trial, more, usage=f"{usage} [--look FOLDER]")
    for made in (run, check):
        made.add_argument("recipe", metavar="RECIPE", help="name of a recipe (mdm ls), or the path of a .py file")
        config = "name of a config or path of a YAML file; if absent, my.yaml beside my.py, else the recipe's own"
        made.add_argument("arguments", nargs=argparse.REMAINDER, metavar="--config CONFIG", help=config)

    def recipe(name: str, help: str) -> Parser:
        made = command(name, _named_recipe, help, add_help=False)
        made.set_defaults(recipe=name, options=None)
        return made

    generate = recipe("generate", "draw samples from a trained model, or edit (short for mdm run generate)")
    film = "write a GIF of the unmasking: film=true"
    generate.add_argument("--film", dest="options", action="append_const", const="film=true", help=film)
    recipe("chat", "talk with a text model in the terminal, and see it answer (short for mdm run chat)")
    recipe("demo", "open a page to generate and edit on (short for mdm run demo)")
    plan = recipe("plan", "count what a training run needs, and how fast it will be (short for mdm run plan)")
    card = "the card, and how many: gpu=h100:8"
    plan.add_argument("--gpu", dest="options", action="append", type="gpu={}".format, metavar="CARD:COUNT", help=card)

    study = command("study", _study, "write a page of a study's runs, curves and samples")
    what = "output_dir of a study (mdm run study --help explains how to run one), or its table alone: QUESTION.parquet"
    study.add_argument("folder", metavar="FOLDER", help=what)
    command("bench", _bench, "measure a part of the library", add_help=False)
    return top, below.choices


def main() -> None:
    """Entry point of `mdm`."""

    def work() -> None:
        words = sys.argv[1:]
        top, commands = parser()
        if not words:
            top.print_help()
        elif words[0].startswith("-"):
            top.read(words)
        elif words[0] not in commands:
            hint = close(words[0], commands)
            raise UserError(f"command {words[0]!r} is not one of {', '.join(commands)}{hint}; mdm --help explains them")
        else:
            asked = commands[words[0]]
            asked.get_default("work")(asked, words[1:])

    exit_on_user_error(work)


if __name__ == "__main__":
    main()
