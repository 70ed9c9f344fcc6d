"""What a run writes down of itself: history.jsonl, the samples it left out, and whether its losses were finite."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from components.data.bad import Note
from components.data.reading import json_lines
from components.places import AnyPath
from components.types import PAD_DOCUMENT
from components.vocabulary import Vocabulary
from mdm.config import UserError, instantiate
from mdm.data.pipeline import MicroBatch
from mdm.hardware import Hardware
from mdm.training import checkpoint
from mdm.training.meter import Meter


class NonFinite:
    """Watches losses and gradient norms without waiting for the device: they are looked at when `check` is called."""

    def __init__(self, hw: Hardware, checkpoints: AnyPath) -> None:
        self.hw, self.checkpoints = hw, checkpoints
        self.seen: list[tuple[int, str, torch.Tensor]] = []

    def record(self, step: int, micros: list[MicroBatch], loss: Float[Tensor, ""], norm: Float[Tensor, ""]) -> None:
        documents = torch.cat([m.noisy.clean.document[m.noisy.clean.document != PAD_DOCUMENT] for m in micros])
        batch = f"samples {int(documents.min())} to {int(documents.max())}" if len(documents) else "no sample"
        self.seen.append((step, batch, torch.stack([loss.float(), norm.float()])))

    def check(self) -> None:
        """Raises UserError for the first step whose loss or gradient was not finite. Nothing is saved after such a step."""
        if not self.seen:
            return
        values = self.hw.sum(torch.stack([v for _, _, v in self.seen])).tolist()
        for (step, batch, _), (loss, norm) in zip(self.seen, values, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
                kept = checkpoint.complete(self.checkpoints)
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


OWN = {
    "step", "tokens", "loss", "grad_norm", "squared_grad_norm", "lr", "tokens_per_second", "mfu", "memory_gib", "data_seconds",
    "checkpoint_seconds", "filled", "seconds", "bad_samples", "cut_samples",
}  # fmt: skip
"""Keys of a line that are the run's own, beside `train_bits/<modality>` and `bits/<task>`."""


def is_own(key: str) -> bool:
    """Whether a key of a history is one that every run writes; the others are what its recipe has logged."""
    return key in OWN or key.startswith(("bits/", "train_bits/"))


