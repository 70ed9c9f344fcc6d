"""The data pipeline of a run, from its settings: sources -> tokens -> mix -> micro-batches -> masks, ready for a step."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, Protocol, runtime_checkable

import numpy as np
import torch
import torchdata.nodes as tn

from components.data.bad import BadSample, Note, Noted, Refused, attempt, name_of, usable
from components.data.endless import Shuffled, Streamed
from components.data.nodes import MicroBatches, Mix, Packed, Stream
from components.losses import RangePositions, coefficients, positions_by_range
from components.maskers import FixedCountMasker, LowDiscrepancyTimes, Masker, NextToken
from components.noise import sample_rng
from components.sequences import INSTRUCT, TASKS, TokenSequence, collate, content, find_task, response_sequence
from components.tokenizers import Tokenizer
from components.types import Batch, Movable, NoisyBatch
from components.vocabulary import Vocabulary
from mdm.config import UserError, check, instantiate
from mdm.processor import Processor
from mdm.protocols import conforming, require_members, source_members

ON_LONG = ("refuse", "skip", "cut")
MASKER_SUPPLIED = ("mask_id", "modalities", "seed")
"""What a run hands to its maskers."""


@dataclass
class StreamSettings:
    """One entry of a config's `data`.

    train, validation: `_component_` nodes of sources; validation may be absent, train where nothing is trained
    weight:  share in the mix: rows among the sum of all weights
    tasks:   share of each task among its samples
    pack:    row length for running text; absent for pairs, which stand on canvases
    masker:  `_component_` node of what masks its rows in training; absent, the run's `masker`
    on_long: what becomes of a sample that does not fit its canvas: "refuse" ends the run, "skip" leaves it out, "cut" shortens
             its text or speech to the canvas, without an end token. A sample that is left out or cut is counted
    """

    tasks: dict[str, float]
    weight: int = 1
    train: dict[str, Any] | None = None
    validation: dict[str, Any] | None = None
    pack: int | None = None
    masker: dict[str, Any] | None = None
    on_long: str = "refuse"


@dataclass
class BatchSettings:
    """Sequences of an optimizer step; an anti-masking pair is two.

    logical:  where the optimizer's settings were tuned
    physical: of a step as it runs, over all processes; null is logical
    micro:    of one forward pass of one process, at the most; a larger physical is a multiple of micro x processes
    ramp:     share of the horizon -> the physical batch from there on
    """

    logical: int
    micro: int
    physical: int | None = None
    ramp: dict[float, int] = field(default_factory=dict)

    def at(self, progress: float) -> int:
        """The physical batch after a share of the horizon."""
        begun = [share for share in self.ramp if share <= progress]
        return self.ramp[max(begun)] if begun else self.physical or self.logical

    def validate(self, processes: int) -> None:
        """Raises UserError."""
        for key in ("logical", "physical", "micro"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"batch.{key} must be at least 1, got {value}")
        for share in self.ramp:
            if not 0 < share < 1:
                raise UserError(f"batch.ramp: {share} is not a share of the horizon in (0, 1)")
        first = "physical" if self.physical else "logical"
        for key, size in {first: self.at(0.0), **{f"ramp.{share}": size for share, size in self.ramp.items()}}.items():
            own = size // processes
            if size < 1 or size % processes or (own > self.micro and own % self.micro):
                ranks = f" x {processes} processes" if processes > 1 else ""
                raise UserError(f"batch.{key} = {size} must be a multiple of batch.micro = {self.micro}{ranks} (or smaller)")


@dataclass
class LossSettings:
    """See `components.losses.coefficients`."""

    weighting: str = "nelbo"
    reduction: str = "sequence"


@dataclass(frozen=True)
class MicroBatch(Movable):
    """What one forward and backward pass needs. All of it is made on the CPU: nothing has to be counted on the device."""

    noisy: NoisyBatch
    positions: list[RangePositions]
    denominator: float
    num_tokens: int
    whole_rows: bool  # every row is one document and no padding, by its stream: attention needs no mask
    content: list[int]  # tokens per id range, each canvas up to its first end token: what bits per token count
    notes: Sequence[Note] = ()  # of the samples that were left out of its rows or cut


def micro_batch(
    batch: Batch,
    masker: Masker,
    settings: LossSettings,
    vocabulary: Vocabulary,
    packed: bool = False,
    notes: Sequence[Note] = (),
) -> MicroBatch:
    """Masks a batch and gathers what its loss will need.

    packed: rows may hold several documents; then attention always has a mask, also where by chance it needs none, so that
            one compiled graph serves the stream
    """
    noisy = masker(batch)
    coefficient, denominator = coefficients(noisy, settings.weighting, settings.reduction)
    ranges = batch.id_range[content(batch, vocabulary.end_id)]
    return MicroBatch(
        noisy=noisy,
        positions=positions_by_range(batch.tokens, noisy.mask, batch.id_range, coefficient, noisy.weight, vocabulary),
        denominator=denominator,
        num_tokens=batch.num_tokens,
        whole_rows=not packed and batch.one_document_per_row,
        content=torch.bincount(ranges, minlength=len(vocabulary.ranges)).tolist(),
        notes=notes,
    )


def check_streams(data: Mapping[str, StreamSettings]) -> None:
    """Names, weights, tasks and sources of a config's `data`, before anything is built. Raises UserError."""
    if not data:
        raise UserError("data: name at least one source")
    for name, s in data.items():
        if s.weight < 1:
            raise UserError(f"data.{name}.weight must be at least 1, got {s.weight}")
        if not s.tasks:
            raise UserError(f"data.{name}.tasks: name at least one of {', '.join(TASKS)}")
        for task, share in s.tasks.items():
            if task not in (*TASKS, INSTRUCT):
                raise UserError(f"data.{name}.tasks: {task!r} is not one of {', '.join((*TASKS, INSTRUCT))}")
            if share < 0 or sum(s.tasks.values()) <= 0:
                raise UserError(f"data.{name}.tasks.{task}: shares are at least 0, not all of them 0; got {share}")
        if INSTRUCT in s.tasks and len(s.tasks) > 1:
            raise UserError(f"data.{name}.tasks: {INSTRUCT} stands alone; give other tasks an entry of their own")
        if ("text" in s.tasks) != (s.pack is not None) or ("text" in s.tasks and len(s.tasks) > 1):
            raise UserError(f"data.{name}: `pack` (a row length) goes with the one task `text`, and that task with `pack`")
        if s.on_long not in ON_LONG:
            raise UserError(f"data.{name}.on_long: {s.on_long!r} is not one of {', '.join(ON_LONG)}")
        if s.pack is not None and s.on_long != "refuse":
            raise UserError(f"data.{name}.on_long: packed text has no canvas, and a long text goes on in the next row")
        if s.train is None:
            raise UserError(f"data.{name}.train: no source; write _component_: components.data... (see mdm cp pretrain)")
        check(s.train, f"data.{name}.train")
        if s.validation is not None:
            check(s.validation, f"data.{name}.validation")
        if s.masker is not None:
            check(s.masker, f"data.{name}.masker", supplied=MASKER_SUPPLIED)


