"""What a training run leaves behind and starts from: its folder, its tokenizers, its history, and where to go on."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from components.copies import copied
from components.places import AnyPath, exists, listing, place, publish, read_bytes, within
from components.progress import Bar
from mdm.config import UserError, at_least, at_least_one, check
from mdm.config.names import up_to_date
from mdm.data.corruption import check_maskers
from mdm.data.position import load_state
from mdm.data.processor import Processor
from mdm.data.settings import BatchSettings, check_data, check_tokenizers
from mdm.hardware import COMPILING, Hardware, barrier, check_compile, check_hardware, number_of_processes
from mdm.models.memory import check_memory
from mdm.models.transformer import ModelConfig
from mdm.training import checkpoint
from mdm.training.checkpoint import Checkpoints
from mdm.training.history import read_history
from mdm.training.output import check_output_dir

ALONG = ("history.jsonl", "bad_samples.jsonl")
"""Files of output_dir that go along with a checkpoint that is written elsewhere: the next machine has none of them."""

FIXED = (
    "checkpoint",
    "method",
    "lora",
    "blocks",
    "causal",
    "orders",
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


def check_run(cfg: Any, model: ModelConfig, modalities: Sequence[str]) -> None:
    """All settings of a training: what `pretrain` and `finetune` share. Raises UserError.

    model: what is trained;  modalities: the names of all that it will have
    """
    cfg.canvas = {modality: length for modality, length in cfg.canvas.items() if length is not None}
    check_output_dir(cfg.output_dir)
    check_hardware(cfg.device, cfg.precision)
    cfg.mesh.check()
    if cfg.mesh.tensor > 1 and (cfg.float8 or cfg.compile.lower() == "true"):
        what = "compile=auto (they run eagerly)" if not cfg.float8 else "float8=null"
        raise UserError(f"mesh.tensor: split blocks cannot be compiled, nor multiply float8; set {what}, or mesh.tensor=1")
    if cfg.profile is not None:
        cfg.profile.check()
    check_compile(cfg.compile)
    check_memory(cfg.activation_checkpointing, cfg.activation_offloading, cfg.float8, cfg.device)
    check_tokenizers(cfg.tokenizers)
    check_data(cfg.data, cfg.masker, cfg.loss, cfg.batch)
    check_maskers(cfg.data, cfg.masker, cfg.loss, modalities, model)
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
    if isinstance(folder := checkpoint_folder(cfg), Path):  # what is far away is looked at when the run begins
        check_held(folder, asdict(cfg))


def checkpoint_folder(cfg: Any) -> AnyPath:
    """Where a run's checkpoints lie: a folder, or a URL. Raises UserError for what is neither."""
    if cfg.checkpoint_dir is not None and (meant := re.match(r"(\w+):/(?=[^/])", cfg.checkpoint_dir)):
        raise UserError(
            f"checkpoint_dir={cfg.checkpoint_dir}: a URL has two slashes, {meant[1]}://{cfg.checkpoint_dir[meant.end() :]}; a "
            f"folder of that name is ./{cfg.checkpoint_dir}"
        )
    try:
        return Path(cfg.output_dir) / "checkpoints" if cfg.checkpoint_dir is None else place(cfg.checkpoint_dir)
    except ValueError as error:
        raise UserError(f"checkpoint_dir={error}") from error


def open_checkpoints(cfg: Any, hw: Hardware) -> Checkpoints:
    """The checkpoints of a run. Raises UserError where there can be none."""
    if cfg.checkpoint_dir is not None:
        check_output_dir(cfg.checkpoint_dir, far=True, key="checkpoint_dir")
    return Checkpoints(checkpoint_folder(cfg), hw, along=[Path(cfg.output_dir) / name for name in ALONG])


