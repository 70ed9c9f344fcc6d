"""Held-out samples as masked batches: the same noise at every call, so that two models are compared on the same masks."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from components.block_diffusion.masker import BlockMasker
from components.data.bad import BadSample, Noted, Refused, attempt, name_of, usable
from components.data.draws.order import WholeOrder
from components.learned_orders import LearnedOrderMasker
from components.maskers import FixedCountMasker, LowDiscrepancyTimes, NextToken
from components.noise import sample_rng
from components.orders import Order, OrderMasker, Permuted
from components.sequences import TokenSequence, collate, content
from components.tasks import INSTRUCT, find_task
from mdm.data.corruption import bound_corruption, layout_of
from mdm.data.pipeline import MicroBatch, micro_batch
from mdm.data.processor import Processor
from mdm.data.rows import builder
from mdm.data.settings import LossSettings, StreamSettings

IN_MEMORY = 2**20  # samples of which all are put in order at once


def shown_task(tasks: Iterable[str]) -> str:
    """The task that shows a stream: the first that generates one modality, given text or nothing; else the first."""
    named = list(tasks)
    spec = {task: find_task(task) for task in named if task != INSTRUCT}
    return next((t for t, s in spec.items() if len(s.generated) == 1 and set(s.given) <= {"text"}), named[0])


def validation_batches(
    data: Mapping[str, StreamSettings],
    sources: Mapping[str, Any],
    processor: Processor,
    samples: int,
    batch_size: int = 64,
    repeats: int = 1,
    seed: int = 0,
    autoregressive: bool = False,
    model: Any = None,
    order: Order | None = None,
) -> dict[str, list[tuple[MicroBatch, int]]]:
    """Per task, masked batches of held-out samples and their content tokens (up to the first end token).

    The masks are of a fixed count, their times low-discrepancy over all samples and the same at every call: what is
    evaluated is the NELBO, and two models see the same noise. No prompt is dropped; a sample that cannot be used is left out,
    and all others keep their noise. Of a source's tasks one is evaluated (`shown_task`).

    Raises ValueError where a sample is refused, or none of a source can be used.

    autoregressive: nothing is masked, every token predicted: what is evaluated is the negative log-likelihood of a baseline
    model:          its config. Of a task that generates a modality with other noise than masks it is that noise's own bound,
                    at low-discrepancy times; of blocks it is the sum of theirs, each given those before it; of learned orders
                    the counts are the same, and the model masks
    order:          of two streams: in which the likelihood is; None: a permutation for each sample, whose mean is the bound
    """
    plan: dict[str, list[tuple[MicroBatch, int]]] = {}
    noise, layout = (None, None) if model is None else (model.noise, layout_of(model, processor.vocabulary))
    for name, source in sources.items():
        task = shown_task(data[name].tasks)
        rows = _validation_rows(name, source, task, processor, data[name], samples) * repeats
        fixed = FixedCountMasker(processor.vocabulary.mask_id, LowDiscrepancyTimes(len(rows)), seed=seed)
        masker = NextToken() if autoregressive else fixed
        if model is not None and model.learned_orders:
            times = LowDiscrepancyTimes(len(rows))
            masker = LearnedOrderMasker(processor.vocabulary.mask_id, times, samples=1, seed=seed)
        if noise and set(noise) & set(find_task(task).generated if task != INSTRUCT else ("text",)):
            masker = bound_corruption(noise, processor.vocabulary, LowDiscrepancyTimes(len(rows)), seed)
        masker = masker if layout is None else BlockMasker(masker, layout)
        if model is not None and model.two_streams:
            masker = OrderMasker(processor.vocabulary.mask_id, order or Permuted(), seed)
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


def held_out_order(count: int, samples: int) -> list[int]:
    """Which `samples` of `count` are evaluated, in the order of their noise: the same at every call."""
    if count <= IN_MEMORY:  # as in every version, so that figures can be compared
        return sample_rng(0, "order", 0).permutation(count)[:samples].tolist()
    order = WholeOrder(count, 0)
    return [order(place) for place in range(min(samples, count))]


def _validation_rows(
    name: str, source: Any, task: str, processor: Processor, settings: StreamSettings, samples: int
) -> list[TokenSequence | None]:
    """The first `samples` rows of a source, in an order shuffled once; None is that of a pair that cannot be used.

    Raises ValueError where a sample is refused, or none can be used.
    """
    key = f"data.{name}.validation"
    if not hasattr(source, "__len__"):
        source = list(itertools.islice(source, samples))
    order = held_out_order(len(source), samples)
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
    rows: list[TokenSequence | None]
    if settings.pack is None:
        rows: list[TokenSequence | None] = [
            None if item is None else build(item, sample_rng(0, "task", i))[0] for i, item in enumerate(items)
        ]
    else:
        pieces = (piece for d in items if d is not None for piece in d.split(processor.text_room(settings.pack)))
        rows = [processor.text_sequence(piece) for piece in itertools.islice(pieces, samples)]
    if all(row is None for row in rows):
        raise ValueError(f"{key}: none of its samples can be used" + (f"; the first is {bad[0]}" if bad else ""))
    if bad and os.environ.get("RANK", "0") == "0":
        print(f"{key}: {len(bad)} of the samples are left out, the first is {bad[0]}")
    return rows
