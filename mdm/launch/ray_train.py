"""A recipe as the workers of Ray Train: it places them on a cluster, and starts all of them again where one has died.

Each worker does what a process of torchrun would, in the process group that Ray has joined it to: same folder, imports and
settings, and its own checkpoints. What ends a run for good (a user's mistake) is told to the driver, which ends all of it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mdm.config import UserError, reason
from mdm.hardware import supposing
from mdm.recipe import end, import_from_here, outcome, prepare

RESTARTS = 3
"""How often all workers are started again, where `--max-restarts` says nothing."""
LINE = 10.0  # seconds between two lines of a worker's progress bar


def asked_for(launched: argparse.Namespace, given: set[str]) -> int:
    """The number of workers of `--ray`. Raises UserError for no number, for flags that are torchrun's, and without Ray."""
    said = f"--ray {launched.ray}"
    if not launched.ray.isdecimal() or int(launched.ray) < 1:
        raise UserError(f"{said}: write how many workers there are to be, as in --ray 16")
    others = sorted(given - {"ray", "max_restarts"})
    if others:
        raise UserError(f"{said}: --{others[0]} is torchrun's; Ray takes --max-restarts alone, and places the workers itself")
    if importlib.util.find_spec("ray") is None:
        raise UserError(f"{said}: Ray is not installed; pip install 'trimodal-mdm[scale]'")
    return int(launched.ray)


def start(workers: int, restarts: int, recipe: Path, words: Sequence[str]) -> None:
    """Runs a recipe in so many workers. It returns where the run came to its end, and exits with a code where it did not.

    Raises UserError for a mistake in the settings, and where the cluster will never hold the workers.
    """
    import ray

    with supposing(workers):  # what depends on their number is found to be wrong before any of them starts
        settings = prepare(recipe, words)[1]
    with tempfile.TemporaryDirectory(prefix="mdm_ray_") as aside:
        passed = {name: value for name, value in os.environ.items() if name == "PYTHONPATH" or name.startswith("MDM_")}
        own: dict[str, Any] = {"env_vars": passed, "worker_process_setup_hook": f"{__name__}.quiet"}
        os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # else a worker's lines come twice
        with contextlib.chdir(aside):  # a worker imports from there before all else, and a user's folder may hold `components`
            try:
                ray.init(ignore_reinit_error=True, runtime_env=own, logging_level=logging.WARNING)
            except (ConnectionError, ValueError) as error:
                named = os.environ.get("RAY_ADDRESS")
                where = f"RAY_ADDRESS={named}" if named else "the cluster that runs here"
                raise UserError(f"--ray {workers}: {where} cannot be joined ({reason(error)})") from error
        try:
            gpu = _placed(workers, getattr(settings, "device", "auto"))
            asked = {"recipe": str(recipe), "words": [*words], "folder": os.getcwd()}
            ended = _fit(workers, restarts, gpu, Path(aside), asked)
        finally:
            ray.shutdown()
    if ended is not None:
        end(*ended)


def _placed(workers: int, device: str) -> bool:
    """Whether each worker has a GPU, else a CPU. Raises UserError where there will never be so many."""
    import ray

    nodes, most = [node["Resources"] for node in ray.nodes() if node["Alive"]], _grown()
    gpu = device != "cpu" and any(node.get("GPU", 0) >= 1 for node in [*nodes, most])
    needs = ("CPU", "GPU") if gpu else ("CPU",)

    def room(of: Mapping[str, float]) -> int:
        return min(int(of.get(need, 0)) for need in needs)

    ever = max(sum(map(room, nodes)), room(most))
    if ever < workers:
        each = "a GPU and a CPU" if gpu else "a CPU"
        raise UserError(f"--ray {workers}: each worker takes {each}, and the cluster has room for {ever} of them at the most")
    if room(ray.available_resources()) < workers:
        print(f"mdm: waiting until the cluster has room for {workers} workers", file=sys.stderr, flush=True)
    return gpu


def _grown() -> Mapping[str, float]:
    """What an autoscaling cluster may come to have; empty for any other."""
    from ray._private import state

    asked = getattr(state.state, "get_max_resources_from_cluster_config", None)
    return (asked() if asked is not None else None) or {}


