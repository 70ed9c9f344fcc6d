"""The data pipeline of a run, from its settings: sources -> tokens -> mix -> micro-batches -> masks, ready for a step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torchdata.nodes as tn

from components.data.nodes import MicroBatches, Mix, Packed, Shuffled, Stream, Streamed
from components.losses import RangePositions, coefficients, positions_by_range
from components.maskers import FixedCountMasker, LowDiscrepancyTimes, Masker, NextToken
from components.noise import sample_rng
from components.sequences import INSTRUCT, TASKS, TokenSequence, collate, content, find_task
from components.tokenizers import Tokenizer
from components.types import Batch, Movable, NoisyBatch
from mdm.config import UserError, check, instantiate
from mdm.processor import Processor
from mdm.protocols import conforming, require_members, source_members

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
    """

    tasks: dict[str, float]
    weight: int = 1
    train: dict[str, Any] | None = None
    validation: dict[str, Any] | None = None
    pack: int | None = None
    masker: dict[str, Any] | None = None


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
    maskable: list[int]  # maskable positions per id range, the NELBO's denominators


def micro_batch(batch: Batch, masker: Masker, settings: LossSettings, num_ranges: int, packed: bool = False) -> MicroBatch:
    """Masks a batch and gathers what its loss will need.

    packed: rows may hold several documents; then attention always has a mask, also where by chance it needs none, so that
            one compiled graph serves the stream
    """
    noisy = masker(batch)
    coefficient, denominator = coefficients(noisy, settings.weighting, settings.reduction)
    ranges = batch.id_range[batch.maskable]
    return MicroBatch(
        noisy=noisy,
        positions=positions_by_range(batch.tokens, noisy.mask, batch.id_range, coefficient, noisy.weight),
        denominator=denominator,
        num_tokens=batch.num_tokens,
        whole_rows=not packed and batch.one_document_per_row,
        maskable=torch.bincount(ranges, minlength=num_ranges).tolist(),
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
        for sample in source:
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
) -> list[Stream]:
    """The streams of the mix. Samples that lie in memory are tokenized once, the others when they are drawn."""
    built = []
    for k, (name, settings) in enumerate(data.items()):
        source = sources[name]
        check_codebooks(name, source, processor)
        in_memory, pairs = isinstance(source, list), masker[name].pairs
        if settings.pack is not None:
            node = _endless([processor.text_document(s) for s in source] if in_memory else source, seed + k)
            ids = (lambda document: document) if in_memory else processor.text_document
            packed = Packed(
                node, ids, processor.text_sequence, settings.pack, settings.pack - processor.text_room(settings.pack)
            )
            built.append(Stream(name, packed, settings.weight, lambda row, rng: row, settings.pack, pairs))
        elif INSTRUCT in settings.tasks:
            build = ResponseBuilder(name, processor, prompt_dropout)
            built.append(Stream(name, _endless(source, seed + k), settings.weight, build, pairs=pairs))
        else:
            build = PairBuilder(name, processor, settings.tasks, prompt_dropout, encode=not in_memory)
            samples = [build.checked(processor.encode_sample(s)) for s in source] if in_memory else source
            built.append(Stream(name, _endless(samples, seed + k), settings.weight, build, pairs=pairs))
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


def _endless(samples: Any, seed: int) -> tn.BaseNode:
    return Shuffled(samples, seed) if hasattr(samples, "__len__") else Streamed(samples, seed)


