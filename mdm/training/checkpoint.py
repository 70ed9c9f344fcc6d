"""Checkpoints to resume from: torch.distributed.checkpoint, bit-exact, written while the run goes on.

    checkpoints/step_00000200/   weights and optimizer (DCP), and state.json

A step waits until the weights are copied (on a GPU, to pinned memory); a thread writes the copy. `state.json` is written when
all processes have written their part, last of all: it is what makes a checkpoint one, on a disk and on an object store, which
has no rename. What was being written when the run was killed has none, and is never resumed from. Nor is a checkpoint whose
files were damaged later: it is set aside, and the one before it is taken.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from components.data.bad import MACHINE
from components.files import Unreachable
from components.places import AnyPath, folders, of_network, patiently, publish, read_bytes, remove, sizes, system
from mdm.config import UserError, reason
from mdm.hardware import Hardware, barrier
from mdm.training import storage
from mdm.training.optim import EMA
from mdm.training.stopping import Stopped

STATE = "state.json"
OWN, PARTIAL = re.compile(r"step_\d+"), re.compile(r"partial_\d+")
"""Names of the folders that are a run's to remove: no others, as a copy that a user has made beside them."""
NAMED = re.compile(r"(damaged_)?(step|partial)_")


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None) -> dict[str, Any]:
    """What DCP saves: tensors only, so that nothing in it is unpickled on the way back."""
    trained = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    moments = get_optimizer_state_dict(model, optimizer)["state"]
    found = {"model": trained, "optimizer": moments, "rng": torch.get_rng_state()}
    if ema is not None:
        found["ema"] = ema.average
    return found


class Checkpoints:
    """The checkpoints of a run: one is written while the next steps are done, and the newest `keep` are kept.

    with Checkpoints(folder, hw) as checkpoints:    what is being written is written to its end, but where a peer is gone
        checkpoints.save(...)                       returns when weights may change again
        checkpoints.wait()                          returns when it is written

    along: files of this machine that lie beside a checkpoint that is far away: where the run goes on they may not be
    """

    def __init__(self, folder: AnyPath, hw: Hardware, keep: int = 2, along: Sequence[Path] = ()) -> None:
        self.folder, self.hw, self.keep = folder, hw, keep
        self.along = () if isinstance(folder, Path) else along
        self._stager = storage.Stager(hw.device)
        self._group: Any = dist.new_group(backend="gloo") if hw.world_size > 1 else None  # the run's are in use meanwhile
        self._finisher = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._writing: AnyPath = folder
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None, state: dict[str, Any]
    ) -> AnyPath:
        """Begins to write `folder/step_N` with everything a resume needs; waits for the one before. All ranks take part.

        state: JSON-able position of the run (step, tokens, data loader). Raises UserError as `wait` does.
        """
        self.wait()
        self._writing = self.folder / f"step_{step:08d}"
        try:
            if self.hw.main:
                _discard(self._writing)
            barrier(self.hw)
            written = state_dict_saver.async_save(
                tensors(model, optimizer, ema),
                storage_writer=storage.writer(self._writing),
                process_group=self._group,
                async_stager=self._stager,
                no_dist=self.hw.world_size == 1,
            )
        except OSError as error:
            raise self._failed(reason(error)) from error
        assert isinstance(written, Future)  # the copy is made
        along = {file.name: file.read_bytes() for file in self.along if self.hw.main and file.is_file()}
        self._pending = self._finisher.submit(self._finish, written, self._writing, json.dumps(state), along)
        return self._writing

    def _finish(self, written: Future[Any], final: AnyPath, state: str, along: Mapping[str, bytes]) -> None:
        """In the thread: what makes it a checkpoint, when all processes have written theirs; and older ones go."""
        written.result()
        if self.hw.main:
            for name, content in along.items():
                publish(final / name, content)
            _publish_state(final, state)
            self._retain()

    def _retain(self) -> None:
        """Removes all but the newest. What cannot be removed stays until the next time: the new one is whole."""
        try:
            for old in complete(self.folder)[: -self.keep]:
                _discard(old)
        except OSError as error:
            self.hw.say(f"Checkpoints in {self.folder} that are older than the newest {self.keep} stay: {reason(error)}")

    def check(self) -> None:
        """Raises UserError as `wait` does, for what is known by now. All ranks take part."""
        self._agree(self._known())

    def wait(self) -> None:
        """Waits until what was saved is written. All ranks take part.

        Raises UserError where it cannot be written; what was there before stays.
        """
        if self._pending is None:  # of all ranks, or of none
            return
        concurrent.futures.wait([self._pending])
        self._agree(self._known())
        self._pending = None

    def _known(self) -> BaseException | None:
        """Why what is being written here cannot be. Raises what is no fault of the place: another process may have died."""
        own = self._pending.exception() if self._pending is not None and self._pending.done() else None
        if own is not None and not isinstance(own, (OSError, dcp.api.CheckpointException)):
            raise own
        return own

    def _agree(self, own: BaseException | None) -> None:
        """Raises UserError on all ranks where it failed on one."""
        if not self.hw.sum(torch.tensor(float(own is not None))).item():
            return
        causes = [cause for cause, _ in getattr(own, "failures", {}).values()]  # DCP's, of each rank
        why = reason((causes or [own or OSError("another process says why")])[0])
        self._pending = None
        if self.hw.main:
            with contextlib.suppress(OSError):
                _discard(self._writing)
        raise self._failed(why) from own

    def _failed(self, why: str) -> UserError:
        kept = complete(self.folder)
        last = f"the last complete checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
        return UserError(f"cannot write the checkpoint {self._writing} ({why}); {last}")

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pending is not None and (kind is None or issubclass(kind, (UserError, Stopped))):
            concurrent.futures.wait([self._pending])
        self._finisher.shutdown(wait=False)
        self._stager.close()


