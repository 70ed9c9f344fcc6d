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
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from components.data.bad import Refused
from mdm.config import UserError, find_config, load, recipe_root
from mdm.config.trust import trust_run
from mdm.training.stopping import Stopped


def find_recipe(name: str) -> Path:
    """A recipe's file, from its name or a path."""
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"recipe file not found: {name}")
        return path
    path = recipe_root() / f"{name}.py"
    if not path.is_file():
        raise UserError(f"recipe {name!r} is not one of {', '.join(recipe_names())}, nor the path of a .py file")
    return path


def recipe_names() -> list[str]:
    return sorted(p.stem for p in recipe_root().glob("*.py"))


def load_recipe(name: str) -> ModuleType:
    """A recipe as a module: one recipe may run another as a step (`quickstart` does)."""
    path = find_recipe(name)
    module_name = f"mdm_recipe_{path.stem}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None  # a file of Python has both
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    return sys.modules[module_name]


def run_recipe(
    settings: type,
    validate: Callable[[Any], None],
    main: Callable[[Any], None],
    config: str,
    again: str = "begins anew",
) -> None:
    """What stands at the end of every recipe: read the config, check all of it, then work.

    config: the config that is used where `--config` is absent
    again:  what the same command does after it was interrupted: nothing else is promised
    """
    parser = argparse.ArgumentParser(
        prog=f"mdm run {Path(sys.argv[0]).stem}",
        description=sys.modules["__main__"].__doc__,
        epilog=f"Every key is explained in the config: mdm cp {config} my.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default=config, help="name of a config (mdm ls) or path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the config's")
    arguments = parser.parse_intermixed_args()

    def work() -> None:
        filled = load(settings, find_config(arguments.config), arguments.overrides)
        trust_run(asdict(filled), getattr(filled, "trust", False))
        validate(filled)
        main(filled)

    exit_on_user_error(work, again)
    leave(0)


def exit_on_user_error(work: Callable[[], None], again: str = "begins anew") -> None:
    """Runs `work`; a UserError or a refused sample becomes one line on stderr and exit code 2, a signal 128 + its number.

    again: see `run_recipe`
    """
    try:
        work()
        sys.stdout.flush()  # while a reader that is gone can still be told from any other trouble
    except (UserError, Refused) as error:
        _end(str(error), 2)
    except Stopped as stopped:
        _end(str(stopped), stopped.code)
    except BrokenPipeError:
        if not _reader_gone():
            raise
        leave(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _end(f"no space left on the device: {error.filename or 'output_dir'}", 2)
    except KeyboardInterrupt:
        _end(f"interrupted; the same command {again}", 128 + signal.SIGINT)


def _end(message: str, code: int) -> NoReturn:
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
