"""A recipe is a script: found by name, loaded as a module, and run from its config with mistakes said in one line."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.util
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from components.data.bad import Refused
from mdm.config import UserError, find_config, layers, load, recipe_root
from mdm.config.names import close
from mdm.config.recipes import called, config_of, find_recipe
from mdm.config.trust import trust_run
from mdm.training.stopping import Stopped

AFTER_THE_FIRST = 3.0  # seconds; torchrun looks ten times a second


def load_recipe(name: str) -> ModuleType:
    """A recipe as a module: one recipe may run another as a step (`quickstart` does)."""
    path = find_recipe(name)
    return load_module(f"mdm_recipe_{path.stem}", path)


def load_module(name: str, path: Path) -> ModuleType:
    """A file as a module of that name, once; an `__init__.py` as a package."""
    if name not in sys.modules:
        folders = [str(path.parent)] if path.name == "__init__.py" else None
        spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folders)
        assert spec is not None
        assert spec.loader is not None  # a file of Python has both
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


class Parser(argparse.ArgumentParser):
    """argparse, whose refusals are UserErrors: one line, with the nearest of what there is."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **options: Any) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(*args, allow_abbrev=allow_abbrev, formatter_class=layout, **options)

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """The arguments, in any order, but for words that are another parser's. Raises UserError."""
        handed_on = any(action.nargs in (argparse.REMAINDER, argparse.PARSER) for action in self._actions)
        arguments, extra = (self.parse_known_args if handed_on else self.parse_known_intermixed_args)(words)
        if extra:
            setting = self._setting(extra[0], words)
            least = 0.8 if setting else 0.6  # what is likely to be a setting has to be nearer to be an option
            hint = close(extra[0].partition("=")[0], self._option_string_actions, least) or setting
            raise UserError(f"unknown argument {extra[0]!r}{hint}; {self.prog} --help lists what it takes")
        return arguments

    def _setting(self, word: str, words: Sequence[str]) -> str:
        """A hint where a setting is written as an option; of torchrun's flags too, which stand before the recipe."""
        takes = {action.dest for action in self._actions}
        if not word.startswith("--") or not takes & {"overrides", "training_script"}:
            return ""
        key, sign, value = word.lstrip("-").partition("=")
        after = [*words, ""][[*words].index(word) + 1]
        value = value if sign else "VALUE" if not after or after.startswith("-") or "=" in after else after
        where = "" if "overrides" in takes else ", behind the recipe"
        return f" (settings have no dashes: write {key.replace('-', '_')}={value}{where})"

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists what it takes")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        leave(status)


def takes_config(parser: Parser, config: str) -> Parser:
    """The arguments of every recipe; made without a help of argparse's own, since what `--help` shows depends on `--config`."""
    named = f"name of a config (mdm ls) or path of a YAML file; {config} if absent"
    parser.add_argument("--config", default=config, help=named)
    settings = "settings in place of the config's, whose keys are below"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=settings)
    parser.add_argument("-h", "--help", action="store_true", help="show this")
    return parser


def explain(parser: Parser, config: str) -> None:
    """Prints what a recipe takes: its arguments, and every key with its comment, as in the config and in what it builds on."""
    files = layers(find_config(config))
    heads = [f"{'keys of' if i == 0 else 'which builds on'} {file}:" for i, file in enumerate(files)]
    parser.epilog = "\n\n".join(f"{head}\n\n{file.read_text().strip()}" for head, file in zip(heads, files, strict=True))
    parser.print_help()


