"""Checkpoints. For resuming: torch.distributed.checkpoint, bit-exact. For sharing: safetensors, config and vocabulary.

    output_dir/
      checkpoints/step_00000200/   weights, optimizer (DCP) and state.json; written under another name, then renamed
      processor/                   the tokenizers and the vocabulary of the run: a resume takes them from here
      model/                       model.safetensors, config.json, vocabulary.json, processor.json and tokenizer files

A checkpoint that was being written when the run was killed still has its other name: it is never the one resumed from. Nor is
one whose files were damaged later: it is set aside, and the one before it is taken.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import filesystem, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from components.data.bad import MACHINE
from mdm.config import UserError, reason
from mdm.hardware import Hardware, barrier
from mdm.training.optim import EMA


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What DCP saves (tensors only, so that nothing in it is unpickled on the way back), and the whole optimizer state."""
    whole = get_optimizer_state_dict(model, optimizer)
    trained = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    tensors = {"model": trained, "optimizer": whole["state"], "rng": torch.get_rng_state()}
    if ema is not None:
        tensors["ema"] = ema.average
    return tensors, whole


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    state: dict[str, Any],
    hw: Hardware,
    keep: int = 2,
) -> Path:
    """Writes `folder/step_N` with everything a resume needs, and removes all but the newest `keep`.

    state: JSON-able position of the run (step, tokens, data loader). Raises UserError where it cannot be written; what was
    there before stays.
    """
    final = folder / f"step_{step:08d}"
    partial = folder / f"partial_{step:08d}"
    try:
        if hw.main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        barrier(hw)
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        state_dict_saver.save(_tensors(model, optimizer, ema)[0], checkpoint_id=partial, no_dist=hw.world_size == 1)
        if hw.main:
            with open(partial / "state.json", "w") as f:
                json.dump(state, f)
                f.flush()
                os.fsync(f.fileno())
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            for old in complete(folder)[:-keep]:
                shutil.rmtree(old)
    except (OSError, dcp.api.CheckpointException, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = complete(folder)
        last = f"the last complete checkpoint is {kept[-1]}" if kept else "there is no earlier checkpoint"
        raise UserError(f"cannot write the checkpoint {final} ({reason(error)}); {last}") from error
    barrier(hw)
    return final


def complete(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step_*") if (p / "state.json").is_file())


class Damaged(Exception):
    """A checkpoint that was finished, and whose files are no longer whole; the message says which."""


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The state of a finished checkpoint, after a look at its files: each is as long as DCP's metadata says. Raises Damaged."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        if not isinstance(state, dict) or "step" not in state:
            raise ValueError("it holds no state")
    except (OSError, ValueError) as error:
        raise Damaged(f"{checkpoint / 'state.json'}: {error}") from error
    try:
        metadata = filesystem.FileSystemReader(checkpoint).read_metadata()
    except Exception as error:  # it is a pickle: a cut one raises anything
        raise Damaged(f"{checkpoint / '.metadata'} cannot be read ({reason(error)})") from error
    ends: dict[str, int] = {}
    for part in metadata.storage_data.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, end in ends.items():
        size = (checkpoint / name).stat().st_size if (checkpoint / name).is_file() else 0
        if size < end:
            raise Damaged(f"{checkpoint / name} has {size:,} bytes of {end:,}")
    return state


def set_aside(checkpoint: Path) -> Path:
    """Gives a damaged checkpoint another name, under which it is neither resumed from nor counted; nothing is deleted."""
    aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
    if checkpoint.is_dir() and not aside.exists():
        os.replace(checkpoint, aside)
    return aside


def remove_partial(folder: Path) -> None:
    """Removes what a killed run was writing."""
    for partial in folder.glob("partial_*"):
        shutil.rmtree(partial, ignore_errors=True)


def check_space(folder: Path, num_parameters: int, ema: bool, keep: int = 2) -> None:
    """Raises UserError where the disk lacks the room for `keep` + 1 checkpoints (float32 weights and two moments)."""
    folder.mkdir(parents=True, exist_ok=True)
    one = 4 * num_parameters * (3 + ema)
    free = shutil.disk_usage(folder).free
    if free < (keep + 1) * one:
        raise UserError(
            f"output_dir {folder}: {free / 2**20:.0f} MiB free, and {keep + 1} checkpoints of {one / 2**20:.0f} MiB are needed"
        )


def restore(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA | None, hw: Hardware) -> None:
    """Loads a checkpoint in place, on any number of ranks.

    Raises UserError where it is of another model, ema or optimizer, or the machine is at fault; Damaged where what it holds
    cannot be read.
    """
    tensors, whole = _tensors(model, optimizer, ema)
    try:
        state_dict_loader.load(tensors, checkpoint_id=checkpoint, no_dist=hw.world_size == 1)
    except (Exception, dcp.api.CheckpointException) as error:  # a file of tensors is a zip of pickles: it raises anything
        for cause in [failed for failed, _ in getattr(error, "failures", {}).values()] or [error]:
            if isinstance(cause, (KeyboardInterrupt, SystemExit)):  # which the library wraps: nothing is wrong with the file
                raise cause from None
            if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in MACHINE):
                raise UserError(f"{checkpoint} cannot be read now ({reason(error)}); it is left as it is") from error
        if any(word in reason(error) for word in ("Missing key", "Size mismatch")):
            raise UserError(f"{checkpoint} is not a checkpoint of this model: {reason(error)}") from error
        raise Damaged(f"{checkpoint} cannot be read ({reason(error)})") from error
    set_optimizer_state_dict(
        model, optimizer, {"state": tensors["optimizer"], "param_groups": whole["param_groups"]}, options=StateDictOptions()
    )
    torch.set_rng_state(tensors["rng"])
