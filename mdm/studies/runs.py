"""Many runs of a recipe, each a process of its own: in parallel, resumable, and a finished one is never repeated.

folder/runs/NAME/           what the recipe writes, its config.yaml too (checkpoints are removed when it has finished)
folder/runs/NAME.json       its outcome
folder/runs/NAME.log        what it printed
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch

from components.places import publish
from components.progress import Bar
from mdm.config import UserError, find_config, load, read_yaml
from mdm.config.names import up_to_date
from mdm.config.spelling import whole
from mdm.training.history import read_history
from mdm.training.stopping import Stopped


def settings_of(schema: type, config: str, changes: Mapping[str, Any]) -> Any:
    """The settings of a run: a config with some keys changed (dotted, as on the command line). Raises UserError."""
    return load(schema, find_config(config), _overrides(changes))


def _overrides(changes: Mapping[str, Any]) -> list[str]:
    """Changed keys as the words of a command line."""
    return [f"{key}={'null' if value is None else value}" for key, value in changes.items()]


class Runs:
    """The runs of a sweep. The outcome of one is {"loss", "steps", "tokens", "seconds", "squared_grad_norm", ...}.

    workers:  processes at a time; each has its share of the cores, or a GPU of its own
    tolerant: a run that fails has the outcome {"loss": nan, "error": ...}, and is tried again the next time; the others go on.
              Else it ends the sweep
    """

    def __init__(
        self, folder: Path, config: str, base: Mapping[str, Any], workers: int | None = None, tolerant: bool = False
    ) -> None:
        """base: the keys of `config` that every run changes. Raises UserError where the folder holds a sweep of others."""
        self.tolerant = tolerant
        self.folder, self.config, self.base = folder / "runs", config, dict(base)
        self.folder.mkdir(parents=True, exist_ok=True)
        header, of = self.folder / "sweep.json", up_to_date(json.loads(json.dumps({"config": config, "base": dict(base)})))
        if header.is_file() and up_to_date(json.loads(header.read_text())) != of:
            raise UserError(f"output_dir {folder} holds a sweep of other settings; choose another, or delete it")
        header.write_text(json.dumps(of, indent=1))
        self.devices = max(torch.cuda.device_count(), 1)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.workers = workers or (self.devices if torch.cuda.is_available() else max(cores, 1))
        self.threads = max(cores // self.workers, 1)
        self.pool = ThreadPoolExecutor(self.workers)
        self.slots: queue.Queue[int] = queue.Queue()
        for slot in range(self.workers):
            self.slots.put(slot)
        self.tokens = whole(base.get("tokens") or read_yaml(find_config(config)).get("tokens") or 1, "tokens")
        self.bar = Bar(total=0, unit="tok", unit_scale=True, smoothing=0)  # the time left, by tokens
        self.counts = [0, 0]  # runs finished, runs asked for

    def outcome(self, name: str) -> dict[str, Any] | None:
        """What a finished run gave; None if it has not finished."""
        return {k: v for k, v in self._read(name).items() if k not in ("name", "changes")} or None

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def run(self, changes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Runs the recipe `pretrain` once for each name, with these keys changed; returns every outcome.

        A run whose loss was not finite has the outcome {"loss": inf, "error": ...}. Raises UserError for any other failure.
        May be called from several threads: they share the workers.
        """
        missing = [name for name in changes if not self.finished(name, changes[name])]
        tokens = {name: whole(change.get("tokens", self.tokens), "tokens") for name, change in changes.items()}
        known = sum(tokens[name] for name in changes if name not in missing)
        self.bar.total += sum(tokens.values())
        self.bar.initial += known  # was paid for earlier: no part of this rate
        self.bar.n += known
        self._count(len(changes) - len(missing), len(changes))
        waiting = [self.pool.submit(self._next, name, {**self.base, **changes[name]}) for name in missing]
        for done in waiting:
            done.result()
        return {name: self.outcome(name) or {} for name in changes}

    def finished(self, name: str, changes: Mapping[str, Any]) -> bool:
        """Whether a run has finished, or diverged; one that crashed has not. Raises UserError where it had other settings."""
        run, asked = self._read(name), up_to_date(json.loads(json.dumps({**self.base, **changes}, default=str)))
        held = up_to_date(run.get("changes", asked))
        if held != asked:
            key = next(k for k in {**held, **asked} if held.get(k) != asked.get(k))
            raise UserError(
                f"{self.folder / name}.json: this run had {key} = {held.get(key)}, now it is {asked.get(key)}; choose another "
                "output_dir, or delete this file to run it again"
            )
        return bool(run) and status_of(run) != "crashed"

    def _next(self, name: str, changes: Mapping[str, Any]) -> None:
        slot = self.slots.get()
        try:
            self.bar.set_description(name)
            self._run(name, changes, slot)
            self.bar.update(whole(changes.get("tokens", self.tokens), "tokens"))
            self._count(1, 0)
        except BaseException:
            self.pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            self.slots.put(slot)

    def _count(self, finished: int, asked: int) -> None:
        self.counts = [self.counts[0] + finished, self.counts[1] + asked]
        self.bar.set_postfix_str(f"{self.counts[0]} of {self.counts[1]} runs")

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.bar.close()

    def _run(self, name: str, changes: Mapping[str, Any], slot: int) -> None:
        env = {"OMP_NUM_THREADS": str(self.threads)}
        if torch.cuda.is_available():
            env["CUDA_VISIBLE_DEVICES"] = str(slot % self.devices)
        run_one(self.folder, name, self.config, changes, env, self.tolerant)


