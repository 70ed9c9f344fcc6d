"""What a training run leaves behind and starts from: its folder, its tokenizers, its history, and where to go on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from components.places import AT_START, is_remote, place, publish, remove
from mdm.config import UserError, at_least, at_least_one, check
from mdm.config.names import up_to_date
from mdm.data.position import load_state
from mdm.data.processor import Processor
from mdm.data.settings import check_data, check_tokenizers
from mdm.hardware import Hardware, check_compile, check_hardware
from mdm.models.memory import check_memory
from mdm.training import checkpoint
from mdm.training.history import read_history

FIXED = (
    "checkpoint",
    "method",
    "lora",
    "model",
    "tokenizers",
    "canvas",
    "data",
    "lanes",
    "prompt_dropout",
    "masker",
    "loss",
    "parameterization",
    "seed",
)
"""Settings that a resumed run must share with the one it goes on from."""


def check_output_dir(output_dir: str, far: bool = False) -> None:
    """Raises UserError where output_dir cannot be made or written to. A folder that was not there is not left behind.

    far: it may be a URL
    """
    if is_remote(output_dir):
        if not far:
            raise UserError(f"output_dir={output_dir}: a run is written to a disk of this machine; name a folder of it")
        try:
            probe = place(output_dir) / ".writable"
            publish(probe, b"", AT_START)
            remove(probe)
        except (OSError, ValueError) as error:
            raise UserError(f"output_dir={output_dir} cannot be written to: {error}") from error
        return
    folder = Path(output_dir)
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"output_dir={output_dir} cannot be written to: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # another run has begun to write there
            for parent in made:
                parent.rmdir()


def check_run(cfg: Any) -> None:
    """All settings of a training but its model: what `pretrain` and `finetune` share. Raises UserError."""
    cfg.canvas = {modality: length for modality, length in cfg.canvas.items() if length is not None}
    check_output_dir(cfg.output_dir)
    check_hardware(cfg.device, cfg.precision)
    check_compile(cfg.compile)
    check_memory(cfg.activation_checkpointing, cfg.activation_offloading, cfg.float8, cfg.device)
    check_tokenizers(cfg.tokenizers)
    check_data(cfg.data, cfg.masker, cfg.loss, cfg.batch)
    cfg.optimizer.validate()
    if cfg.metric_logger is not None:
        check(cfg.metric_logger, "metric_logger")
    if not 0 <= cfg.prompt_dropout < 1:
        raise UserError(f"prompt_dropout must be in [0, 1), got {cfg.prompt_dropout}")
    at_least(0, cfg, "seed", "data_workers")
    at_least_one(
        cfg, "tokens", "log_every_steps", "validate_every_tokens", "validation_samples", "checkpoint_every_tokens",
        "sample_every_tokens", "lanes",
    )  # fmt: skip
    check_lanes(cfg)
    check_held(Path(cfg.output_dir), asdict(cfg))


def check_lanes(cfg: Any) -> None:
    """Raises UserError where packed rows have fewer lanes than there are processes; of other rows it shows when they open."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    packed = [name for name, s in cfg.data.items() if s.pack is not None]
    if packed and cfg.lanes < processes:
        raise UserError(
            f"lanes = {cfg.lanes}: data.{packed[0]} is cut into them, and {processes} processes need at least as many; a run "
            "that has begun keeps its lanes, and goes on with fewer processes"
        )


def output_folder(output_dir: str) -> Path:
    """The folder of this machine that a recipe writes to, made where there is none."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def in_place_of(path: Path) -> str:
    """What to say behind the name of a result that replaces one of an earlier run: to be asked before it is written."""
    return ", in place of the one that was there" if path.exists() else ""


def newest_whole(checkpoints: Path) -> tuple[Path | None, Mapping[str, Any], dict[Path, str]]:
    """The newest checkpoint that can be read, with its state, and why each newer one cannot be."""
    damaged = {}
    for candidate in reversed(checkpoint.complete(checkpoints)):
        try:
            return candidate, checkpoint.read_state(candidate), damaged
        except checkpoint.Damaged as error:
            damaged[candidate] = str(error)
    return None, {}, damaged


def find_resume(folder: Path, config: Mapping[str, Any], hw: Hardware) -> Path | None:
    """The newest whole checkpoint of a run's folder; None where a new run begins. What is passed over is said.

    Raises UserError where the folder holds a run of other settings, or checkpoints of which none is whole.
    """
    checkpoints = folder / "checkpoints"
    newest, saved, damaged = newest_whole(checkpoints)
    if newest is None and damaged:
        raise UserError(
            f"{next(iter(damaged.values()))}: the checkpoint is damaged, and there is no whole one before it; "
            f"choose another output_dir, or delete {checkpoints} to start again"
        )
    if newest is not None:
        check_same(folder, saved, config)
    checkpoint.barrier(hw)  # all ranks have looked
    for path, why in damaged.items():
        pass_over(path, why, hw)
    history = folder / "history.jsonl"
    if newest is None and (history.is_file() or (folder / "config.yaml").is_file()):
        steps = max((line["step"] for line in read_history(history)), default=0) if history.is_file() else 0
        hw.say(f"{folder} holds a run of {steps:,} steps that left no checkpoint: it and its history begin again at zero.")
    if hw.main:
        checkpoint.remove_partial(checkpoints)
    return newest


def check_same(folder: Path, saved: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises UserError where a checkpoint's run had other settings, of those that a resumed run must share."""
    for key in filter(config.__contains__, FIXED):
        if key == "lanes" and key not in saved.get("fixed", {}):  # of a version that had none: see `restore_or_start`
            continue
        if _compared(key, saved.get("fixed", {}).get(key, {})) != _compared(key, config[key]):
            raise UserError(
                f"{folder} holds a run with another `{key}`; choose another output_dir, or delete it to start again"
            )