def row_length(stream: StreamSettings, task: str, canvas: Mapping[str, int | None]) -> int:
    """Positions of a row: of the pack, or of a pair's canvases with their boundaries and the task's token."""
    if stream.pack is not None:
        return stream.pack
    return 1 + sum((canvas.get(m) or 0) + 2 for m in TASKS[task].given + TASKS[task].generated)


def check_tasks(
    data: Mapping[str, StreamSettings], tokenizers: Mapping[str, Any], canvas: Mapping[str, int], max_length: int
) -> None:
    """Every task has its tokenizers and canvases, and every row fits the model. Raises UserError."""
    for name, s in data.items():
        if s.pack is not None and s.pack > max_length:
            raise UserError(f"data.{name}.pack = {s.pack} is longer than the model: model.max_length is {max_length}")
        for task in s.tasks if INSTRUCT not in s.tasks else ():  # its rows have the length of their prompt
            used = TASKS[task].given + TASKS[task].generated
            for modality in used:
                if modality not in tokenizers:
                    raise UserError(
                        f"task {task} of data.{name} needs tokenizers.{modality}; there are {', '.join(tokenizers)}"
                    )
                if s.pack is None and modality not in canvas:
                    raise UserError(f"task {task} of data.{name} needs canvas.{modality}, its length in tokens")
            if s.pack is None:
                length = row_length(s, task, canvas)
                if length > max_length:
                    parts = ", ".join(f"{m} {canvas[m]}" for m in used)
                    raise UserError(
                        f"task {task} of data.{name} takes {length} positions (canvases: {parts}; and boundaries); "
                        f"model.max_length is {max_length}"
                    )