def check_shared(batch: BatchSettings, copies: int, processes: int) -> None:
    """Raises UserError where a step has fewer rows than there are processes to share them.

    copies: how often a row comes: twice, where masks come in pairs
    """
    for key, size in {"physical": batch.at(0), **{f"ramp.{share}": size for share, size in batch.ramp.items()}}.items():
        if size // copies < processes:
            rows = f"{size // copies} pairs" if copies > 1 else f"{size} sequences"
            raise UserError(
                f"batch.{key} = {size}: a step of {rows} cannot be shared by {processes} processes; take fewer of them, or a "
                "larger batch.physical (batch.logical stays: the settings are scaled to it)"
            )


def check_lanes(cfg: Any) -> None:
    """Raises UserError where packed rows have fewer lanes than there are processes; of other rows it shows when they open."""
    processes = number_of_processes() // cfg.mesh.tensor
    packed = [name for name, s in cfg.data.items() if s.pack is not None]
    if packed and cfg.lanes < processes:
        raise UserError(
            f"lanes = {cfg.lanes}: data.{packed[0]} is cut into them, and {processes} processes need at least as many; a run "
            "that has begun keeps its lanes, and goes on with fewer processes"
        )


def introduce(run: Any) -> None:
    """Says what is going to be trained, and where."""
    cfg, hw = run.cfg, run.hw
    flops = run.model.flops_per_token(run.model.config.max_length)
    of = " as replicate {} x shard {} x tensor {}".format(*hw.mesh.shape) if hw.mesh is not None else ""
    hw.say(
        f"{run.num_parameters / 1e6:.1f} M parameters ({flops / 1e6:.0f} MFLOP a token), "
        f"{hw.world_size} x {hw.device.type}{of}, {'bf16' if hw.bf16 else 'float32'}, "
        f"{'compiled' if run.compiled else 'eager'}; {cfg.tokens / 1e6:,.10g} M tokens in steps of "
        f"{run.physical(run.state['tokens'])} sequences; vocabulary of {run.vocabulary.size}"
    )
    if cfg.precision == "auto" and not hw.bf16:
        hw.say("This hardware does not multiply bfloat16: training runs in float32, about a third slower.")
    if run.compiled:
        hw.say(COMPILING)


def bar_of(run: Any) -> Bar:
    """The progress bar of a training, in tokens."""
    total, seen = run.cfg.tokens, run.state["tokens"]
    return Bar(
        total=total, initial=min(seen, total), unit="tok", unit_scale=True, desc="compiling" if run.compiled else "training",
        disable=not run.hw.main, mininterval=1.0, smoothing=0.05,
    )  # fmt: skip


def newest_whole(checkpoints: AnyPath) -> tuple[AnyPath | None, Mapping[str, Any], dict[AnyPath, str]]:
    """The newest checkpoint that can be read, with its state, and why each newer one cannot be."""
    damaged = dict[AnyPath, str]()
    for candidate in reversed(checkpoint.complete(checkpoints)):
        try:
            return candidate, checkpoint.read_state(candidate), damaged
        except checkpoint.Damaged as error:
            damaged[candidate] = str(error)
    return None, {}, damaged


def find_resume(folder: Path, checkpoints: AnyPath, config: Mapping[str, Any], hw: Hardware) -> AnyPath | None:
    """The newest whole checkpoint of a run; None where a new run begins. What is passed over is said.

    Raises UserError where the folder holds a run of other settings, or checkpoints of which none is whole.
    """
    newest, saved, damaged = newest_whole(checkpoints)
    if newest is None and damaged:
        raise UserError(
            f"{next(iter(damaged.values()))}: the checkpoint is damaged, and there is no whole one before it; "
            f"choose another output_dir, or delete {checkpoints} to start again"
        )
    if newest is not None:
        check_same(newest.parent, saved, config)
    found = {str(path) for path in hw.gather([newest])}  # all ranks have looked
    if len(found) > 1:
        raise UserError(
            f"{checkpoints} is not the same folder for all processes: they find {' and '.join(sorted(found))}; name a shared "
            "output_dir, or a checkpoint_dir that is a URL"
        )
    for path, why in damaged.items():
        pass_over(path, why, hw)
    history = folder / "history.jsonl"
    if newest is None and (history.is_file() or (folder / "config.yaml").is_file()):
        steps = max((line["step"] for line in read_history(history)), default=0) if history.is_file() else 0
        hw.say(f"{folder} holds a run of {steps:,} steps that left no checkpoint: it and its history begin again at zero.")
    if hw.main:
        checkpoint.remove_partial(checkpoints)
    return newest