@dataclass(frozen=True)
class PairBuilder:
    """A pair of modalities -> its sequence, of a task drawn by share, its prompt dropped with probability `prompt_dropout`."""

    name: str
    processor: Processor
    tasks: Mapping[str, float]
    prompt_dropout: float
    encode: bool

    def checked(self, parts: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The parts, if each task finds all it needs, no longer than its canvas. Raises ValueError."""
        for modality in {m: None for t in self.tasks for m in find_task(t).given + find_task(t).generated}:
            if modality not in parts:
                raise ValueError(f"data.{self.name}: a sample has no {modality}; it has {', '.join(parts) or 'nothing'}")
            if len(parts[modality]) > self.processor.canvas[modality]:
                raise ValueError(
                    f"data.{self.name}: a sample's {modality} of {len(parts[modality])} tokens does not fit canvas.{modality} "
                    f"= {self.processor.canvas[modality]}"
                )
        return parts

    def __call__(self, sample: Mapping[str, Any], rng: np.random.Generator) -> list[TokenSequence]:
        parts = self.checked(self.processor.encode_sample(sample)) if self.encode else sample
        shares = np.array(list(self.tasks.values()), dtype=float)
        task = list(self.tasks)[int(rng.choice(len(shares), p=shares / shares.sum()))]
        drop = bool(find_task(task).given) and rng.random() < self.prompt_dropout
        return [self.processor.sequence(task, parts, drop)]


@dataclass(frozen=True)
class ResponseBuilder:
    """A prompt and a response -> running text of which only the response is masked; see `components.sequences`."""

    name: str
    processor: Processor
    prompt_dropout: float

    def __call__(self, sample: Mapping[str, Any], rng: np.random.Generator) -> list[TokenSequence]:
        for part in ("prompt", "text"):
            if part not in sample:
                raise ValueError(f"data.{self.name}: a sample has no {part}; it has {', '.join(sample) or 'nothing'}")
        try:
            return [self.processor.response(sample, rng.random() < self.prompt_dropout)]
        except ValueError as error:
            raise ValueError(f"data.{self.name}: {error}") from error


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
    num_ranges = len(processor.vocabulary.ranges)
    node = MicroBatches(Mix(built, seed), physical, micro, processor.vocabulary.pad_id, rank, world_size)
    packed = {s.name: s.length is not None for s in built}
    node = tn.Mapper(node, lambda batches: [micro_batch(b, masker[n], loss, num_ranges, packed[n]) for n, b in batches])
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
    evaluated is the NELBO, and two models see the same noise. Nothing is dropped. The first of a source's forward tasks is
    evaluated: text, or image or speech given text.

    autoregressive: nothing is masked, every token predicted: what is evaluated is the negative log-likelihood of a baseline
    """
    plan: dict[str, list[tuple[MicroBatch, int]]] = {}
    for name, source in sources.items():
        task = next((t for t in data[name].tasks if t in FORWARD_TASKS), next(iter(data[name].tasks)))
        rows = _validation_rows(source, task, processor, data[name].pack, samples) * repeats
        fixed = FixedCountMasker(processor.vocabulary.mask_id, LowDiscrepancyTimes(len(rows)), seed=seed)
        masker = NextToken() if autoregressive else fixed
        batches = []
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            batch = collate([[r] for r in part], [[start + i] for i in range(len(part))], processor.vocabulary.pad_id)
            micro = micro_batch(batch, masker, LossSettings(reduction="token"), len(processor.vocabulary.ranges))
            batches.append((micro, int(content(batch, processor.vocabulary.end_id).sum())))
        plan[task] = plan.get(task, []) + batches
    return plan


def _validation_rows(source: Any, task: str, processor: Processor, pack: int | None, samples: int) -> list[TokenSequence]:
    """The first `samples` rows of a source, in an order shuffled once."""
    if not hasattr(source, "__len__"):
        source = [s for _, s in zip(range(samples), source, strict=False)]
    order = sample_rng(0, "order", 0).permutation(len(source))[:samples]
    chosen = (source[int(i)] for i in order)
    if task == INSTRUCT:
        return [processor.response(s) for s in chosen]
    if pack is None:
        return [processor.sequence(task, processor.encode_sample(s)) for s in chosen]
    pieces = (piece for s in chosen for piece in processor.text_document(s).split(processor.text_room(pack)))
    return [processor.text_sequence(piece) for _, piece in zip(range(samples), pieces, strict=False)]