def check_data(data: Mapping[str, StreamSettings], masker: Mapping[str, Any], loss: LossSettings, batch: BatchSettings) -> None:
    """All of a run's settings that are about its batches, before anything is built. Raises UserError."""
    check_streams(data)
    check(masker, "masker", supplied=MASKER_SUPPLIED)
    batch.validate(int(os.environ.get("WORLD_SIZE", 1)))
    for key, known in (("weighting", ("nelbo", "plain")), ("reduction", ("sequence", "token"))):
        if getattr(loss, key) not in known:
            raise UserError(f"loss.{key}: {getattr(loss, key)!r} is not one of {', '.join(known)}")


def open_source(node: Mapping[str, Any], key: str, endless: bool = False) -> Any:
    """The source of a node. endless: it is trained on. Raises UserError where it is none, or empty."""
    source = instantiate(node, key)
    require_members(source, node, key, source_members(source, endless))
    if hasattr(source, "__len__") and len(source) == 0:
        raise UserError(f"{key}: the dataset is empty ({', '.join(f'{k}={v}' for k, v in node.items())})")
    return source


def corpus(sources: Mapping[str, Any], limit: int = 20_000_000) -> Iterator[str]:
    """The text of all sources, up to `limit` characters: what a tokenizer is trained on."""
    seen = 0
    for source in sources.values():
        for sample in usable(source):
            if isinstance(sample.get("text"), str):
                yield sample["text"]
                seen += len(sample["text"])
            if seen > limit:
                return


def maskers(
    data: Mapping[str, StreamSettings], default: Mapping[str, Any], processor: Processor, seed: int
) -> dict[str, Masker]:
    """What masks each stream's rows: its own masker, or that of the node `default`."""
    supplied = dict(zip(MASKER_SUPPLIED, (processor.vocabulary.mask_id, processor.vocabulary.modalities, seed), strict=True))

    of_run = conforming(default, "masker", Masker, **supplied)
    masked = {name: s.masker for name, s in data.items() if s.masker is not None}
    own = {name: conforming(node, f"data.{name}.masker", Masker, **supplied) for name, node in masked.items()}
    return {name: own.get(name, of_run) for name in data}


def tokenizers(nodes: Mapping[str, Mapping[str, Any]], texts: Callable[[], Iterator[str]]) -> dict[str, Tokenizer]:
    """The tokenizers of a config by modality, some of them trained. texts: what they are trained on, from its beginning"""
    return {m: conforming(node, f"tokenizers.{m}", Tokenizer, corpus=texts()) for m, node in nodes.items()}


def streams(
    data: Mapping[str, StreamSettings],
    sources: Mapping[str, Any],
    processor: Processor,
    masker: Mapping[str, Masker],
    seed: int,
    prompt_dropout: float,
    max_length: int | None = None,
) -> list[Stream]:
    """The streams of the mix. Samples that lie in memory are tokenized once, the others when they are drawn.

    max_length: of a row; null sets no limit

    Raises ValueError for samples in memory that end the run: where one is refused, or none can be used.
    """
    built = []
    for k, (name, settings) in enumerate(data.items()):
        check_codebooks(name, sources[name], processor)
        build = builder(name, settings, processor, prompt_dropout, max_length)
        node, pairs = _endless(sources[name], seed + k, build.prepare, f"data.{name}"), masker[name].pairs
        if settings.pack is not None:
            overhead = settings.pack - processor.text_room(settings.pack)
            node = Packed(node, processor.text_sequence, settings.pack, overhead)
        built.append(Stream(name, node, settings.weight, build, settings.pack, pairs))
    return built


def check_codebooks(name: str, source: Any, processor: Processor) -> None:
    """Raises ValueError where token shards are of other tokenizers than the run's."""
    for modality, sizes in getattr(source, "codebooks", {}).items():
        own = processor.tokenizers.get(modality)
        if own is not None and tuple(own.codebooks) != sizes:
            raise ValueError(
                f"data.{name}: the token shards' {modality} has codebooks of {sizes}, tokenizers.{modality} of "
                f"{own.codebooks}; "
                "take the tokenizer from the shards (mdm.processor.saved_tokenizer)"
            )