def check_same(checkpoints: AnyPath, saved: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises UserError where a checkpoint's run had other settings, of those that a resumed run must share."""
    for key in filter(config.__contains__, FIXED):
        if key not in saved.get("fixed", {}) and (key == "lanes" or config[key] is None):
            continue  # of a version that had none; of lanes see `restore_or_start`
        if _compared(key, saved.get("fixed", {}).get(key, {})) != _compared(key, config[key]):
            where = checkpoints.parent if checkpoints.name == "checkpoints" else checkpoints
            raise UserError(f"{where} holds a run with another `{key}`; choose another one, or delete it to start again")


def check_held(checkpoints: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError where the newest whole checkpoint is of a run of other settings; nothing is changed there."""
    newest, saved, _ = newest_whole(checkpoints)  # the damaged are said by the run, which sets them aside
    if newest is not None:
        check_same(checkpoints, saved, config)


def pass_over(damaged: AnyPath, why: str, hw: Hardware) -> None:
    """Sets a damaged checkpoint aside, and says so."""
    if hw.main:
        hw.say(f"{why}: this checkpoint is damaged and passed over; it is kept as {checkpoint.set_aside(damaged)}")
    barrier(hw)


def kept_processor(folder: Path, resumed: AnyPath | None) -> Processor | None:
    """The tokenizers that the run has had from its start, so that mended data changes none of them; None for a new run."""
    if resumed is None:
        return None
    kept: AnyPath = folder / "processor" if isinstance(resumed, Path) else resumed.parent / "processor"
    try:
        kept = copied(kept)
        if not kept.is_dir():
            return None
        return Processor.load(kept, trust=True)  # a run is resumed by whom it belongs to: see SECURITY.md
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{kept}, the tokenizers of the run in {folder}, cannot be read: {error}") from error


def keep_processor(folder: Path, checkpoints: AnyPath, processor: Processor) -> None:
    """Writes the tokenizers of a run that begins: all of them, or none; beside checkpoints that are far away, too."""
    partial, kept = folder / "partial_processor", folder / "processor"
    shutil.rmtree(partial, ignore_errors=True)
    processor.save(partial)
    if not isinstance(checkpoints, Path):
        for file in listing(partial):
            publish(checkpoints / "processor" / within(partial, file), read_bytes(file))
    shutil.rmtree(kept, ignore_errors=True)
    os.replace(partial, kept)


def fetch_along(folder: Path, resumed: AnyPath | None, hw: Hardware) -> None:
    """Brings along what a run has written of itself until its checkpoint, to a machine that has none of it, or less."""
    if not hw.main or resumed is None or isinstance(resumed, Path):
        return
    for name in ALONG:
        if exists(resumed / name):
            content, here = read_bytes(resumed / name), folder / name
            if not here.exists() or here.stat().st_size < len(content):  # the run was here before, and went on elsewhere
                publish(here, content)


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
            run.resumed = find_resume(run.folder, run.checkpoints.folder, config, hw)
            if run.resumed is None:
                raise UserError(f"{error}, and there is no checkpoint before it; run again to start at zero") from error
    if hw.main:
        OmegaConf.save(OmegaConf.create(config), run.folder / "config.yaml")
        if run.resumed is None:
            keep_processor(run.folder, run.checkpoints.folder, run.processor)
    fetch_along(run.folder, run.resumed, hw)
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
    if key != "data":  # null is what an earlier version did not have yet
        return {k: v for k, v in plain.items() if v is not None} if isinstance(plain, dict) else plain
    return {name: {k: v for k, v in s.items() if k != "on_long" and v is not None} for name, s in plain.items()}