class History:
    """`history.jsonl`: a line for every log and every validation; and the metric logger of the config, if any.

    `tokens_per_second` counts the time of steps and of waiting for data, not that of validation and checkpoints.
    A recipe's own numbers stand in these lines too:  history.log(accuracy=...), in any step
    """

    def __init__(self, path: Path, hw: Hardware, logger: Any | None, resumed_step: int, meter: Meter | None = None) -> None:
        self.hw, self.logger, self.path, self.meter = hw, logger, path, meter or Meter(hw)
        if hw.main:
            kept = [line for line in read_history(path) if line["step"] <= resumed_step] if path.is_file() else []
            self.file = path.open("w")
            for line in kept:
                self._line(line)
        self.notes = Notes(path.with_name("bad_samples.jsonl"), hw, resumed_step)
        self._reset()

    def _reset(self) -> None:
        self.nelbo: Float[Tensor, " ranges"] | None = None
        self.content: list[int] | None = None
        self.filled = torch.zeros(2, dtype=torch.float64)  # positions that hold a token, and all of them
        self.loss: Float[Tensor, ""] | None = None
        self.norm: Float[Tensor, ""] | None = None
        self.squared_norm: Float[Tensor, ""] | None = None
        self.steps = self.tokens = 0
        self.seconds = 0.0
        self.logged: dict[str, tuple[Any, int]] = {}

    def accumulate(self, nelbo: Float[Tensor, " ranges"], micro: MicroBatch) -> None:
        """A micro-batch's NELBO sums per id range, with its tokens of content, and what is told of its samples."""
        self.notes.add(micro.notes)
        content = micro.content
        self.filled += torch.tensor([micro.num_tokens, micro.noisy.noisy.numel()])
        self.meter.count(micro)
        self.nelbo = nelbo if self.nelbo is None else self.nelbo + nelbo
        self.content = content if self.content is None else [a + b for a, b in zip(self.content, content, strict=True)]

    def count(self, loss: Float[Tensor, ""], norm: Float[Tensor, ""], tokens: int, seconds: float) -> None:
        """A step's loss, gradient norm before clipping, tokens over all ranks, and time."""
        self.loss = loss if self.loss is None else self.loss + loss
        self.norm = norm if self.norm is None else self.norm + norm
        self.squared_norm = norm**2 if self.squared_norm is None else self.squared_norm + norm**2
        self.steps, self.tokens, self.seconds = self.steps + 1, self.tokens + tokens, self.seconds + seconds

    def log(self, **numbers: Any) -> None:
        """Numbers of a recipe's own: the next line holds the mean of each over all calls since the last line, of all ranks.

        A tensor is left on its device: it is waited for where the line is written. `**{"mine/a": 1.0}` names it as it likes.

        Raises ValueError for what is no single number, or a name that the run uses itself.
        """
        for name, number in numbers.items():
            if isinstance(number, Tensor) and number.ndim:
                raise ValueError(f"history.log: {name} has the shape {tuple(number.shape)}, and it is to be one number")
            if is_own(name):
                raise ValueError(f"history.log: {name!r} is what the run itself calls one of its figures; choose another name")
            value = number.detach() if isinstance(number, Tensor) else float(number)
            total, count = self.logged.get(name, (0.0, 0))
            self.logged[name] = (total + value, count + 1)

    def _means(self) -> dict[str, float | None]:
        """What was logged since the last line, over all ranks; null where it is not finite. All ranks take part."""
        sums: dict[str, tuple[float, int]] = {}
        for name, total, count in self.hw.gather([(name, float(total), count) for name, (total, count) in self.logged.items()]):
            before = sums.get(name, (0.0, 0))
            sums[name] = (before[0] + total, before[1] + count)
        self.logged = {}
        means = {name: total / count for name, (total, count) in sums.items()}
        return {name: mean if math.isfinite(mean) else None for name, mean in means.items()}

    def write(self, state: dict[str, Any], vocabulary: Vocabulary, lr: float) -> str:
        """Writes the means since the last call; returns them in short, for the progress bar."""
        if self.nelbo is None or self.loss is None or self.norm is None or self.squared_norm is None:  # no step
            return ""
        self.notes.gather(state["step"])
        started = time.perf_counter()
        logged = self._means()
        sums = self.hw.sum(torch.cat([self.nelbo.double(), torch.tensor(self.content, device=self.nelbo.device).double()]))
        total, tokens = sums.view(2, -1).tolist()
        held, positions = self.hw.sum(self.filled).tolist()
        loss = self.hw.sum(self.loss / self.steps).item()
        self.seconds += time.perf_counter() - started  # on a GPU this is where the queued steps are waited for
        self.seconds += self.meter.waited["data_seconds"]
        state["seconds"] += self.seconds
        line = {
            "step": state["step"],
            "tokens": state["tokens"],
            "loss": loss,
            "grad_norm": self.norm.item() / self.steps,
            "squared_grad_norm": self.squared_norm.item() / self.steps,
            "lr": lr,
            "tokens_per_second": self.tokens / self.seconds,
            **self.meter.line(self.seconds),
            "filled": held / positions,
            "seconds": state["seconds"],
        }
        bits = {}
        for modality in vocabulary.modalities:
            own = vocabulary.ranges_of(modality)
            count = sum(tokens[i] for i in own)
            if count:
                bits[modality] = sum(total[i] for i in own) / count / math.log(2)
        line |= {f"train_bits/{m}": b for m, b in bits.items()} | self.notes.counts() | logged
        self._emit(line)
        self._reset()
        shown = [f"{name} {value:.3g}" for name, value in logged.items() if value is not None]
        return ", ".join([f"loss {loss:.3f}", *shown]) + ", bits: " + ", ".join(f"{m} {b:.2f}" for m, b in bits.items())

    def validation(self, state: dict[str, Any], bits: dict[str, float]) -> None:
        """Bits per token of each task, and what was logged since the last line."""
        own = self._means()
        line = {"step": state["step"], "tokens": state["tokens"], **{f"bits/{t}": b for t, b in bits.items()}, **own}
        self._emit(line)

    def _emit(self, line: dict[str, Any]) -> None:
        if not self.hw.main:
            return
        self._line(line)
        if self.logger is not None:
            self.logger.log_dict({k: v for k, v in line.items() if k != "step" and v is not None}, step=line["step"])

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


def open_history(cfg: Any, hw: Hardware, resumed_step: int, meter: Meter) -> History:
    """The history of a run, continued after a resume; the metric logger is of the main process alone."""
    logger = instantiate(cfg.metric_logger, "metric_logger") if cfg.metric_logger is not None and hw.main else None
    return History(Path(cfg.output_dir) / "history.jsonl", hw, logger, resumed_step, meter)


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of a history; one that was being written when the run was killed is left out, and so is what is none."""
    return [line for _, line in json_lines(path) if isinstance(line, dict) and "step" in line]