def _endless(source: Any, seed: int, prepare: Callable[[Any], Any], key: str) -> tn.BaseNode:
    """The node of a source."""
    if not hasattr(source, "__len__"):
        return Streamed(source, seed, prepare=prepare)
    if not isinstance(source, list):
        return Shuffled(source, seed, prepare)
    try:
        samples = [attempt(lambda s=s: s, prepare, name_of(source, i)) for i, s in enumerate(source)]
    except Refused as error:
        raise ValueError(f"{key}: {error}") from error
    if all(isinstance(s, BadSample) for s in samples):
        raise ValueError(f"{key}: none of its samples can be used; the first is {samples[0]}")
    return Shuffled(samples, seed)


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

    def fit(self, modality: str, ids: torch.Tensor, ends: bool = False) -> tuple[torch.Tensor, list[Note]]:
        """The ids as they go onto the canvas, and a note where they were cut.

        ends: an end token has to follow it; none follows what was cut, which goes on

        Raises Refused, or ValueError for one to be left out.
        """
        room = self.processor.canvas.get(modality)
        may_end = self.processor.vocabulary.ranges[self.processor.vocabulary.ranges_of(modality)[0]].may_end
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

    def prepare(self, sample: Mapping[str, Any]) -> torch.Tensor:
        """The ids of a document with its end token."""
        _part(sample, "text")
        return self.processor.text_document(sample)

    def __call__(self, prepared: list[TokenSequence], rng: np.random.Generator) -> list[TokenSequence]:
        return prepared


@dataclass(frozen=True)
class PairBuilder:
    """A pair of modalities -> its sequence, of a task drawn by share, its prompt dropped with probability `prompt_dropout`."""

    fitting: OnLong
    tasks: Mapping[str, float]
    prompt_dropout: float

    def prepare(self, sample: Mapping[str, Any]) -> dict[str, torch.Tensor] | Noted:
        """The ids of all that the tasks need, each as it goes onto its canvas."""
        encoded = self.fitting.processor.encode_sample(sample)
        parts = {m: _part(encoded, m) for t in self.tasks for m in find_task(t).given + find_task(t).generated}
        fits = {m: self.fitting.fit(m, ids) for m, ids in parts.items()}
        parts, notes = {m: ids for m, (ids, _) in fits.items()}, [note for _, own in fits.values() for note in own]
        return Noted(parts, notes) if notes else parts

    def __call__(self, prepared: Mapping[str, torch.Tensor], rng: np.random.Generator) -> list[TokenSequence]:
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

    def prepare(self, sample: Mapping[str, Any]) -> dict[str, torch.Tensor] | Noted:
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

    def __call__(self, prepared: Mapping[str, torch.Tensor], rng: np.random.Generator) -> list[TokenSequence]:
        processor, drop = self.fitting.processor, rng.random() < self.prompt_dropout
        prompt, text, length = prepared["prompt"], prepared["text"], processor.canvas.get("text")
        ends = length is None or len(text) < length
        return [response_sequence(processor.vocabulary, prompt, text, length, drop, ends)]


def training_loader(
    built: Sequence[Stream],
    masker: Mapping[str, Masker],
    processor: Processor,
    physical: Callable[[int], int],
    micro: int,
    loss: LossSettings,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    prefetch: int = 2,
) -> tn.Loader:
    """An endless loader of optimizer steps (lists of micro-batches), with `state_dict` / `load_state_dict`.

    physical: tokens seen -> sequences of the next step, over all ranks
    micro:    sequences of one forward pass of one rank at the most
    prefetch: steps made ahead by a thread; 0: none, in the caller's own
    """
    vocabulary = processor.vocabulary
    node = MicroBatches(Mix(built, seed), physical, micro, vocabulary.pad_id, rank, world_size)
    packed = {s.name: s.length is not None for s in built}
    node = tn.Mapper(
        node, lambda batches: [micro_batch(b, masker[n], loss, vocabulary, packed[n], notes) for n, b, notes in batches]
    )
    return tn.Loader(tn.Prefetcher(node, prefetch) if prefetch else node)


