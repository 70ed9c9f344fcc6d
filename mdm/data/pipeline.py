"""The data pipeline of a run, from its settings: sources -> tokens -> mix -> micro-batches -> masks, ready for a step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torchdata.nodes as tn

from components.block_diffusion.rows import DoubledRows, doubled_rows
from components.data.bad import BadSample, Note, Refused, attempt, name_of, usable
from components.data.draws.endless import Draws, Passing, Placed, Prepared, Streamed
from components.data.draws.order import ShardOrder, WholeOrder
from components.data.draws.workers import Workers
from components.data.nodes import Lanes, MicroBatches, Mix, Stream
from components.data.packing import Packed
from components.losses import RangePositions, coefficients, positions_by_range
from components.maskers import Masker, NextToken
from components.noise import seed_of
from components.sequences import content
from components.tasks import INSTRUCT
from components.tokenizers import Tokenizer
from components.types import PAD_DOCUMENT, Batch, Movable, NoisyBatch
from components.visibility import FINISHED, NOISY
from components.vocabulary import Vocabulary
from mdm.config import UserError, instantiate
from mdm.config.protocols import conforming, require_members, source_members
from mdm.data.processor import Processor
from mdm.data.rows import Builder, builder
from mdm.data.settings import LossSettings, StreamSettings, lacking, row_length

LANES = 64
BLOCK = 1000  # samples of a streamed source that are drawn from in random order, over all its lanes


@dataclass(frozen=True)
class MicroBatch(Movable):
    """What one forward and backward pass needs. All of it is made on the CPU: nothing has to be counted on the device."""

    noisy: NoisyBatch
    positions: list[RangePositions]
    denominator: float
    num_tokens: int
    num_rows: int  # but those of padding
    whole_rows: bool  # every row is one document and no padding, by its stream: attention needs no mask
    content: list[int]  # tokens per id range, each canvas up to its first end token: what bits per token count
    notes: Sequence[Note] = ()  # of the samples that were left out of its rows or cut
    rows: DoubledRows | None = None  # what a model of blocks is shown; the positions are in them


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
    positions, denominator = _positions(noisy, settings, vocabulary)
    rows = None
    if noisy.block is not None:
        rows = doubled_rows(noisy, next_token=bool(settings.next_token))
        positions = [replace(p, index=rows.index(p.index, NOISY)) for p in positions]
        if settings.next_token:
            positions += _next_token(batch, rows, settings, settings.next_token, vocabulary)
    ranges = batch.id_range[content(batch, vocabulary.end_id)]
    return MicroBatch(
        noisy=noisy,
        positions=positions,
        denominator=denominator,
        num_tokens=batch.num_tokens,
        num_rows=int((batch.document != PAD_DOCUMENT).any(dim=1).sum()),
        whole_rows=not packed and batch.one_document_per_row,
        content=torch.bincount(ranges, minlength=len(vocabulary.ranges)).tolist(),
        notes=notes,
        rows=rows,
    )


def _positions(noisy: NoisyBatch, settings: LossSettings, vocabulary: Vocabulary) -> tuple[list[RangePositions], float]:
    """What is predicted of a noisy batch, and the denominator of its loss."""
    weighting = cast(Literal["nelbo", "plain"], settings.weighting)  # `check_data` has seen to both
    reduction = cast(Literal["sequence", "token"], settings.reduction)
    coefficient, denominator = coefficients(noisy, weighting, reduction)
    clean = noisy.clean
    where = (clean.tokens, noisy.mask, clean.id_range, coefficient, noisy.weight, vocabulary)
    return positions_by_range(*where, replaced=noisy.replaced), denominator


def _next_token(
    batch: Batch, rows: DoubledRows, settings: LossSettings, weight: float, vocabulary: Vocabulary
) -> list[RangePositions]:
    """Each token but a document's first, predicted by the finished one before it; of no bound."""
    following = NextToken()(replace(batch, maskable=batch.maskable & (batch.position > 0)))
    positions, _ = _positions(following, settings, vocabulary)
    return [
        replace(
            p,
            index=rows.index(p.index - 1, FINISHED),
            coefficient=weight * p.coefficient,
            weight=torch.zeros_like(p.weight),
        )
        for p in positions
    ]


