"""A process that is killed at any moment costs time and nothing else: after kill -9 the weights are an undisturbed run's.

A tiny model of two gloo processes is trained once undisturbed. Then, for each kill, the same run begins in a fresh folder. At a
moment drawn uniformly over the first run's wall time, start-up and checkpoints included, one of its processes gets SIGKILL. The
launcher starts both again, and the final weights are compared bit for bit. Where there is no process yet, the first is killed
as it comes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch

import mdm
from components.progress import Bar
from mdm.config import UserError
from mdm.training.checkpoint import complete

from .measure import Result, Timing, rows

PRESETS = {"smoke": 12_000, "cpu": 80_000, "gpu": 80_000}  # tokens; the processes are of the CPU on every machine
LAUNCHERS = {"torchrun": ["--nproc_per_node", "2"], "ray": ["--ray", "2"]}
RESTARTS = 3  # that the launcher may make: more than one is a fault, and is counted
PATIENCE = 120.0  # seconds that a run may take beyond ten of the undisturbed

CONFIG = """
output_dir: out
model: {_component_: mdm.models.builders.nano, max_length: 64, width: 32, num_layers: 2, num_heads: 2}
tokenizers:
  text: {_component_: components.tokenizers.text.TextTokenizer.train, vocab_size: 300}
canvas: {text: 12}
data:
  text:
    train: {_component_: components.data.reference.language_reference, split: test}
    tasks: {text: 1.0}
    pack: 32
masker: {_component_: components.maskers.BernoulliMasker, pairs: true}
batch: {logical: 12, micro: 6}
optimizer: {lr: 1.0e-3}
device: cpu
precision: fp32
compile: "false"
log_every_steps: 1
validate_every_tokens: 1000000
checkpoint_every_tokens: 1000
"""


@dataclass
class Kill:
    """A run that lost a process.

    moment:     of the kill, seconds after the command began
    rank:       of the process; None where it had none yet, or said none (under Ray)
    step:       the last that was logged before; 0 where none was
    resumed:    name of the checkpoint that training went on from; None where there was none
    again:      seconds from the kill to the next step; None where all steps had been done
    equal:      whether the final weights are those of the undisturbed run, bit for bit
    lost:       whether a checkpoint that was whole at the kill was passed over, or any was found to be damaged
    restarts:   how often the processes were started again
    """

    moment: float
    rank: int | None
    step: int
    resumed: str | None
    again: float | None
    equal: bool
    lost: bool
    restarts: int
    seconds: float


def run(preset: str, launcher: str = "torchrun", kills: str = "3", seed: str = "0") -> Result:
    """Raises UserError for an unknown launcher or another number, and where the undisturbed run fails."""
    if launcher not in LAUNCHERS:
        raise UserError(f"--launcher {launcher}: choose from {', '.join(LAUNCHERS)}")
    for name, value in (("kills", kills), ("seed", seed)):
        if not value.isdecimal() or (name == "kills" and int(value) == 0):
            raise UserError(f"--{name} {value}: write a number")
    rng, found, tries = random.Random(int(seed)), [], 0
    with tempfile.TemporaryDirectory() as folder, Bar(total=int(kills) + 1, leave=False, desc="restarts") as bar:
        whole = Run(Path(folder) / "undisturbed", launcher, PRESETS[preset])
        with whole:
            code = whole.wait(600.0)
        if code != 0:
            raise UserError(f"the run that nothing disturbs ended with {code}: {whole.said()[-2000:]}")
        bar.update()
        while len(found) < int(kills):
            tries += 1
            kill = killed(Run(Path(folder) / f"kill_{tries}", launcher, PRESETS[preset]), whole, rng)
            if kill is not None:  # None: it had ended before
                found.append(kill)
                bar.update()
    print(markdown(found), flush=True)
    return summary(preset, launcher, int(seed), whole.seconds, found)


def killed(own: Run, whole: Run, rng: random.Random) -> Kill | None:
    """A run that loses a process. None where it had ended before that; the moment is drawn anew then."""
    moment, which = rng.uniform(0.0, whole.seconds), rng.random()
    with own:
        own.wait(moment)
        while not (there := own.workers()) and own.process.poll() is None:
            time.sleep(0.01)
        kept, step, starts = complete(own.out / "checkpoints"), own.step(), own.starts()
        pid = sorted(there)[int(which * len(there))] if there else 0
        if not pid:
            return None
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return None
        at = time.monotonic()
        again = None
        while own.process.poll() is None and time.monotonic() - at < 10 * whole.seconds + PATIENCE:
            if again is None and own.starts() > starts and own.written() > own.started:
                again = time.monotonic() - at
            time.sleep(0.05)
        code = own.wait(0.0)
    resumed = own.resumed()
    last = resumed[-1] if resumed else None
    passed_over = bool(kept) and (last is None or (last in kept and last != kept[-1]))
    return Kill(
        moment=at - own.began,
        rank=there[pid] if there[pid] is not None else own.rank(pid),
        step=step,
        resumed=last.name if last else None,
        again=again,
        equal=code == 0 and same(own.out, whole.out),
        lost=passed_over or "damaged" in own.said(),
        restarts=own.restarts(),
        seconds=own.seconds,
    )


class Run:
    """`mdm run` of two processes in a folder of its own; a `with` starts it, and ends what is left of it."""

    def __init__(self, folder: Path, launcher: str, tokens: int) -> None:
        self.folder, self.launcher = folder, launcher
        self.out, self.log = folder / "out", folder / "log.txt"
        folder.mkdir()
        (folder / "config.yaml").write_text(f"{CONFIG}tokens: {tokens}\n")
        self.seconds = self.started = 0.0
        self._starts = 0

    def __enter__(self) -> Run:
        library = str(Path(mdm.__file__).parent.parent)
        env = {**os.environ, "PYTHONPATH": library, "OMP_NUM_THREADS": "1", "MDM_TYPECHECK": "0", "RAY_ADDRESS": "local"}
        flags = [*LAUNCHERS[self.launcher], "--max-restarts", str(RESTARTS)]
        command = [sys.executable, "-P", "-m", "mdm.cli", "run", *flags, "pretrain", "--config", "config.yaml"]
        self.began = time.monotonic()
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            below = descendants(self.process.pid)
            for pid in (self.process.pid, *below):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()

    def wait(self, seconds: float) -> int | None:
        """Its exit code, or None where it has none within so many seconds of its beginning."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(max(self.began + seconds - time.monotonic(), 0.0))
            self.seconds = self.seconds or time.monotonic() - self.began
            return code
        return None

    def workers(self) -> dict[int, int | None]:
        """Its training processes, with the rank of each where it can be known from outside."""
        found: dict[int, int | None] = {}
        for pid in descendants(self.process.pid):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
                environ = dict(w.split(b"=", 1) for w in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if b"=" in w)
                if self.launcher == "ray" and b"RayTrainWorker" in words:
                    found[pid] = None
                elif self.launcher == "torchrun" and b"mdm.cli" in words and b"RANK" in environ:
                    found[pid] = int(environ[b"RANK"])
        return found

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def starts(self) -> int:
        """How often training has begun; `started` is when it was seen to last."""
        count = self.said().count("M parameters (")
        if count > self._starts:
            self._starts, self.started = count, time.time()
        return count

    def written(self) -> float:
        """When the history was written to last."""
        with contextlib.suppress(OSError):
            return (self.out / "history.jsonl").stat().st_mtime
        return 0.0

    def step(self) -> int:
        """The last step of the history; 0 where there is none."""
        with contextlib.suppress(OSError):
            lines = (self.out / "history.jsonl").read_text().splitlines()
            with contextlib.suppress(ValueError):  # the last may be half a line
                return max((json.loads(line)["step"] for line in lines[:-1]), default=0)
        return 0

    def resumed(self) -> list[Path]:
        """The checkpoints that it has gone on from."""
        return [self.folder / path for path in re.findall(r"Resuming from (\S+?),? at ", self.said())]

    def rank(self, pid: int) -> int | None:
        """Of a worker of Ray's: rank 0 is the one that prints."""
        printing = re.findall(r"pid=(\d+)[^\n]*M parameters \(", self.said())
        return None if not printing else 0 if str(pid) in printing else 1 if len(printing) > self.restarts() else None

    def restarts(self) -> int:
        """How often the launcher has started the processes again."""
        if self.launcher == "ray":
            return len(re.findall(r"mdm: worker \d+ has failed.*\n(?!.*mdm: worker \d+ has failed)", self.said()))
        return len(re.findall(r"failed \(exitcode:", self.said()))


