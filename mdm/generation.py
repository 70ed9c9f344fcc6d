"""Generation pipelines: prompts in, strings, PIL images and waveforms out.

outputs = generate(model, processor, "text_to_image", [{"text": "a handwritten seven"}])
outputs[0]["image"].save("seven.png")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from components.samplers import FirstHitting, Sampler, guided, sample
from components.sequences import collate, find_task, task_sequence
from components.types import Batch
from mdm.model import MaskedDiffusionModel
from mdm.processor import Processor


@dataclass(frozen=True)
class Generated:
    """tokens: the finished rows; batch: what was given; frames: the canvas after each step, where a film was asked for."""

    outputs: list[dict[str, Any]]
    tokens: Int[Tensor, "batch seq"]
    batch: Batch
    frames: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def generate(
    model: MaskedDiffusionModel,
    processor: Processor,
    task: str,
    prompts: Sequence[Mapping[str, Any]],
    sampler: Sampler | None = None,
    guidance_scale: float = 0.0,
    seed: int = 0,
    batch_size: int = 100,
    length: int | None = None,
    film: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Generated:
    """Generates one sample for each prompt.

    sampler:  None is first-hitting with top_p 0.9: exact but for the nucleus, one token a forward pass
    prompts:  raw parts by modality, e.g. `{"text": "a handwritten seven"}`; `{}` where a task is given nothing
    length:   tokens of a text canvas; None takes the processor's
    progress: called with the number of prompts done

    Raises ValueError where a prompt lacks what its task is given, or does not fit its canvas or the model.
    """
    sampler = sampler or FirstHitting(top_p=0.9)
    spec = find_task(task)
    canvas = {**processor.canvas, **({"text": length} if length and "text" in spec.generated else {})}
    vocabulary = processor.vocabulary
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    model.eval()
    outputs, rows, batches, frames = [], [], [], []
    for start in range(0, len(prompts), batch_size):
        sequences = [
            task_sequence(vocabulary, task, {m: processor.encode(m, p[m]) for m in spec.given if m in p}, canvas)
            for p in prompts[start : start + batch_size]
        ]
        batch = collate([[s] for s in sequences], [[start + i] for i in range(len(sequences))], vocabulary.pad_id)
        if batch.tokens.shape[1] > model.config.max_length:
            raise ValueError(f"{task}: {batch.tokens.shape[1]} positions, but the model has {model.config.max_length}")
        batch = batch.to(device)
        prompt = torch.stack([s.prompt for s in sequences]).to(device)
        logits_fn = guided(lambda tokens: model(tokens).float(), prompt, vocabulary.mask_id, guidance_scale)
        tokens = sample(
            sampler,
            logits_fn,
            batch.tokens,
            vocabulary.mask_id,
            generate=batch.maskable,
            allowed=vocabulary.allowed(batch.id_range),
            generator=generator,
            on_step=(lambda state: frames.append(state.tokens.cpu())) if film else None,
        )
        outputs += [decode(processor, batch, tokens, row) for row in range(len(tokens))]
        rows.append(tokens.cpu())
        batches.append(batch.to("cpu"))
        if progress is not None:
            progress(len(sequences))
    whole = Batch(*(torch.cat([getattr(b, name) for b in batches]) for name in Batch.__dataclass_fields__))
    return Generated(outputs, torch.cat(rows), whole, frames)


def decode(processor: Processor, batch: Batch, tokens: Int[Tensor, "batch seq"], row: int) -> dict[str, Any]:
    """What the generated canvases of a row hold, by modality."""
    decoded = {}
    for i, modality in enumerate(processor.vocabulary.modalities):
        own = batch.maskable[row] & (batch.modality[row] == i)
        if bool(own.any()):
            decoded[modality] = processor.decode(modality, tokens[row][own].cpu())
    return decoded