def open_source(node: Mapping[str, Any], key: str, endless: bool = False) -> Any:
    """The source of a node. endless: it is trained on. Raises UserError where it is none, or empty."""
    source = instantiate(node, key)
    require_members(source, node, key, source_members(source, endless))
    if hasattr(source, "__len__") and len(source) == 0:
        raise UserError(f"{key}: the dataset is empty ({', '.join(f'{k}={v}' for k, v in node.items())})")
    return source


def corpus(sources: Mapping[str, Any], modality: str, limit: int = 20_000_000) -> Iterator[str]:
    """The words that all sources have of a modality, up to `limit` characters: what its tokenizer is trained on."""
    seen = 0
    for source in sources.values():
        for sample in usable(source):
            if isinstance(sample.get(modality), str):
                yield sample[modality]
                seen += len(sample[modality])
            if seen > limit:
                return


def tokenizers(nodes: Mapping[str, Mapping[str, Any]], words: Callable[[str], Iterator[str]]) -> dict[str, Tokenizer]:
    """The tokenizers of a config by modality, some of them trained. words: of a modality, what its own is trained on"""
    return {m: conforming(node, f"tokenizers.{m}", Tokenizer, corpus=words(m)) for m, node in nodes.items()}


def streams(
    data: Mapping[str, StreamSettings],
    sources: Mapping[str, Any],
    processor: Processor,
    masker: Mapping[str, Masker],
    seed: int,
    prompt_dropout: float,
    max_length: int | None = None,
    lanes: int = LANES,
    workers: int = 0,
) -> list[Stream]:
    """The streams of the mix. Samples that lie in memory are tokenized once, the others when they are drawn.

    max_length: of a row; null sets no limit
    lanes:      of a stream whose rows come one after the other (`components.data.nodes.Lanes`)
    workers:    processes that read and tokenize samples; 0: whoever draws them does

    Raises ValueError for a task whose modality has no tokenizer, and for samples in memory that end the run: where one is
    refused, or none can be used.
    """
    built, pool = [], Workers(workers) if workers else None
    for name, settings in data.items():
        why = next(filter(None, (lacking(t, name, processor.tokenizers) for t in settings.tasks if t != INSTRUCT)), None)
        if why is not None:
            raise ValueError(why)
        check_codebooks(name, sources[name], processor)
        build = builder(name, settings, processor, prompt_dropout, max_length)
        own = seed_of(seed, name)
        rows = _rows(name, sources[name], settings, build, processor, own, lanes, pool)
        length = sum(share * row_length(settings, task, processor.canvas) for task, share in settings.tasks.items())
        average = length / sum(settings.tasks.values())
        built.append(Stream(name, rows, settings.weight, build, settings.pack, masker[name].pairs, own, average))
    if pool is not None and pool.needed:
        pool.start()
    return built


def check_codebooks(name: str, source: Any, processor: Processor) -> None:
    """Raises ValueError where token shards are of other tokenizers than the run's."""
    for modality, sizes in getattr(source, "codebooks", {}).items():
        own = processor.tokenizers.get(modality)
        if own is not None and tuple(own.codebooks) != sizes:
            raise ValueError(
                f"data.{name}: the token shards' {modality} has codebooks of {sizes}, tokenizers.{modality} of "
                f"{own.codebooks}; "
                "take the tokenizer from the shards (mdm.data.processor.saved_tokenizer)"
            )


