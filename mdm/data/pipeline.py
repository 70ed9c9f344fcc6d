"""The data pipeline of a run, from its settings: sources -> tokens -> mix -> micro-batches -> masks, ready for a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torchdata.nodes as tn

from components.data.bad import BadSample, Note, Refused, attempt, name_of, usable
from components.data.endless import Shuffled, Streamed
from components.data.nodes import MicroBatches, Mix, Node, Packed, Stream
from components.losses import RangePositions, coefficients, positions_by_range
from components.maskers import Masker
from components.sequences import content
from components.tasks import INSTRUCT
from components.tokenizers import Tokenizer
from components.types import Batch, Movable, NoisyBatch
from components.vocabulary import Vocabulary
from mdm.config import UserError, instantiate
from mdm.config.protocols import conforming, require_members, source_members
from mdm.data.processor import Processor
from mdm.data.rows import builder
from mdm.data.settings import MASKER_SUPPLIED, LossSettings, StreamSettings, lacking


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
    weighting = cast(Literal["nelbo", "plain"], settings.weighting)  # `check_data` has seen to both
    reduction = cast(Literal["sequence", "token"], settings.reduction)
    coefficient, denominator = coefficients(noisy, weighting, reduction)
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


def maskers(
    data: Mapping[str, StreamSettings], default: Mapping[str, Any], processor: Processor, seed: int
) -> dict[str, Masker]:
    """What masks each stream's rows: its own masker, or that of the node `default`."""
    supplied = dict(zip(MASKER_SUPPLIED, (processor.vocabulary.mask_id, processor.vocabulary.modalities, seed), strict=True))

    of_run = conforming(default, "masker", Masker, **supplied)
    masked = {name: s.masker for name, s in data.items() if s.masker is not None}
    own = {name: conforming(node, f"data.{name}.masker", Masker, **supplied) for name, node in masked.items()}
    return {name: own.get(name, of_run) for name in data}


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
) -> list[Stream]:
    """The streams of the mix. Samples that lie in memory are tokenized once, the others when they are drawn.

    max_length: of a row; null sets no limit

    Raises ValueError for a task whose modality has no tokenizer, and for samples in memory that end the run: where one is
    refused, or none can be used.
    """
    built = []
    for k, (name, settings) in enumerate(data.items()):
        why = next(filter(None, (lacking(t, name, processor.tokenizers) for t in settings.tasks if t != INSTRUCT)), None)
        if why is not None:
            raise ValueError(why)
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
                "take the tokenizer from the shards (mdm.data.processor.saved_tokenizer)"
            )


def _endless(source: Any, seed: int, prepare: Callable[[Any], Any], key: str) -> Node[Any]:
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