def check_held(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError where a folder's newest whole checkpoint is of a run of other settings; nothing is changed there."""
    newest, saved, _ = newest_whole(folder / "checkpoints")  # the damaged are said by the run, which sets them aside
    if newest is not None:
        check_same(folder, saved, config)


def pass_over(damaged: Path, why: str, hw: Hardware) -> None:
    """Sets a damaged checkpoint aside, and says so."""
    if hw.main:
        hw.say(f"{why}: this checkpoint is damaged and passed over; it is kept as {checkpoint.set_aside(damaged)}")
    checkpoint.barrier(hw)


def kept_processor(folder: Path, resumed: Path | None) -> Processor | None:
    """The tokenizers that the run has had from its start, so that mended data changes none of them; None for a new run."""
    kept = folder / "processor"
    if resumed is None or not kept.is_dir():
        return None
    try:
        return Processor.load(kept, trust=True)  # a run is resumed by whom it belongs to: see SECURITY.md
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{kept}, the tokenizers of the run in {folder}, cannot be read: {error}") from error


def keep_processor(folder: Path, processor: Processor) -> None:
    """Writes the tokenizers of a run that begins: all of them, or none."""
    partial, kept = folder / "partial_processor", folder / "processor"
    shutil.rmtree(partial, ignore_errors=True)
    processor.save(partial)
    shutil.rmtree(kept, ignore_errors=True)
    os.replace(partial, kept)


def restore_or_start(run: Any, config: dict[str, Any]) -> dict[str, Any]:
    """The run's state: of the checkpoint it resumes from (`run.resumed`), loaded in place, or of a new run.

    Raises UserError where that checkpoint has another vocabulary, or other tensors.
    """
    hw = run.hw
    fixed = {key: config[key] for key in FIXED if key in config}
    state = {"step": 0, "tokens": 0, "seconds": 0.0, "fixed": fixed, "samples": run.lengths}
    while run.resumed is not None:
        state = checkpoint.read_state(run.resumed)
        if state.pop("vocabulary") != run.vocabulary.to_dict():
            raise UserError(f"{run.resumed} was trained with another vocabulary than this config's tokenizers give")
        try:
            checkpoint.restore(run.resumed, run.model, run.optimizer, run.ema, hw)
            break
        except checkpoint.Damaged as error:
            pass_over(run.resumed, str(error), hw)
            run.resumed = find_resume(run.folder, config, hw)
            if run.resumed is None:
                raise UserError(f"{error}, and there is no checkpoint before it; run again to start at zero") from error
    if hw.main:
        OmegaConf.save(OmegaConf.create(config), run.folder / "config.yaml")
        if run.resumed is None:
            keep_processor(run.folder, run.processor)
    if run.resumed is not None:
        known = load_state(run.loader, state.pop("data"))
        hw.say(f"Resuming from {run.resumed}, at {state['tokens'] / 1e6:.2f} M tokens.")
        if not known:
            hw.say("It was saved by an earlier version: samples come in another order from here on, and documents begin anew.")
            state["fixed"] = fixed
        for name, count in run.lengths.items():
            before = state.setdefault("samples", run.lengths).get(name, count)
            if before != count:
                hw.say(f"data.{name} has {count:,} samples, {before:,} when it was saved: from here on their order is another.")
        state["samples"] = run.lengths
    return state


def _compared(key: str, value: Any) -> Any:
    """A setting as it must be shared, its components by their names of today; what becomes of long samples may change."""
    plain = up_to_date(json.loads(json.dumps(value)))
    if key != "data":
        return plain  # null is what an earlier version did not have yet
    return {name: {k: v for k, v in s.items() if k != "on_long" and v is not None} for name, s in plain.items()}
