"""Generation pipelines: prompts in, strings, PIL images and waveforms out.

outputs = generate(model, processor, "text_to_image", [{"text": "a handwritten seven"}]).outputs
outputs[0]["image"].save("seven.png")
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.block_diffusion.decoding import Finished
from components.orders import given_ranks
from components.samplers import Blocks, FillAfterEnd, InOrder, Sampler, SamplerState, guided, sample
from components.samplers.any_noise.start import pure_noise
from components.samplers.base import Sampled
from components.samplers.guidance import Scale
from components.sequences import TokenSequence, collate
from components.tasks import find_task, name_of
from components.types import Batch
from components.vocabulary import Vocabulary
from components.weightings import Noises
from mdm.config.errors import said
from mdm.data.processor import Processor
from mdm.generation.any_order import TwoStreamLogits
from mdm.generation.blockwise import block_samplers, sample_in_blocks
from mdm.generation.canvas import CachedSlotLogits, Canvas, OnCanvas, SlotLogits, local_ids
from mdm.generation.checks import check_noise, check_settings
from mdm.generation.defaults import Defaults
from mdm.generation.editing import Edit
from mdm.generation.rates import LogRates
from mdm.models.transformer import MaskedDiffusionModel


@dataclass(frozen=True)
class Step:
    """The canvas of a batch before the first step, or after one: tokens, and the confidence each was drawn with."""

    tokens: Int[Tensor, "batch seq"]
    confidence: Float[Tensor, "batch seq"]


@dataclass(frozen=True)
class Generated:
    """outputs:  by modality, what each sample's generated canvases hold
    tokens:      the finished rows;  confidence: the probability each generated token had when it was drawn
    forwards:    forward passes that each sample took
    batch:       what was given;  steps: the first batch before, and after every step, where a film was asked for
    """

    outputs: list[dict[str, Any]]
    tokens: Int[Tensor, "batch seq"]
    confidence: Float[Tensor, "batch seq"]
    forwards: Int[Tensor, " batch"]
    batch: Batch
    steps: list[Step] = field(default_factory=list)


@dataclass(frozen=True)
class Streamed:
    """What has been finished of a canvas.

    place: of the prompt;  tokens: of the canvas so far;  last: whether all that the prompt asks for is finished
    """

    place: int
    modality: str
    tokens: Int[Tensor, " n"]
    last: bool


@dataclass(frozen=True)
class Given:
    """A batch ready to be sampled. prompt: what guidance leaves out; generate: the positions to fill."""

    batch: Batch
    prompt: Bool[Tensor, "batch seq"]
    generate: Bool[Tensor, "batch seq"]

    def rows(self, start: int, stop: int) -> tuple[Batch, Tensor, Tensor]:
        """Some of the rows: the batch, the prompt and what to fill."""
        return self.batch.select(slice(start, stop)), self.prompt[start:stop], self.generate[start:stop]


@torch.no_grad()
def generate(
    model: MaskedDiffusionModel,
    processor: Processor,
    task: str,
    prompts: Sequence[Mapping[str, Any]],
    sampler: Sampler | None = None,
    guidance_scale: Scale | None = None,
    seed: int = 0,
    batch_size: int = 100,
    length: int | None = None,
    cache: str = "auto",
    refresh_every: int | None = None,
    stop_at_end: bool = True,
    forbid: Sequence[int] = (),
    film: bool = False,
    progress: Callable[[int], object] | None = None,
    watch: Callable[[Step, Batch], None] | None = None,
    stream: Callable[[Streamed], None] | None = None,
) -> Generated:
    """Generates one sample for each prompt. A sample depends on (seed, its place among the prompts), not on the batch size.

    prompts:  raw parts by modality, e.g. `{"text": "a handwritten seven"}`; `{}` where a task is given nothing. What is
              generated may be an `Edit` (see mdm/generation/editing.py): then a part of it is given
    sampler, guidance_scale: None takes the defaults of the modality (mdm/generation/defaults.yaml)
    length:   tokens of the generated canvas, see `Processor.stretched`; None takes the processor's
    cache:    keys and values kept between passes. Of blocks and two streams: exact (auto) or off. Of others: off (auto),
              or prefix or dual, which approximate while a block is decoded: the sampler has to be `Blocks`
    refresh_every: steps after which a kept cache is computed anew; None is once a block
    stop_at_end: fill what lies behind an end token at once
    forbid:   global ids that may not be generated
    film:     keep the canvas of every step of the first batch
    progress: called with the number of prompts done;  watch: called with every step
    stream:   of a model of blocks, called as soon as a block is finished

    Raises ValueError where a prompt lacks what its task is given, or does not fit its canvas or the model, and for settings
    that do not go together.
    """
    spec = find_task(task)
    task = name_of(spec)
    cache = check_settings(task, prompts, batch_size, cache, sampler, guidance_scale, model.config)
    if sampler is None or guidance_scale is None:  # else there is no file to read
        own = (processor.vocabulary.modalities, model.config.noise, model.config.learned_orders)
        defaults = Defaults.packaged().of(task, *own)
        sampler = sampler or defaults.sampler
        guidance_scale = (defaults.guidance_scale if spec.given else 0.0) if guidance_scale is None else guidance_scale
    check_noise(spec.generated, model.config.noise, cache, guidance_scale)
    canvas = processor.stretched(task, length)
    if task == "text" and length is None and any(isinstance(p.get("text"), Edit) for p in prompts):
        canvas.pop("text", None)  # running text has no canvas: what is edited has its own length
    vocabulary = processor.vocabulary
    if (unknown := next((i for i in forbid if not 0 <= i < vocabulary.size), None)) is not None:
        raise ValueError(f"forbid: {unknown} is none of the {vocabulary.size} ids")
    model.eval()
    given = prepare(processor, task, prompts, canvas)
    if given.batch.tokens.shape[1] > model.config.max_length and not model.config.blocks:
        raise ValueError(f"{task}: {given.batch.tokens.shape[1]} positions, but the model has {model.config.max_length}")
    results, steps = [], []
    for start in range(0, len(prompts), batch_size):
        batch, prompt, fill = given.rows(start, start + batch_size)

        def on_step(
            tokens: Int[Tensor, "rows seq"], confidence: Float[Tensor, "rows seq"], start: int = start, batch: Batch = batch
        ) -> None:
            step = Step(tokens.cpu(), confidence.cpu())
            if film and start == 0:
                steps.append(step)
            if watch is not None:
                watch(step, batch)

        rows, seen = range(start, start + len(prompt)), on_step if film or watch is not None else None
        if model.config.blocks:
            each = block_samplers(sampler, model.config.blocks, vocabulary.modalities, spec.generated)
            assert isinstance(guidance_scale, (int, float))  # `check_blocks` has seen to it
            done = sample_in_blocks(
                model, vocabulary, batch, prompt, fill, ~closed(batch, fill, vocabulary.end_id),
                each, guidance_scale, cache == "exact", forbid, stop_at_end, seed=seed, index=rows, on_step=seen,
                on_block=None if stream is None else functools.partial(_streamed, stream, start, batch, vocabulary),
            )  # fmt: skip
        else:
            allowed = allowed_ids(vocabulary, batch, fill, forbid)
            done = sample_on_canvas(
                model, vocabulary, batch, prompt, fill, allowed, sampler, guidance_scale, cache, refresh_every, stop_at_end,
                seed, rows, seen,
            )  # fmt: skip
        results.append([part.cpu() for part in done])
        if progress is not None:
            progress(len(prompt))
    tokens, confidence, forwards = (torch.cat(parts) for parts in zip(*results, strict=True))
    outputs = [decode(processor, given.batch, tokens, row) for row in range(len(tokens))]
    return Generated(outputs, tokens, confidence, forwards, given.batch, steps)


def sample_on_canvas(
    model: MaskedDiffusionModel,
    vocabulary: Vocabulary,
    batch: Batch,
    prompt: Bool[Tensor, "rows seq"],
    fill: Bool[Tensor, "rows seq"],
    allowed: Bool[Tensor, "rows seq vocab"],
    sampler: Sampler,
    guidance_scale: Scale,
    cache: str,
    refresh_every: int | None,
    stop_at_end: bool,
    seed: int,
    index: Sequence[int],
    on_step: Callable[[Tensor, Tensor], None] | None = None,
) -> Sampled:
    """Fills the positions `fill` of a batch (on the CPU) with a model that sees whole rows: tokens and confidence of these."""
    device, noise = model.embedding.weight.device, Noises.of(model.config.noise, vocabulary.modalities)
    ids = local_ids(allowed[fill], vocabulary.mask_id)
    slots = Canvas.of(batch.tokens, fill, ids).to(device)
    unguided = isinstance(guidance_scale, (int, float)) and guidance_scale == 0
    logits_fn = SlotLogits.of(model, slots, batch, copies=1 if unguided else 2)
    masks, own = torch.full_like(slots.index, len(ids) - 1), slots.take(batch.modality.to(device))
    if model.order is not None:
        logits_fn = LogRates.around(logits_fn, batch, vocabulary)
    if model.config.two_streams:
        fixed = sampler.ranks(slots.slots, own, seed, index) if isinstance(sampler, InOrder) else None
        given = given_ranks(fill.numpy(), batch.modality.numpy(), batch.document.numpy())
        copies = 1 if unguided else 2
        turn, given = None if fixed is None else fixed.repeat(copies, 1), torch.from_numpy(given).to(device).repeat(copies, 1)
        logits_fn = TwoStreamLogits.around(logits_fn, vocabulary.mask_id, cache == "exact", given, turn)
    elif cache != "off":
        assert isinstance(sampler, Blocks)  # `check_settings` has seen to it
        logits_fn = CachedSlotLogits.around(logits_fn, cache, sampler.block_length, refresh_every)
    logits_fn = guided(logits_fn, prompt.to(device), vocabulary.mask_id, guidance_scale, fill.to(device))
    may_stand = slots.take(allowed[..., ids].to(device))

    def seen(state: SamplerState) -> None:
        if on_step is not None:
            on_step(slots.whole(state.tokens), slots.spread(state.confidence))

    if on_step is not None:
        seen(pure_noise(SamplerState.start(masks, slots.slots, len(ids) - 1, own, noise), may_stand, seed, index))
    done = sample(
        sampler,
        OnCanvas(slots, logits_fn),
        masks,
        mask_id=len(ids) - 1,
        generate=slots.slots,
        allowed=may_stand,
        modality=own,
        constraint=local_end(ids, vocabulary.end_id) if stop_at_end else None,
        seed=seed,
        index=index,
        on_step=None if on_step is None else seen,
        noise=noise,
    )
    return Sampled(slots.whole(done.tokens), slots.spread(done.confidence), done.forwards)


def _streamed(
    stream: Callable[[Streamed], None], first: int, batch: Batch, vocabulary: Vocabulary, tokens: Tensor, block: Finished
) -> None:
    """Hands over what a canvas holds as far as its blocks are finished."""
    row, inside = block.row, slice(block.start, block.stop)
    modality = int(batch.modality[row, inside][batch.maskable[row, inside]][0])  # a block may begin with what is given
    own = batch.maskable[row] & (batch.modality[row] == modality)
    own[block.stop :] &= block.last
    stream(Streamed(first + row, vocabulary.modalities[modality], tokens[row].cpu()[own], block.last))


def prepare(processor: Processor, task: str, prompts: Sequence[Mapping[str, Any]], canvas: Mapping[str, int]) -> Given:
    """The sequences of the prompts as a batch on the CPU."""
    spec = find_task(task)
    sequences: list[TokenSequence] = []
    regions: list[Tensor] = []
    for prompt in prompts:
        edits = {m: prompt[m] for m in spec.generated if isinstance(prompt.get(m), Edit)}
        parts = {m: processor.encode(m, prompt[m]) for m in spec.given if m in prompt}
        parts |= {m: edit.tokens for m, edit in edits.items()}
        sequence = processor.sequence(task, parts, canvas=canvas)
        region = sequence.maskable.clone()
        for m, edit in edits.items():
            own = ((sequence.modality == processor.vocabulary.modalities.index(m)) & sequence.maskable).nonzero()[:, 0]
            region[own] = edit.on_canvas(len(own))
        sequences.append(sequence)
        regions.append(region)
    batch = collate([[s] for s in sequences], [[i] for i in range(len(sequences))], processor.vocabulary.pad_id)
    length = batch.tokens.shape[1]
    padded = [
        torch.stack([torch.nn.functional.pad(flag, (0, length - len(flag))) for flag in flags])
        for flags in ([s.prompt for s in sequences], regions)
    ]
    return Given(batch, *padded)


def allowed_ids(
    vocabulary: Vocabulary, batch: Batch, generate: Bool[Tensor, "batch seq"], forbid: Sequence[int]
) -> Bool[Tensor, "batch seq vocab"]:
    """What may stand at each position: its id range, an end token only where nothing given lies behind."""
    allowed = vocabulary.allowed(batch.id_range)
    allowed[..., vocabulary.end_id] &= ~closed(batch, generate, vocabulary.end_id)
    allowed[..., list(forbid)] = False
    return allowed


def closed(batch: Batch, generate: Bool[Tensor, "batch seq"], end_id: int) -> Bool[Tensor, "batch seq"]:
    """Positions to fill that lie before given content of their canvas: no end token may stand there."""
    content = batch.maskable & ~generate & (batch.tokens != end_id)
    out = torch.zeros_like(generate)
    for modality in batch.modality.unique().tolist():
        own = content & (batch.modality == modality)
        later = own.flip(1).long().cumsum(dim=1).flip(1) - own.long()
        out |= generate & (batch.modality == modality) & (later > 0)
    return out


def local_end(ids: Int[Tensor, " ids"], end_id: int) -> FillAfterEnd | None:
    """The constraint in local ids; None where no end token may stand."""
    where = (ids == end_id).nonzero()[:, 0].tolist()
    return FillAfterEnd(where[0]) if where else None


def decode(processor: Processor, batch: Batch, tokens: Int[Tensor, "batch seq"], row: int) -> dict[str, Any]:
    """What the generated canvases of a row hold, by modality. Raises ValueError where a tokenizer fails on one."""
    decoded = {}
    for i, modality in enumerate(processor.vocabulary.modalities):
        own = batch.maskable[row] & (batch.modality[row] == i)
        if bool(own.any()):
            try:
                decoded[modality] = processor.decode(modality, tokens[row][own].cpu())
            except Exception as error:
                raise ValueError(f"{modality} cannot be decoded: {said(error)}") from error
    return decoded