def _fit(workers: int, restarts: int, gpu: bool, aside: Path, asked: Mapping[str, Any]) -> tuple[str, int] | None:
    """Trains: None at its end, else what there is to say and an exit code. Raises Ray's error for a bug, with its traceback."""
    import ray
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    told: Any = ray.remote(num_cpus=0)(Told).remote()
    logs: dict[str, Any] = {"logging_config": train.LoggingConfig(log_level="ERROR")} if hasattr(train, "LoggingConfig") else {}
    trainer = TorchTrainer(
        work,
        train_loop_config={**asked, "told": told},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo"),
        scaling_config=train.ScalingConfig(num_workers=workers, use_gpu=gpu),
        run_config=train.RunConfig(
            storage_path=str(aside),
            failure_config=train.FailureConfig(max_failures=restarts),
            callbacks=[_restarts()],
            **logs,
        ),
    )
    failed: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failed.append(error)

    fitting = threading.Thread(target=fit, daemon=True)  # Ray answers Ctrl-C itself where it has the main thread
    fitting.start()
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        while fitting.is_alive():
            fitting.join(1.0)
            ended: Any = ray.get(told.said.remote())
            if ended is not None:
                return ended
    except (KeyboardInterrupt, _Terminated) as error:
        name, number = ("SIGTERM", signal.SIGTERM) if isinstance(error, _Terminated) else ("Ctrl-C", signal.SIGINT)
        return f"interrupted by {name}; the same command goes on from the last checkpoint, where one was written", 128 + number
    finally:
        signal.signal(signal.SIGTERM, before)
    if failed:
        raise failed[0]
    return None


class _Terminated(Exception):
    """SIGTERM, in the driver."""


def _terminated(signum: int, frame: object) -> NoReturn:
    raise _Terminated


class Told:
    """An actor that keeps what a worker has to say that ends the run."""

    def __init__(self) -> None:
        self._ended: tuple[str, int] | None = None

    def end(self, message: str, code: int) -> None:
        if self._ended is None or not self._ended[0]:
            self._ended = message, code

    def said(self) -> tuple[str, int] | None:
        return self._ended


def quiet() -> None:
    """In each process of Ray's: what says nothing to a user, every few seconds where Ray's dashboard is not installed."""
    logging.getLogger("ray.train.v2._internal.execution.controller.placement_group_cleaner").setLevel(logging.ERROR)


def _restarts() -> Any:
    """A callback that says in one line why all workers are started again."""
    from ray.train import UserCallback

    class Restarts(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for rank, error in sorted(worker_exceptions.items()):
                why = next(iter(str(error).strip().splitlines()), "")
                print(f"mdm: worker {rank} has failed ({type(error).__name__}: {why[:200]})", flush=True)

    return Restarts()


def work(asked: Mapping[str, Any]) -> None:
    """In a worker: the recipe, as a process of torchrun would run it. It returns at its end, and raises what is a bug."""
    import ray

    sys.stdout, sys.stderr = Lines(sys.stdout), Lines(sys.stderr)

    def run() -> None:
        try:
            os.chdir(asked["folder"])
        except OSError as error:
            where = f"{os.uname().nodename} has no folder {asked['folder']} ({error.strerror})"
            raise UserError(f"--ray: {where}; run from one that all machines share") from error
        recipe = Path(asked["recipe"])
        import_from_here(recipe)
        sys.argv = [str(recipe), *asked["words"]]
        module, filled = prepare(recipe, asked["words"])
        module.main(filled)

    ended = outcome(run)
    if ended is not None:
        ray.get(asked["told"].end.remote(*ended))
        while True:  # an error would have Ray start all of it again; the driver ends this process
            time.sleep(60.0)


class Lines:
    """A stream whose progress bars, which draw one line over and over, become a line now and then: a log has no other."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.bar, self.last = stream, "", time.monotonic()

    def write(self, text: str) -> int:
        *drawn, rest = text.split("\r")
        for state in filter(str.strip, [*drawn, rest] if drawn else []):
            self.bar = state.strip()
        if not drawn:
            if text == "\n" and self.bar:  # a bar that is closed
                text, self.bar = f"{self.bar}\n", ""
            self.stream.write(text)
        elif self.bar and time.monotonic() - self.last >= LINE:
            self.stream.write(f"{self.bar}\n")
            self.last, self.bar = time.monotonic(), ""
        self.stream.flush()
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