def run_recipe(
    settings: type,
    validate: Callable[[Any], None],
    main: Callable[[Any], None],
    config: str,
    again: str = "begins anew",
) -> None:
    """What stands at the end of every recipe: read the config, check all of it, then work.

    config: the config that is used where `--config` is absent, and none is beside a copied recipe
    again:  what the same command does after it was interrupted: nothing else is promised
    """
    recipe = Path(sys.argv[0])
    doc = sys.modules["__main__"].__doc__
    parser = takes_config(Parser(prog=f"mdm run {called(recipe)}", description=doc, add_help=False), config_of(recipe, config))

    def work() -> None:
        arguments = parser.read(sys.argv[1:])
        if arguments.help:
            return explain(parser, arguments.config)
        main(_filled(settings, validate, arguments))

    exit_on_user_error(work, again)
    leave(0)


def prepare(recipe: Path, words: Sequence[str]) -> tuple[ModuleType, Any]:
    """The recipe of a file, and its settings, whose keys are right. Raises UserError."""
    module = load_recipe(str(recipe))
    parser = Parser(prog=f"mdm validate {recipe.stem}", add_help=False)
    arguments = takes_config(parser, config_of(recipe, module.CONFIG)).read(words)
    return module, _filled(module.Settings, module.validate, arguments)


def _filled(settings: type, validate: Callable[[Any], None], arguments: argparse.Namespace) -> Any:
    """The settings that were asked for, looked at. Raises UserError."""
    filled = load(settings, find_config(arguments.config), arguments.overrides)
    trust_run(asdict(filled), getattr(filled, "trust", False))
    validate(filled)
    return filled


def import_from_here(recipe: Path) -> None:
    """A user's own files are importable: those of the current folder, and those beside a recipe of theirs."""
    sys.path.insert(0, os.getcwd())
    if recipe.parent != recipe_root():  # beside ours stand `evaluate` and others, which are not meant
        sys.path.append(str(recipe.resolve().parent))


def exit_on_user_error(work: Callable[[], None], again: str = "begins anew") -> None:
    """Runs `work`; a UserError or a refused sample becomes one line on stderr and exit code 2, a signal 128 + its number.

    again: see `run_recipe`
    """
    ended = outcome(work, again)
    if ended is not None:
        end(*ended)


def outcome(work: Callable[[], None], again: str = "begins anew") -> tuple[str, int] | None:
    """Runs `work`: None where it came to its end, else what there is to say, and an exit code. Raises whatever is a bug.

    again: see `run_recipe`
    """
    try:
        work()
        sys.stdout.flush()  # while a reader that is gone can still be told from any other trouble
    except (UserError, Refused) as error:
        return str(error), 2
    except Stopped as stopped:
        return str(stopped) if os.environ.get("RANK", "0") == "0" else "", stopped.code  # one process speaks for all
    except BrokenPipeError:
        if not _reader_gone():
            raise
        leave(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return f"no space left on the device: {error.filename or 'output_dir'}", 2
    except KeyboardInterrupt:
        return f"interrupted; the same command {again}", 128 + signal.SIGINT
    return None


def end(message: str, code: int) -> NoReturn:
    """Says a line on stderr, where there is one, and exits.

    A mistake is found by all processes of a machine at once: the first says it, and the launcher ends the others meanwhile.
    """
    if code == 2 and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(AFTER_THE_FIRST)
    if message:
        with contextlib.suppress(BrokenPipeError):
            shown = "".join(
                c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in message
            )  # a stranger's file may be cited
            print(f"mdm: {shown}", file=sys.stderr, flush=True)
    leave(code)


def _reader_gone() -> bool:
    """Whether what is printed has no reader any more, as with `mdm ls | head -1`.

    A stream without a buffer (PYTHONUNBUFFERED) has nothing left to flush: its pipe is asked.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
            if hasattr(select, "poll"):  # unbuffered, nothing is left to flush
                poll = select.poll()
                poll.register(stream, 0)
                if any(event & select.POLLERR for _, event in poll.poll(0)):
                    return True
        except BrokenPipeError:
            return True
        except (ValueError, TypeError):  # no file of the system's, as in a notebook
            continue
    return False


def leave(code: int) -> NoReturn:
    """Exits at once: threads that prefetch data would otherwise be waited for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    os._exit(code)
