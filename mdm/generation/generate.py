"""Generation pipelines: prompts in, strings, PIL images and waveforms out.

outputs = generate(model, processor, "text_to_image", [{"text": "a handwritten seven"}]).outputs
outputs[0]["image"].save("seven.png")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.samplers import Blocks, FillAfterEnd, Sampler, SamplerState, guided, sample
from components.samplers.any_noise.start import pure_noise
from components.samplers.guidance import Scale
from components.sequences import TokenSequence, collate
from components.tasks import find_task, name_of
from components.types import Batch
from components.vocabulary import Vocabulary
from components.weightings import Noise, Noises
from mdm.config.errors import said
from mdm.data.processor import Processor
from mdm.generation.canvas import CACHES, CachedSlotLogits, Canvas, OnCanvas, SlotLogits, local_ids
from mdm.generation.defaults import Defaults
from mdm.generation.editing import Edit
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
    cache: str = "off",
    refresh_every: int | None = None,
    stop_at_end: bool = True,
    forbid: Sequence[int] = (),
    film: bool = False,
    progress: Callable[[int], object] | None = None,
    watch: Callable[[Step, Batch], None] | None = None,
) -> Generated:
    """Generates one sample for each prompt. A sample depends on (seed, its place among the prompts), not on the batch size.

    prompts:  raw parts by modality, e.g. `{"text": "a handwritten seven"}`; `{}` where a task is given nothing. What is
              generated may be an `Edit` (see mdm/generation/editing.py): then a part of it is given
    sampler, guidance_scale: None takes the defaults of the modality (mdm/generation/defaults.yaml)
    length:   tokens of the generated canvas, see `Processor.stretched`; None takes the processor's
    cache:    off, prefix or dual: keys and values kept while a block is decoded; the sampler has to be `Blocks`
    refresh_every: steps after which a kept cache is computed anew; None is once a block
    stop_at_end: fill what lies behind an end token at once
    forbid:   global ids that may not be generated
    film:     keep the canvas of every step of the first batch
    progress: called with the number of prompts done;  watch: called with every step

    Raises ValueError where a prompt lacks what its task is given, or does not fit its canvas or the model, and for settings
    that do not go together.
    """
    spec = find_task(task)
    task = name_of(spec)
    check_settings(task, prompts, batch_size, cache, sampler)
    noise = Noises.of(model.config.noise, processor.vocabulary.modalities)
    if sampler is None or guidance_scale is None:  # else there is no file to read
        defaults = Defaults.packaged().of(task, processor.vocabulary.modalities, model.config.noise)
        sampler = sampler or defaults.sampler
        guidance_scale = (defaults.guidance_scale if spec.given else 0.0) if guidance_scale is None else guidance_scale
    check_noise(spec.generated, model.config.noise, cache, guidance_scale)
    canvas = processor.stretched(task, length)
    if task == "text" and length is None and any(isinstance(p.get("text"), Edit) for p in prompts):
        canvas.pop("text", None)  # running text has no canvas: what is edited has its own length
    vocabulary = processor.vocabulary
    device = model.embedding.weight.device
    model.eval()
    given = prepare(processor, task, prompts, canvas)
    if given.batch.tokens.shape[1] > model.config.max_length:
        raise ValueError(f"{task}: {given.batch.tokens.shape[1]} positions, but the model has {model.config.max_length}")
    results, steps = [], []
    for start in range(0, len(prompts), batch_size):
        batch, prompt, fill = given.rows(start, start + batch_size)
        allowed = allowed_ids(vocabulary, batch, fill, forbid)
        ids = local_ids(allowed[fill], vocabulary.mask_id)
        slots = Canvas.of(batch.tokens, fill, ids).to(device)
        unguided = isinstance(guidance_scale, (int, float)) and guidance_scale == 0
        logits_fn = SlotLogits.of(model, slots, batch, copies=1 if unguided else 2)
        if cache != "off":
            assert isinstance(sampler, Blocks)  # `check_settings` has seen to it
            logits_fn = CachedSlotLogits.around(logits_fn, cache, sampler.block_length, refresh_every)
        logits_fn = guided(logits_fn, prompt.to(device), vocabulary.mask_id, guidance_scale, fill.to(device))

        def on_step(state: SamplerState, start: int = start, slots: Canvas = slots, batch: Batch = batch) -> None:
            step = Step(slots.whole(state.tokens).cpu(), slots.spread(state.confidence).cpu())
            if film and start == 0:
                steps.append(step)
            if watch is not None:
                watch(step, batch)

        masks, own = torch.full_like(slots.index, len(ids) - 1), slots.take(batch.modality.to(device))
        may_stand, rows = slots.take(allowed[..., ids].to(device)), range(start, start + len(prompt))
        if film or watch is not None:
            before = SamplerState.start(masks, slots.slots, len(ids) - 1, own, noise)
            on_step(pure_noise(before, may_stand, seed, rows))
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
            index=rows,
            on_step=on_step if film or watch is not None else None,
            noise=noise,
        )
        results.append((slots.whole(done.tokens).cpu(), slots.spread(done.confidence).cpu(), done.forwards))
        if progress is not None:
            progress(len(prompt))
    tokens, confidence, forwards = (torch.cat(parts) for parts in zip(*results, strict=True))
    outputs = [decode(processor, given.batch, tokens, row) for row in range(len(tokens))]
    return Generated(outputs, tokens, confidence, forwards, given.batch, steps)


def check_settings(task: str, prompts: Sequence[Any], batch_size: int, cache: str, sampler: Sampler | None) -> None:
    """Raises ValueError for settings that make no sense, or do not go together."""
    if not prompts:
        raise ValueError(f"{task}: there is no prompt; a task that is given nothing takes one {{}} for each sample")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if cache not in CACHES:
        raise ValueError(f"cache {cache!r} is not one of {', '.join(CACHES)}")
    if cache != "off" and not isinstance(sampler, Blocks):
        raise ValueError(f"cache {cache!r} keeps what lies outside a block: the sampler has to be Blocks")
    if cache != "off" and isinstance(sampler, Blocks) and getattr(sampler.sampler, "goes_on", False):
        raise ValueError(
            f"cache {cache!r} tells a row's block by its first mask, and {type(sampler.sampler).__name__} may go on in a block "
            "without any; set cache=off"
        )


def check_noise(generated: Sequence[str], noise: Mapping[str, Noise], cache: str, guidance_scale: Scale) -> None:
    """Raises ValueError for settings that count masks, where noise of other kinds leaves none or changes tokens again."""
    other = next((m for m in generated if m in noise), None)
    if other is None:
        return
    if cache != "off":
        raise ValueError(
            f"cache {cache!r} keeps what lies outside a block, and the model's {other}, trained with {noise[other].kernel}, "
            "may change there again; set cache=off"
        )
    if callable(guidance_scale):
        raise ValueError(
            f"guidance_scale changes with the share of masked tokens, and the model's {other} was trained with "
            f"{noise[other].kernel}, whose tokens are not told by it; give a number"
        )


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