def next_step(steps: Iterator[list[MicroBatch]]) -> list[MicroBatch]:
    """The next optimizer step of a loader. Raises UserError for a sample that cannot be used, found when it is drawn."""
    try:
        return next(steps)
    except ValueError as error:  # raised in the prefetching thread, whose traceback comes along in the text
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error


FORWARD_TASKS = ("text", "text_to_image", "text_to_speech")


def validation_batches(
    data: Mapping[str, StreamSettings],
    sources: Mapping[str, Any],
    processor: Processor,
    samples: int,
    batch_size: int = 64,
    repeats: int = 1,
    seed: int = 0,
    autoregressive: bool = False,
) -> dict[str, list[tuple[MicroBatch, int]]]:
    """Per task, masked batches of held-out samples and their content tokens (up to the first end token).

    The masks are of a fixed count, their times low-discrepancy over all samples and the same at every call: what is
    evaluated is the NELBO, and two models see the same noise. No prompt is dropped; a sample that cannot be used is left out,
    and all others keep their noise. The first of a source's forward tasks is evaluated: text, or image or speech given text.

    Raises ValueError where a sample is refused, or none of a source can be used.

    autoregressive: nothing is masked, every token predicted: what is evaluated is the negative log-likelihood of a baseline
    """
    plan: dict[str, list[tuple[MicroBatch, int]]] = {}
    for name, source in sources.items():
        task = next((t for t in data[name].tasks if t in FORWARD_TASKS), next(iter(data[name].tasks)))
        rows = _validation_rows(name, source, task, processor, data[name], samples) * repeats
        fixed = FixedCountMasker(processor.vocabulary.mask_id, LowDiscrepancyTimes(len(rows)), seed=seed)
        masker = NextToken() if autoregressive else fixed
        batches = []
        for start in range(0, len(rows), batch_size):
            part = [(i, row) for i, row in enumerate(rows[start : start + batch_size], start) if row is not None]
            if not part:
                continue
            batch = collate([[row] for _, row in part], [[i] for i, _ in part], processor.vocabulary.pad_id)
            micro = micro_batch(batch, masker, LossSettings(reduction="token"), processor.vocabulary)
            batches.append((micro, int(content(batch, processor.vocabulary.end_id).sum())))
        plan[task] = plan.get(task, []) + batches
    return plan


def fitting(name: str, source: Any, processor: Processor, settings: StreamSettings) -> Iterator[Any]:
    """The samples of a stream's source, as they are, that can be used and are no longer than their canvases."""
    prepare = builder(name, replace(settings, on_long="skip"), processor).prepare
    for sample in usable(source):
        if not isinstance(attempt(lambda s=sample: s, prepare, ""), BadSample):
            yield sample


def _validation_rows(
    name: str, source: Any, task: str, processor: Processor, settings: StreamSettings, samples: int
) -> list[TokenSequence | None]:
    """The first `samples` rows of a source, in an order shuffled once; None is that of a pair that cannot be used.

    Raises ValueError where a sample is refused, or none can be used.
    """
    key = f"data.{name}.validation"
    if not hasattr(source, "__len__"):
        source = list(itertools.islice(source, samples))
    order = sample_rng(0, "order", 0).permutation(len(source))[:samples].tolist()
    build = builder(name, replace(settings, tasks={task: 1.0}), processor)
    bad: list[BadSample] = []

    def prepared(index: int) -> Any:
        try:
            made = attempt(lambda: source[index], build.prepare, name_of(source, index))
        except Refused as error:
            raise ValueError(f"{key}: {error}") from error
        if isinstance(made, BadSample):
            bad.append(made)
            return None
        return made.sample if isinstance(made, Noted) else made

    items = (prepared(i) for i in order)
    if settings.pack is None:
        rows = [None if item is None else build(item, sample_rng(0, "task", i))[0] for i, item in enumerate(items)]
    else:
        pieces = (piece for d in items if d is not None for piece in d.split(processor.text_room(settings.pack)))
        rows = [processor.text_sequence(piece) for piece in itertools.islice(pieces, samples)]
    if all(row is None for row in rows):
        raise ValueError(f"{key}: none of its samples can be used" + (f"; the first is {bad[0]}" if bad else ""))
    if bad and os.environ.get("RANK", "0") == "0":
        print(f"{key}: {len(bad)} of the samples are left out, the first is {bad[0]}")
    return rows
