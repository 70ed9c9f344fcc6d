"""A recipe in several processes under torchrun: its own parser, its own launcher, and how they end.

A process that dies takes the others with it, and all are started again up to `--max-restarts` times: they go on from the last
whole checkpoint. What a user has to mend (exit code 2) and what a user has asked for (130, 143) is not tried again. A signal to
the launcher goes to every process, and the launcher waits for them: 143 for SIGTERM and SIGUSR1 (preemption), 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api as _api

from mdm.config import UserError
from mdm.recipe import Parser, leave

api: Any = _api  # its agent is decorated in ways that types do not follow
MISTAKE, STOPPED, INTERRUPTED = 2, 128 + signal.SIGTERM, 128 + signal.SIGINT
DEFAULTS = {"signals_to_handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "shutdown_timeout": 300}
"""In place of torchrun's own, where its version has the flag: preemption is passed on, and a large checkpoint has the time."""
COUNTS: Any = {
    "nnodes": (lambda text: min(torchrun.parse_min_max_nnodes(text)), "how many machines there are, as in 16, or 1:16"),
    "nproc_per_node": (
        torchrun.determine_local_world_size,
        "how many processes a machine has, as in 8; gpu, where it has any, is one for each",
    ),
}
"""What a flag's text counts, and what to write; torchrun ends in a traceback."""
VARIABLES = {"shutdown_timeout": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}


def read(words: Sequence[str]) -> tuple[argparse.Namespace, set[str]]:
    """The flags, torchrun's and `--ray`, with `training_script` and its `training_script_args`; and which flags were given.

    Raises UserError.
    """
    flags = _flags()
    launched = flags.read(words)
    for flag, (count, form) in COUNTS.items():
        text = str(getattr(launched, flag, 1))
        try:
            wrong = count(text) < 1
        except (ValueError, RuntimeError):
            wrong = True
        if wrong:
            raise UserError(f"--{flag} {text}: write {form}")
    for action in flags._actions:
        action.default = argparse.SUPPRESS
    given = set(vars(flags.read(words))) - {"training_script", "training_script_args"}
    met = given & {"ray", "rdzv_endpoint", "master_addr"} or {"PET_RDZV_ENDPOINT", "PET_MASTER_ADDR"} & set(os.environ)
    if not met and torchrun.parse_min_max_nnodes(str(launched.nnodes))[1] > 1:
        raise UserError(
            f"--nnodes {launched.nnodes}: say where the machines meet, as in --rdzv_backend c10d --rdzv_endpoint HOST:29500, "
            "with any one of them for HOST"
        )
    return launched, given


def _flags() -> Parser:
    flags = Parser(prog="mdm run", parents=[torchrun.get_args_parser()], add_help=False, allow_abbrev=True)
    flags.add_argument("--ray", metavar="WORKERS")
    for action in flags._actions:
        action.required = False  # what is missing has another name here
        own = {f"PET_{action.dest.upper()}", VARIABLES.get(action.dest)}  # a user's, which torchrun reads
        if action.dest in DEFAULTS and not own & set(os.environ):
            action.default = DEFAULTS[action.dest]
    return flags


def start(launched: argparse.Namespace, recipe: Path, words: Sequence[str]) -> None:
    """Runs a recipe that was looked at. Each process is `mdm run` again, so it imports what a process alone would.

    It returns where the run came to its end, exits with one of the codes above, and raises whatever else was wrong.
    """
    default = _flags().get_default
    alone = ("nnodes", "rdzv_endpoint", "rdzv_backend", "master_port")
    launched.standalone |= all(getattr(launched, flag) == default(flag) for flag in alone)
    launched.no_python, launched.training_script = True, sys.executable
    launched.training_script_args = ["-u", "-P", "-m", "mdm.cli", "run", str(recipe), *words]
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # else restarts find dead ones' addresses
    if str(launched.nproc_per_node) != "1":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own default, of which it warns
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(_is_news)
    api.LocalElasticAgent = Agent
    try:
        torchrun.run(launched)
    except SignalException as error:  # it was passed on to every process
        leave(STOPPED if error.sigval == signal.SIGUSR1 else 128 + error.sigval)
    except ChildFailedError as error:
        code = meant(failure.exitcode for failure in error.failures.values())
        if code is None:
            raise
        leave(code)  # the process has said why


def _is_news(record: logging.LogRecord) -> bool:
    """Not that a process has ended with a code of its own, which it has explained."""
    return not record.getMessage().startswith(tuple(f"failed (exitcode: {code})" for code in (MISTAKE, STOPPED, INTERRUPTED)))


def meant(codes: Iterable[int]) -> int | None:
    """The exit code with which a process ended by itself and said why; None where one has died, and so may others of it.

    codes: of the processes that failed; negative is a signal's number. The others of a group are ended by SIGTERM
    """
    found = set(codes)
    if any(code < 0 and code != -signal.SIGTERM for code in found):
        return None
    if found - {STOPPED, -signal.SIGTERM} == set():
        return STOPPED if STOPPED in found else None  # they agree on it, so all of them leave with it
    return next((code for code in (MISTAKE, INTERRUPTED) if code in found), None)


class Agent(api.LocalElasticAgent):
    """torchrun's own, which does not start again what would end as before, and passes on a second signal too."""

    def _monitor_workers(self, worker_group: Any) -> Any:
        result = super()._monitor_workers(worker_group)
        code = meant(failure.exitcode for failure in result.failures.values())
        elsewhere = code == STOPPED and self._elastic  # a machine is taken away: the others go on
        if code is not None and not elsewhere:
            self._remaining_restarts = 0
        return result

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        try:
            super()._shutdown(death_sig, timeout)
        except SignalException as again:  # while it waits: else the processes would outlive it
            super()._shutdown(again.sigval, timeout)

    @property
    def _elastic(self) -> bool:
        """Whether the run goes on with fewer machines than it may have."""
        settings = getattr(self._worker_group.spec.rdzv_handler, "settings", None)
        return settings is not None and settings.min_nodes < settings.max_nodes
