"""NELBO per task and modality on held-out batches, with fixed-count masks: the bound itself, with finite variance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from components.losses import LossSums, bits_per_byte, bits_per_token, loss_from_hidden
from components.range_losses import range_cross_entropy
from components.tasks import INSTRUCT, find_task
from components.types import Batch
from components.visibility import Places
from components.vocabulary import Vocabulary
from components.weightings import Noise
from mdm.config import UserError
from mdm.data.pipeline import MicroBatch
from mdm.data.processor import Processor
from mdm.data.settings import StreamSettings
from mdm.data.validation import fitting, shown_task
from mdm.evaluation.order_loss import order_loss
from mdm.generation.generate import generate
from mdm.hardware import Hardware, local, reshard
from mdm.models.transformer import MaskedDiffusionModel
from mdm.pages.media import save_outputs

MAX_LOGITS = 2**27  # held at once


def forward_loss(model: MaskedDiffusionModel, micro: MicroBatch, vocabulary: Vocabulary, hw: Hardware) -> LossSums:
    """Hidden states of the noisy tokens, and the loss at the masked ones: the whole of a training step's forward pass."""
    with hw.autocast():
        if micro.noisy.arrivals is not None:
            return order_loss(model, micro, vocabulary)
        hidden = hidden_of(model, micro)
        return loss_from_hidden(hidden, local(model.unembedding.weight), micro.positions, vocabulary)


def hidden_of(model: MaskedDiffusionModel, micro: MicroBatch) -> Float[Tensor, "batch width hidden"]:
    """Hidden states of what a micro-batch shows the model: its noisy tokens; of blocks, the doubled rows."""
    if micro.rows is not None:
        return model.hidden(micro.rows.tokens, model.sees(micro.rows.places, last=micro.rows.content), micro.rows.position)
    clean = micro.noisy.clean
    mask = None if micro.whole_rows else model.sees(Places(clean.document, clean.position))
    return model.hidden(micro.noisy.noisy, mask, clean.position)


@torch.no_grad()
def weighted_nats(
    model: MaskedDiffusionModel, micro: MicroBatch, vocabulary: Vocabulary, hw: Hardware
) -> Float[Tensor, "batch seq"]:
    """What each position of a batch under masks adds to its bound, in nats."""
    with hw.autocast():
        flat, unembedding = hidden_of(model, micro).flatten(0, 1), local(model.unembedding.weight)
        found = torch.zeros(len(flat), device=flat.device)
        for p in micro.positions:
            own = vocabulary.ranges[p.range_index]
            nats = range_cross_entropy(
                flat[p.index], unembedding, p.target, own, vocabulary.end_id, vocabulary.mask_id, MAX_LOGITS
            )
            found.index_add_(0, p.index, (p.weight * nats).float())
    if micro.rows is None:
        return found.view_as(micro.noisy.weight)
    column = micro.rows.column[:, : micro.noisy.mask.shape[1]]
    return torch.where(micro.noisy.mask, found.view_as(micro.rows.tokens).gather(1, column.clamp(min=0)), 0.0)


@torch.no_grad()
def nelbo(
    model: MaskedDiffusionModel,
    plan: Mapping[str, Sequence[tuple[MicroBatch, int]]],
    vocabulary: Vocabulary,
    hw: Hardware,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, float]:
    """NELBO of each task of a `validation_batches` plan, summed over its canvases, in nats."""
    model.eval()
    nats = {}
    for task, batches in plan.items():
        total = torch.zeros((), device=hw.device)
        for micro, _ in batches:
            total += forward_loss(model, micro.to(hw.device), vocabulary, hw).nelbo.sum()
            if progress is not None:
                progress(1)
        nats[task] = total.item()
    reshard(model, hw)
    model.train()
    return nats


def bound_name(task: str, noise: Mapping[str, Noise], learned_order: bool = False) -> str:
    """What the bound of a task is called: of other noise than masks by its kernel, and where orders are learned, since bounds
    of different processes are not comparable by their tightness."""
    generated = ("text",) if task == INSTRUCT else find_task(task).generated
    kernels = sorted({noise[m].to_dict()["kernel"] for m in generated if m in noise})
    return "_".join([task, *kernels, *(["learned_order"] if learned_order else [])])


def bound_figures(
    nats: Mapping[str, float],
    plan: Mapping[str, Sequence[tuple[MicroBatch, int]]],
    processor: Processor,
    noise: Mapping[str, Noise],
) -> dict[str, float]:
    """Bits per token of each task, and of text per byte too. Raises UserError for a bound that is not finite."""
    found = {}
    learned = any(micro.noisy.arrivals is not None for batches in plan.values() for micro, _ in batches)
    for task, value in task_bits(nats, plan).items():
        if not math.isfinite(value):
            raise UserError(f"the NELBO of {task} is {value}: broken weights, or an overflow")
        found[f"{bound_name(task, noise, learned)}_bits_per_token"] = value
    if "text" in plan:
        texts, name = [micro.noisy.clean for micro, _ in plan["text"]], bound_name("text", noise, learned)
        found["text_unigram_bits_per_token"] = unigram_bits(texts)
        found[f"{name}_exp_nelbo"] = 2 ** found[f"{name}_bits_per_token"]
        found[f"{name}_bits_per_byte"] = bits_per_byte(nats["text"], num_bytes(texts, processor))
    return found


def task_bits(nats: Mapping[str, float], plan: Mapping[str, Sequence[tuple[MicroBatch, int]]]) -> dict[str, float]:
    """Bits per token of each task: the NELBO of whole canvases over the tokens of their content."""
    return {task: bits_per_token(nats[task], sum(tokens for _, tokens in batches)) for task, batches in plan.items()}


def unigram_bits(batches: Sequence[Batch]) -> float:
    """Entropy of the maskable tokens' own frequencies, in bits per token: what a model without context could reach."""
    counts = torch.bincount(torch.cat([b.tokens[b.maskable] for b in batches])).double()
    p = counts[counts > 0] / counts.sum()
    return float(-(p * p.log2()).sum())


def num_bytes(batches: Sequence[Batch], processor: Processor) -> int:
    """Bytes of the text in the batches."""
    end = processor.vocabulary.end_id
    codes = [processor.vocabulary.to_codes("text", b.tokens[b.maskable & (b.tokens != end)]) for b in batches]
    tokenizer: Any = processor.tokenizers["text"]  # one of text counts bytes too
    return sum(tokenizer.num_bytes(c) for c in codes)


def write_samples(
    folder: Path,
    model: MaskedDiffusionModel,
    processor: Processor,
    data: Mapping[str, StreamSettings],
    held_out: Mapping[str, Any],
    hw: Hardware,
    count: int = 8,
) -> None:
    """A few samples of the task that shows each stream, from the prompts of held-out samples that fit, into folder/TASK/.

    Raises UserError, e.g. for logits that are not finite.
    """
    for name, shown in held_out.items():
        task = shown_task(data[name].tasks)
        if task == INSTRUCT:
            continue
        pack = data[name].pack
        fits = fitting(name, shown, processor, replace(data[name], tasks={task: 1.0}))
        prompts = [{m: s[m] for m in find_task(task).given} for _, s in zip(range(count), fits, strict=False)]
        if not prompts:
            continue
        with hw.autocast():
            try:
                made = generate(model, processor, task, prompts, length=None if pack is None else processor.text_room(pack))
            except ValueError as error:
                raise UserError(f"samples of {task} cannot be made: {error}") from error
        model.train()
        reshard(model, hw)
        if hw.main:
            save_outputs(folder / task, processor, prompts, made.outputs)