def run_one(
    folder: Path, name: str, config: str, changes: Mapping[str, Any], env: Mapping[str, str], tolerant: bool = False
) -> dict[str, Any]:
    """One run of the recipe `pretrain` in a process of its own; writes its outcome and returns it."""
    own = folder / name
    command = [sys.executable, "-P", "-m", "mdm.cli", "run", "pretrain", "--config", config]
    command += _overrides({**changes, "output_dir": own})
    with _alone(folder / f"{name}.lock") as lock, (folder / f"{name}.log").open("w") as log:
        code = subprocess.run(
            command, env={**os.environ, **env}, stdout=log, stderr=subprocess.STDOUT, pass_fds=(lock.fileno(),)
        ).returncode
    text = (folder / f"{name}.log").read_text().splitlines()
    error = next((line for line in reversed(text) if line.startswith("mdm: ")), (text or ["no output"])[-1])
    signum = -code if code < 0 else code - 128
    if signum in (signal.SIGINT, signal.SIGTERM):  # it has saved what it had
        raise Stopped(f"the run {name} was stopped; the same command goes on with it", signum)
    if code == 2 and ("loss is" in error or "gradient norm is" in error):
        outcome: dict[str, Any] = {"loss": float("inf"), "error": error}
    elif code and not tolerant:
        raise UserError(f"the run {name} failed ({error}); its output is in {folder / name}.log")
    elif code:
        outcome = {"loss": float("nan"), "error": error}
    else:
        outcome = _outcome(own)
    shutil.rmtree(own / "checkpoints", ignore_errors=True)
    publish(folder / f"{name}.json", json.dumps({"name": name, **outcome, "changes": dict(changes)}, default=str))
    return outcome


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[IO[str]]:
    """A lock that the run's own process holds too: a sweep that was killed may leave it running, and the next one waits."""
    with path.open("w") as lock:
        with contextlib.suppress(ImportError):  # Windows has no fcntl
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    path.unlink(missing_ok=True)


def status_of(outcome: Mapping[str, Any]) -> str:
    """finished, diverged (the loss was not finite) or crashed."""
    return "finished" if math.isfinite(outcome["loss"]) else "diverged" if math.isinf(outcome["loss"]) else "crashed"


def _outcome(folder: Path) -> dict[str, Any]:
    """The last validation of a run (its mean over tasks is the loss, in bits a token), and how it got there."""
    history = read_history(folder / "history.jsonl")
    validation = [line for line in history if any(k.startswith("bits/") for k in line)][-1]
    trained = [line for line in history if "grad_norm" in line]
    bits = {k: v for k, v in validation.items() if k.startswith("bits/")}
    later = trained[len(trained) // 2 :]  # the first half has another gradient
    return {
        "loss": sum(bits.values()) / len(bits),
        **bits,
        "steps": validation["step"],
        "tokens": validation["tokens"],
        "seconds": trained[-1]["seconds"],
        "squared_grad_norm": sum(line["squared_grad_norm"] for line in later) / len(later),
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for each row; a figure that a row lacks is left empty."""
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, fields)
        out.writeheader()
        out.writerows(rows)


def write_results(folder: Path, summary: Mapping[str, Any], figure: bytes, title: str, finding: str) -> None:
    """What a sweep leaves behind beside its table: summary.json, figure.png and finding.md; the finding is printed too."""
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    (folder / "figure.png").write_bytes(figure)
    (folder / "finding.md").write_text(f"# {title}\n\n{finding}\n")
    print(finding)
    print(f"Written to {folder}")


def tune(
    losses: Callable[[Sequence[float]], Mapping[float, float]], start: float, factor: float = 2.0, most: int = 8
) -> dict[float, float]:
    """The losses on a geometric grid around `start`, widened until its best learning rate is inside it.

    losses: learning rates -> the loss of each

    Raises UserError where the best is still at an edge after `most` more.
    """
    known = dict(losses([start / factor, start, start * factor]))
    for _ in range(most):
        best = best_rate(known)
        if best not in (min(known), max(known)):
            return known
        further = best / factor if best == min(known) else best * factor
        known |= losses([further])
    raise UserError(f"the best learning rate lies outside {min(known):.2g} to {max(known):.2g}; start elsewhere")


def best_rate(losses: Mapping[float, float]) -> float:
    """The learning rate of the lowest loss."""
    return min(losses, key=lambda rate: losses[rate])


def vertex(losses: Mapping[float, float]) -> float:
    """The minimum of the parabola, in log lr, through the best learning rate and its neighbours; without them, the best."""
    rates = sorted(losses)
    i = rates.index(best_rate(losses))
    if i in (0, len(rates) - 1) or not all(math.isfinite(losses[rates[k]]) for k in (i - 1, i, i + 1)):
        return rates[i]
    a, b, c = (losses[rates[k]] for k in (i - 1, i, i + 1))
    step = math.log(rates[i + 1] / rates[i])
    return rates[i] * math.exp(step * 0.5 * (a - c) / (a - 2 * b + c))