def _publish_state(final: AnyPath, state: str) -> None:
    """Writes state.json, all of it or nothing."""
    if not isinstance(final, Path):
        return publish(final / STATE, state)
    partial = final / f"{STATE}.partial"
    with partial.open("w") as file:
        file.write(state)
        file.flush()
        os.fsync(file.fileno())
    publish(final / STATE, partial)


def _discard(folder: AnyPath) -> None:
    """Removes a checkpoint's folder, where there is one; first of all what makes it one."""
    remove(folder / STATE)
    if isinstance(folder, Path):
        return shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        patiently(folder, lambda: system(folder).rm(folder.path, recursive=True))


def complete(folder: AnyPath) -> list[AnyPath]:
    """Finished checkpoints, oldest first. Raises Unreachable."""
    found = [path for path, names in _folders(folder).items() if OWN.fullmatch(path.name) and STATE in names]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def _folders(folder: AnyPath) -> dict[AnyPath, set[str]]:
    """What lies in the folders of a run's checkpoints; none that are further below: they may be another run's."""
    return {path: set(sizes(path)) for path in folders(folder) if NAMED.match(path.name)}


class Damaged(Exception):
    """A checkpoint that was finished, and whose files are no longer whole; the message says which."""


def read_state(checkpoint: AnyPath) -> dict[str, Any]:
    """The state of a finished checkpoint, after a look at its files: each is as long as DCP's metadata says.

    Raises Damaged, and Unreachable where it cannot be looked at.
    """
    try:
        state = json.loads(read_bytes(checkpoint / STATE))
        if not isinstance(state, dict) or "step" not in state:
            raise ValueError("it holds no state")
    except Unreachable:
        raise
    except (OSError, ValueError) as error:
        raise Damaged(f"{checkpoint / STATE}: {error}") from error
    try:
        metadata, ends = storage.reader(checkpoint).read_metadata(), dict[str, int]()
        for part in metadata.storage_data.values():
            ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    except Unreachable:
        raise
    except Exception as error:  # it is a pickle: a cut one raises anything, or holds anything
        raise Damaged(f"{checkpoint / '.metadata'} cannot be read ({reason(error)})") from error
    found = sizes(checkpoint)
    for name, end in ends.items():
        if found.get(name, 0) < end:
            raise Damaged(f"{checkpoint / name} has {found.get(name, 0):,} bytes of {end:,}")
    return state


