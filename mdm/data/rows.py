"""How a stream's samples become rows: tokenized, fitted to their canvases, of a task drawn by share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from components.data.bad import Note, Noted, Refused
from components.data.packing import Document
from components.data.shards import Codes
from components.sequences import TokenSequence, response_sequence
from components.tasks import INSTRUCT, find_task
from mdm.data.processor import Processor
from mdm.data.settings import StreamSettings


@runtime_checkable
class Builder(Protocol):
    """How a stream's samples become rows.

    `prepare` tokenizes a sample when it is drawn, and raises ValueError where it cannot be used; a call makes of what it gave
    (of a row of documents, where text is packed) the sequences of a row: where tasks are chosen and prompts dropped.
    """

    def prepare(self, sample: Any) -> Any: ...
    def __call__(self, prepared: Any, rng: np.random.Generator) -> list[TokenSequence]: ...


def builder(
    name: str, settings: StreamSettings, processor: Processor, prompt_dropout: float = 0.0, max_length: int | None = None
) -> Builder:
    """The builder of a stream's rows."""
    if settings.pack is not None:
        return TextBuilder(processor)
    fitting = OnLong(name, processor, settings.on_long)
    if INSTRUCT in settings.tasks:
        return ResponseBuilder(fitting, prompt_dropout, max_length)
    return PairBuilder(fitting, settings.tasks, prompt_dropout)


def _part(sample: Mapping[str, Any], name: str) -> Any:
    """A part of a sample. Raises ValueError where it lacks it."""
    if name not in sample:
        raise ValueError(f"it has no {name}; it has {', '.join(sample) or 'nothing'}")
    return sample[name]


@dataclass(frozen=True)
class OnLong:
    """What becomes of a part that does not fit its canvas, by a stream's `on_long` (refuse, skip, cut)."""

    stream: str
    processor: Processor
    on_long: str

    def fit(self, modality: str, ids: Int[Tensor, " n"], ends: bool = False) -> tuple[Int[Tensor, " m"], list[Note]]:
        """The ids as they go onto the canvas, and a note where they were cut.

        ends: an end token has to follow it; none follows what was cut, which goes on

        Raises Refused, or ValueError for one to be left out.
        """
        room = self.processor.canvas.get(modality)
        may_end = self.processor.vocabulary.may_end(modality)
        if room is None or (len(ids) == room and not ends) or (may_end and len(ids) < room):
            return ids, []
        why = f"its {modality} of {len(ids)} tokens{' and its end' if ends else ''} does not fit canvas.{modality} = {room}"
        if self.on_long == "cut" and may_end:
            return ids[:room], [Note("", why, cut=True)]
        self.leave_out(why, may_end)

    def leave_out(self, why: str, can_be_cut: bool = False) -> NoReturn:
        """Raises Refused, or ValueError where the sample is to be left out."""
        if self.on_long == "skip":
            raise ValueError(why)
        help_ = "; skip leaves such samples out" + (", cut shortens them" if can_be_cut else ", and it cannot be cut")
        raise Refused(f"{why} (data.{self.stream}.on_long = {self.on_long}{help_})")


@dataclass(frozen=True)
class TextBuilder:
    """Running text, to be packed."""

    processor: Processor

    def prepare(self, sample: Mapping[str, Any]) -> Document:
        """The ids of a document with its end token."""
        text = _part(sample, "text")
        return Tokenized(text, self.processor) if isinstance(text, Codes) else self.processor.text_document(sample)

    def __call__(self, prepared: list[TokenSequence], rng: np.random.Generator) -> list[TokenSequence]:
        return prepared


class Tokenized:
    """A document of token shards with its end token, of which spans are read: rows are planned from lengths alone."""

    def __init__(self, codes: Codes, processor: Processor) -> None:
        self.codes, self.processor = codes, processor

    def __len__(self) -> int:
        return len(self.codes) + 1

    def __getitem__(self, span: slice) -> Int[Tensor, " n"]:
        """Raises BadSample."""
        start, stop, _ = span.indices(len(self))
        ids = self.processor.encode("text", self.codes[start:stop])
        return torch.cat([ids, torch.tensor([self.processor.vocabulary.end_id])]) if stop == len(self) > start else ids


@dataclass(frozen=True)
class PairBuilder:
    """A pair of modalities -> its sequence, of a task drawn by share, its prompt dropped with probability `prompt_dropout`."""

    fitting: OnLong
    tasks: Mapping[str, float]
    prompt_dropout: float

    def prepare(self, sample: Mapping[str, Any]) -> dict[str, Tensor] | Noted:
        """The ids of all that the tasks need, each as it goes onto its canvas."""
        encoded = self.fitting.processor.encode_sample(sample)
        parts = {m: _part(encoded, m) for t in self.tasks for m in find_task(t).modalities}
        fits = {m: self.fitting.fit(m, ids) for m, ids in parts.items()}
        parts, notes = {m: ids for m, (ids, _) in fits.items()}, [note for _, own in fits.values() for note in own]
        return Noted(parts, notes) if notes else parts

    def __call__(self, prepared: Mapping[str, Tensor], rng: np.random.Generator) -> list[TokenSequence]:
        shares = np.array(list(self.tasks.values()), dtype=float)
        task = list(self.tasks)[int(rng.choice(len(shares), p=shares / shares.sum()))]
        drop = bool(find_task(task).given) and rng.random() < self.prompt_dropout
        return [self.fitting.processor.sequence(task, prepared, drop)]


@dataclass(frozen=True)
class ResponseBuilder:
    """A prompt and a response -> running text of which only the response is masked; see `components.sequences`.

    A prompt has no canvas: with the response's it fits `max_length`, and it is never cut.
    """

    fitting: OnLong
    prompt_dropout: float
    max_length: int | None = None

    def prepare(self, sample: Mapping[str, Any]) -> dict[str, Tensor] | Noted:
        """The ids of both."""
        processor = self.fitting.processor
        parts = {part: processor.encode("text", _part(sample, part)) for part in ("prompt", "text")}
        parts["text"], notes = self.fitting.fit("text", parts["text"], ends=True)
        room = processor.canvas.get("text") or len(parts["text"]) + 1
        length = processor.overhead("text") + len(parts["prompt"]) + room
        if self.max_length is not None and length > self.max_length:
            prompt = f"its prompt of {len(parts['prompt'])} tokens"
            self.fitting.leave_out(f"{prompt}, with {room} for its text, does not fit model.max_length = {self.max_length}")
        return Noted(parts, notes) if notes else parts

    def __call__(self, prepared: Mapping[str, Tensor], rng: np.random.Generator) -> list[TokenSequence]:
        processor, drop = self.fitting.processor, rng.random() < self.prompt_dropout
        prompt, text, length = prepared["prompt"], prepared["text"], processor.canvas.get("text")
        ends = length is None or len(text) < length
        return [response_sequence(processor.vocabulary, prompt, text, length, drop, ends)]