def _rows(
    name: str,
    source: Any,
    settings: StreamSettings,
    build: Builder,
    processor: Processor,
    seed: int,
    lanes: int,
    workers: Workers | None,
) -> Placed | Lanes:
    """What the rows of a stream come from."""
    if not hasattr(source, "__len__"):
        lanes = min(lanes, getattr(source, "num_shards", 1)) if hasattr(source, "shard") else 1
        begin = None if workers is None else workers.rows(name, source, build.prepare)
        opened = functools.partial(_streamed, source, build.prepare, begin, seed, lanes)
    else:
        if settings.pack is not None and hasattr(source, "lazily"):
            source, workers = source.lazily(), None  # nothing to prepare: a span is read when its row is made
        prepared = _prepared(source, build.prepare, name, workers)
        few = getattr(source, "open_shards", None)
        order = WholeOrder(len(source), seed) if few is None else ShardOrder(source.shard_sizes, lanes, seed, few)
        if settings.pack is None:
            return Placed(prepared, order, None if few is None else lanes)
        opened = functools.partial(Draws, prepared, order, lanes)
    if settings.pack is None:
        return Lanes(lanes, lambda lane: Passing(opened(lane)))
    length, overhead = settings.pack, settings.pack - processor.text_room(settings.pack)
    return Lanes(
        lanes, lambda lane: Packed(opened(lane), processor.text_sequence, length, overhead, best_fit=settings.best_fit or 0)
    )


def _streamed(source: Any, prepare: Any, begin: Any, seed: int, lanes: int, lane: int) -> Streamed:
    """A lane of a source that is only iterated over: every lanes-th of its shards. Where those hold no sample (of files that
    were filtered, one may have none left), those of the next lane that do."""

    def part(lane: int) -> Any:
        return source.shard(lanes, lane % lanes) if lanes > 1 else source

    others = [functools.partial(part, lane + k) for k in range(1, lanes)]
    return Streamed(part(lane), seed + lane, max(BLOCK // lanes, 16), prepare, begin, others)


def _prepared(source: Any, prepare: Callable[[Any], Any], name: str, workers: Workers | None) -> Prepared:
    """The samples of an indexable source, tokenized; those that lie in memory at once."""
    if not isinstance(source, list):
        return Prepared(source, prepare) if workers is None else workers.prepared(name, source, prepare)
    try:
        samples = [attempt(lambda s=s: s, prepare, name_of(source, i)) for i, s in enumerate(source)]
    except Refused as error:
        raise ValueError(f"data.{name}: {error}") from error
    if all(isinstance(s, BadSample) for s in samples):
        raise ValueError(f"data.{name}: none of its samples can be used; the first is {samples[0]}")
    return Prepared(samples)


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

    physical: tokens seen -> sequences of the next step, over all ranks. A rank does not know how many tokens the others' rows
              have: it is asked with those that rows have on the average, full canvases and packs
    micro:    sequences of one forward pass of one rank at the most
    prefetch: steps made ahead by a thread; 0: none, in the caller's own
    """
    vocabulary = processor.vocabulary
    average = sum(s.weight * s.positions for s in built) / sum(s.weight for s in built)
    mix = Mix(built, seed)
    node = MicroBatches(mix, lambda rows: physical(int(rows * average)), micro, vocabulary.pad_id, rank, world_size)
    packed = {s.name: s.length is not None for s in built}
    step = cast(tn.BaseNode[list[tuple[str, Batch, list[Note]]]], node)  # which it is: torchdata says no types of its own
    node = tn.Mapper(
        step, lambda batches: [micro_batch(b, masker[n], loss, vocabulary, packed[n], notes) for n, b, notes in batches]
    )
    return tn.Loader(tn.Prefetcher(node, prefetch) if prefetch else node)


def next_step(steps: Iterator[list[MicroBatch]]) -> list[MicroBatch]:
    """The next optimizer step of a loader. Raises UserError for a sample that cannot be used, found when it is drawn."""
    try:
        return next(steps)
    except ValueError as error:  # raised in the prefetching thread, whose traceback comes along in the text
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