def descendants(pid: int) -> list[int]:
    """All processes below one."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    return list(_below(pid, parents))


def _below(pid: int, parents: dict[int, list[int]]) -> Iterator[int]:
    for child in parents.get(pid, []):
        yield child
        yield from _below(child, parents)


def same(one: Path, other: Path) -> bool:
    """Whether two runs have the same weights, bit for bit."""
    own, theirs = (safetensors.torch.load_file(run / "model" / "model.safetensors") for run in (one, other))
    return own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)


def markdown(kills: list[Kill]) -> str:
    """A row for each kill, in the order of their moments."""
    lines = [
        "| killed after, s | rank | step before | went on from | s until the next step | weights equal | checkpoint lost |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kill in sorted(kills, key=lambda k: k.moment):
        rank = "not yet known" if kill.rank is None else kill.rank
        again = "all were done" if kill.again is None else f"{kill.again:.1f}"
        cells = (f"{kill.moment:.1f}", rank, kill.step, kill.resumed or "the beginning", again)
        lines.append(f"| {' | '.join(map(str, cells))} | {'yes' if kill.equal else 'NO'} | {'YES' if kill.lost else 'no'} |")
    return "\n".join(lines)


def summary(preset: str, launcher: str, seed: int, undisturbed: float, kills: list[Kill]) -> Result:
    """As other suites: runs an hour of the undisturbed and the killed, and what was found."""
    took, again = [kill.seconds for kill in kills], [kill.again for kill in kills if kill.again is not None]
    timings = {
        "undisturbed": Timing(undisturbed, undisturbed, undisturbed),
        "killed once": Timing(statistics.median(took), min(took), max(took)),
    }
    figures = {
        "kills": len(kills),
        "weights_equal": sum(kill.equal for kill in kills),
        "checkpoints_lost": sum(kill.lost for kill in kills),
        "seconds_until_next_step": statistics.median(again) if again else 0.0,
        "each": {str(i): asdict(kill) for i, kill in enumerate(kills)},
    }
    settings = {"launcher": launcher, "seed": seed, "processes": 2, "tokens": PRESETS[preset]}
    return Result(f"restarts_{launcher}", preset, "runs/hour", settings, rows(timings, 3600.0), figures)
