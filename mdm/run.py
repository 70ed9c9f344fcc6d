"""What a training run leaves behind and starts from: its folder, its tokenizers, its history, and where to go on."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from components.data.bad import Note
from components.data.reading import json_lines
from components.types import PAD_DOCUMENT
from components.vocabulary import Vocabulary
from mdm import checkpoint
from mdm.config import UserError, at_least, at_least_one, check, instantiate
from mdm.data import MicroBatch, check_data
from mdm.hardware import Hardware, check_compile, check_hardware
from mdm.memory import check_memory
from mdm.processor import Processor

FIXED = (
    "checkpoint",
    "method",
    "lora",
    "model",
    "tokenizers",
    "canvas",
    "data",
    "prompt_dropout",
    "masker",
    "loss",
    "parameterization",
    "seed",
)
"""Settings that a resumed run must share with the one it goes on from."""


def check_output_dir(output_dir: str) -> None:
    """Raises UserError where output_dir cannot be made or written to. A folder that was not there is not left behind."""
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
    for modality, node in cfg.tokenizers.items():
        check(node, f"tokenizers.{modality}", supplied=("corpus",))
    check_data(cfg.data, cfg.masker, cfg.loss, cfg.batch)
    cfg.optimizer.validate()
    if cfg.metric_logger is not None:
        check(cfg.metric_logger, "metric_logger")
    if not 0 <= cfg.prompt_dropout < 1:
        raise UserError(f"prompt_dropout must be in [0, 1), got {cfg.prompt_dropout}")
    at_least(0, cfg, "seed")
    at_least_one(
        cfg, "tokens", "log_every_steps", "validate_every_tokens", "validation_samples", "checkpoint_every_tokens",
        "sample_every_tokens",
    )  # fmt: skip
    check_held(Path(cfg.output_dir), asdict(cfg))


def output_folder(output_dir: str) -> Path:
    """The folder that a recipe writes to, made where there is none."""
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
    if run.resumed is None:
        state = {"step": 0, "tokens": 0, "seconds": 0.0, "fixed": {key: config[key] for key in FIXED if key in config}}
        state["samples"] = run.lengths
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
        run.loader.load_state_dict(state.pop("data"))
        hw.say(f"Resuming from {run.resumed}, at {state['tokens'] / 1e6:.2f} M tokens.")
        for name, count in run.lengths.items():
            before = state.setdefault("samples", run.lengths).get(name, count)
            if before != count:
                hw.say(f"data.{name} has {count:,} samples, {before:,} when it was saved: from here on their order is another.")
        state["samples"] = run.lengths
    return state


def _compared(key: str, value: Any) -> Any:
    """A setting as it must be shared; what becomes of samples that are too long may change on the way."""
    plain = json.loads(json.dumps(value))
    return {name: {k: v for k, v in s.items() if k != "on_long"} for name, s in plain.items()} if key == "data" else plain


class NonFinite:
    """Watches losses and gradient norms without waiting for the device: they are looked at when `check` is called."""

    def __init__(self, hw: Hardware) -> None:
        self.hw = hw
        self.seen: list[tuple[int, str, torch.Tensor]] = []

    def record(self, step: int, micros: list[MicroBatch], loss: torch.Tensor, norm: torch.Tensor) -> None:
        documents = torch.cat([m.noisy.clean.document[m.noisy.clean.document != PAD_DOCUMENT] for m in micros])
        batch = f"samples {int(documents.min())} to {int(documents.max())}" if len(documents) else "no sample"
        self.seen.append((step, batch, torch.stack([loss.float(), norm.float()])))

    def check(self, folder: Path) -> None:
        """Raises UserError for the first step whose loss or gradient was not finite. Nothing is saved after such a step."""
        if not self.seen:
            return
        values = self.hw.sum(torch.stack([v for _, _, v in self.seen])).tolist()
        for (step, batch, _), (loss, norm) in zip(self.seen, values, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
                kept = checkpoint.complete(folder / "checkpoints")
                last = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been written yet"
                raise UserError(
                    f"step {step}: the {what}, on the batch of {batch}; stopped, and {last}. A lower optimizer.lr may help"
                )
        self.seen.clear()


class Notes:
    """`bad_samples.jsonl`: the distinct samples that were left out or cut: the step it was known at, stream, name and why.

    A rank finds those of its own rows. They are put together where the history is written and where the run is saved; what
    came after the checkpoint that a run resumes from is found again.
    """

    def __init__(self, path: Path, hw: Hardware, resumed_step: int) -> None:
        self.path, self.hw = path, hw
        self.known: set[tuple[str, str, bool]] = set()
        self.new: dict[tuple[str, str, bool], Note] = {}
        self.left_out = self.cut = 0
        self.first: Note | None = None
        if hw.main and path.is_file():
            kept = [line for line in read_history(path) if line["step"] <= resumed_step]
            path.unlink()
            self._keep([(line["step"], Note(line["name"], line["why"], line["cut"], line["stream"])) for line in kept])

    def add(self, notes: Sequence[Note]) -> None:
        """What was found in rows of this rank."""
        self.new |= {_identity(note): note for note in notes if _identity(note) not in self.known}

    def gather(self, step: int) -> None:
        """Writes what is new on any rank, after so many steps. All ranks take part."""
        if self.hw.sum(torch.tensor(len(self.new))).item():
            found = sorted(self.hw.gather(list(self.new.values())), key=_identity)
            self._keep([(step, note) for note in found])
            self.new = {}

    def _keep(self, found: list[tuple[int, Note]]) -> None:
        lines = []
        for step, note in found:
            if _identity(note) in self.known:
                continue
            self.known.add(_identity(note))
            self.first = self.first or note
            self.left_out, self.cut = self.left_out + (not note.cut), self.cut + note.cut
            line = {"step": step, "stream": note.stream, "name": note.name, "why": note.why, "cut": note.cut}
            lines.append(json.dumps(line) + "\n")
        if self.hw.main and lines:
            with self.path.open("a") as file:
                file.writelines(lines)

    def counts(self) -> dict[str, int]:
        """Distinct samples so far, of each kind that there is."""
        return {key: n for key, n in (("bad_samples", self.left_out), ("cut_samples", self.cut)) if n}

    def summary(self) -> str | None:
        """All of them in one line; None where there are none."""
        if self.first is None:
            return None
        cut = f" and {self.cut} cut to fit" if self.cut else ""
        first = f"the first is data.{self.first.stream}: {self.first.name}: {self.first.why}"
        return f"Samples left out: {self.left_out}{cut}; {first}. All are in {self.path}"


def _identity(note: Note) -> tuple[str, str, bool]:
    return note.stream, note.name, note.cut


class History:
    """`history.jsonl`: a line for every log and every validation; and the metric logger of the config, if any."""

    def __init__(self, path: Path, hw: Hardware, logger: Any | None, resumed_step: int) -> None:
        self.hw, self.logger, self.path = hw, logger, path
        if hw.main:
            kept = [line for line in read_history(path) if line["step"] <= resumed_step] if path.is_file() else []
            self.file = path.open("w")
            for line in kept:
                self._line(line)
        self.notes = Notes(path.with_name("bad_samples.jsonl"), hw, resumed_step)
        self._reset()

    def _reset(self) -> None:
        self.nelbo: torch.Tensor | None = None
        self.content: list[int] | None = None
        self.loss: torch.Tensor | None = None
        self.norm: torch.Tensor | None = None
        self.squared_norm: torch.Tensor | None = None
        self.steps = self.tokens = 0
        self.seconds = 0.0

    def accumulate(self, nelbo: torch.Tensor, micro: MicroBatch) -> None:
        """A micro-batch's NELBO sums per id range, with its tokens of content, and what is told of its samples."""
        self.notes.add(micro.notes)
        content = micro.content
        self.nelbo = nelbo if self.nelbo is None else self.nelbo + nelbo
        self.content = content if self.content is None else [a + b for a, b in zip(self.content, content, strict=True)]

    def count(self, loss: torch.Tensor, norm: torch.Tensor, tokens: int, seconds: float) -> None:
        """A step's loss, gradient norm before clipping, tokens over all ranks, and time."""
        self.loss = loss if self.loss is None else self.loss + loss
        self.norm = norm if self.norm is None else self.norm + norm
        self.squared_norm = norm**2 if self.squared_norm is None else self.squared_norm + norm**2
        self.steps, self.tokens, self.seconds = self.steps + 1, self.tokens + tokens, self.seconds + seconds

    def write(self, state: dict[str, Any], vocabulary: Vocabulary, lr: float) -> str:
        """Writes the means since the last call; returns them in short, for the progress bar."""
        if not self.steps:
            return ""
        self.notes.gather(state["step"])
        started = time.perf_counter()
        sums = self.hw.sum(torch.cat([self.nelbo.double(), torch.tensor(self.content, device=self.nelbo.device).double()]))
        total, tokens = sums.view(2, -1).tolist()
        loss = self.hw.sum(self.loss / self.steps).item()
        self.seconds += time.perf_counter() - started  # on a GPU this is where the queued steps are waited for
        state["seconds"] += self.seconds
        line = {
            "step": state["step"],
            "tokens": state["tokens"],
            "loss": loss,
            "grad_norm": self.norm.item() / self.steps,
            "squared_grad_norm": self.squared_norm.item() / self.steps,
            "lr": lr,
            "tokens_per_second": self.tokens / self.seconds,
            "seconds": state["seconds"],
        }
        bits = {}
        for modality in vocabulary.modalities:
            own = vocabulary.ranges_of(modality)
            count = sum(tokens[i] for i in own)
            if count:
                bits[modality] = sum(total[i] for i in own) / count / math.log(2)
        line |= {f"train_bits/{m}": b for m, b in bits.items()} | self.notes.counts()
        self._emit(line)
        self._reset()
        return f"loss {loss:.3f}, bits: " + ", ".join(f"{m} {b:.2f}" for m, b in bits.items())

    def validation(self, state: dict[str, Any], bits: dict[str, float]) -> None:
        """Bits per token of each task."""
        line = {"step": state["step"], "tokens": state["tokens"], **{f"bits/{t}": b for t, b in bits.items()}}
        self._emit(line)

    def _emit(self, line: dict[str, Any]) -> None:
        if not self.hw.main:
            return
        self._line(line)
        if self.logger is not None:
            self.logger.log_dict({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    def _line(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Ends the history; says what was left out."""
        if (summary := self.notes.summary()) is not None:
            self.hw.say(summary)
        if self.hw.main:
            self.file.close()
            if self.logger is not None:
                self.logger.close()


def open_history(cfg: Any, hw: Hardware, resumed_step: int) -> History:
    """The history of a run, continued after a resume; the metric logger is of the main process alone."""
    logger = instantiate(cfg.metric_logger, "metric_logger") if cfg.metric_logger is not None and hw.main else None
    return History(Path(cfg.output_dir) / "history.jsonl", hw, logger, resumed_step)


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of a history; one that was being written when the run was killed is left out, and so is what is none."""
    return [line for _, line in json_lines(path) if isinstance(line, dict) and "step" in line]