def set_aside(checkpoint: AnyPath) -> AnyPath:
    """Gives a damaged checkpoint another name, under which it is neither resumed from nor counted; nothing is deleted."""
    taken = {path.name for path in _folders(checkpoint.parent)}
    names = (f"damaged_{checkpoint.name}{more}" for more in itertools.chain([""], (f"_{i}" for i in itertools.count(2))))
    aside = checkpoint.with_name(next(name for name in names if name not in taken))
    if not isinstance(checkpoint, Path):
        far, away = checkpoint.path, checkpoint.with_name(aside.name).path
        with contextlib.suppress(FileNotFoundError):
            patiently(checkpoint, lambda: system(checkpoint).mv(far, away, recursive=True))
    elif checkpoint.is_dir():
        os.replace(checkpoint, str(aside))
    return aside


def remove_partial(folder: AnyPath) -> None:
    """Removes what a killed run was writing (`partial_*`: a version that renamed it in the end)."""
    for path, names in _folders(folder).items():
        if PARTIAL.fullmatch(path.name) or (OWN.fullmatch(path.name) and STATE not in names):
            _discard(path)


def check_space(folder: AnyPath, num_parameters: int, ema: bool, keep: int = 2) -> None:
    """Raises UserError where the disk lacks the room for `keep` + 1 checkpoints (float32 weights and two moments), with those
    of the run that are there already."""
    if not isinstance(folder, Path):
        return
    folder.mkdir(parents=True, exist_ok=True)
    one = 4 * num_parameters * (3 + ema)
    free, more = shutil.disk_usage(folder).free, max(keep + 1 - len(complete(folder)), 1)
    if free < more * one:
        needed = (
            f"{more} more checkpoint{'s' if more > 1 else ''} of {one / 2**20:.0f} MiB {'are' if more > 1 else 'is'} needed"
        )
        raise UserError(f"{folder}: {free / 2**20:.0f} MiB free, and {needed}; name another output_dir, or checkpoint_dir")


def restore(checkpoint: AnyPath, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None, hw: Hardware) -> None:
    """Loads a checkpoint in place, on any number of ranks.

    Raises UserError where it is of another model, ema or optimizer, or the machine is at fault; Damaged where what it holds
    cannot be read; and what torch.distributed does where another process has died.
    """
    held = tensors(model, optimizer, ema)
    try:
        state_dict_loader.load(held, storage_reader=storage.reader(checkpoint), no_dist=hw.world_size == 1)
    except (Exception, dcp.api.CheckpointException) as error:  # a file of tensors is a zip of pickles: it raises anything
        if hw.world_size > 1 and not isinstance(error, dcp.api.CheckpointException):  # another process has died
            raise
        for cause in [failed for failed, _ in getattr(error, "failures", {}).values()] or [error]:
            if isinstance(cause, (KeyboardInterrupt, SystemExit)):  # which the library wraps: nothing is wrong with the file
                raise cause from None
            here = isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in MACHINE)
            if here or isinstance(cause, Unreachable) or of_network(cause):
                raise UserError(f"{checkpoint} cannot be read now ({reason(error)}); it is left as it is") from error
        if "align with block boundary" in str(error):
            raise UserError(
                f"{checkpoint}: its 8-bit moments (optimizer.state) come in blocks that these processes cannot share; go on "
                "with as many as it was saved by"
            ) from error
        if any(word in reason(error) for word in ("Missing key", "Size mismatch")):
            raise UserError(f"{checkpoint} is not a checkpoint of this model: {reason(error)}") from error
        raise Damaged(f"{checkpoint} cannot be read ({reason(error)})") from error
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    set_optimizer_state_dict(model, optimizer, {"state": held["optimizer"], "param_groups": groups}, options=StateDictOptions())
    torch.set_rng_state(held["rng"])
