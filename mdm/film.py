"""Pictures of the unmasking: which patches of an image are already drawn, step by step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from components.types import Batch
from mdm.processor import Processor

MASKED = (120, 170, 215)  # the colour of what is still masked


def frame(processor: Processor, batch: Batch, tokens: Int[Tensor, "batch seq"], scale: int = 6, gap: int = 4) -> Image.Image:
    """One step: the images of all rows side by side, masked patches in blue."""
    image_id = processor.vocabulary.modalities.index("image")
    tokenizer = processor.tokenizers["image"]
    pictures = []
    for row, canvas in enumerate(batch.modality == image_id):
        ids = tokens[row][canvas]
        masked = ids == processor.vocabulary.mask_id
        start = torch.full_like(ids, processor.vocabulary.ranges[processor.vocabulary.ranges_of("image")[0]].start)
        grey = np.asarray(processor.decode("image", torch.where(masked, start, ids)).convert("RGB")).copy()
        side = tokenizer.size // tokenizer.patch
        hidden = np.kron(masked.numpy().reshape(side, side), np.ones((tokenizer.patch, tokenizer.patch))).astype(bool)
        grey[hidden] = MASKED
        pictures.append(np.kron(grey, np.ones((scale, scale, 1), dtype=np.uint8)))
    height, width = pictures[0].shape[:2]
    strip = Image.new("RGB", (len(pictures) * (width + gap) + gap, height + 2 * gap), "white")
    for i, picture in enumerate(pictures):
        strip.paste(Image.fromarray(picture), (gap + i * (width + gap), gap))
    return strip


def strip(frames: Sequence[Image.Image]) -> Image.Image:
    """Frames below one another: time runs downwards."""
    width, height = frames[0].size
    whole = Image.new("RGB", (width, height * len(frames)), "white")
    for i, one in enumerate(frames):
        whole.paste(one, (0, i * height))
    return whole


def every_other(whole: Image.Image, steps: int) -> Image.Image:
    """Each second row of a strip of `steps` frames."""
    height = whole.height // steps
    return strip([whole.crop((0, i * height, whole.width, (i + 1) * height)) for i in range(0, steps, 2)])


def start_and_steps(batch: Batch, mask_id: int, steps: Sequence[Tensor]) -> list[Tensor]:
    """The canvas before the first step, all masked, and after each."""
    return [batch.tokens.masked_fill(batch.maskable, mask_id), *steps]
