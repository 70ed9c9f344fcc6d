"""Any-order editing: a part of a text, an image or a clip is generated anew, the rest is given and stays to the token.

    infill(processor, "the [mask:2] statement")        text, two tokens of it
    inpaint(processor, image, (4, 0, 8, 8))            an image, a box of it in pixels: left, top, right, bottom
    respeak(processor, audio, 0.1, 0.3)                a clip, a span of it in seconds

A learned tokenizer's codes tell of their neighbourhood, so what is generated anew is blanked before it is encoded: whatever was
there, the codes that stay are the same. The blank is silence, or the mean colour of the rest.

An `Edit` stands in a prompt where the modality that is generated would: {"text": "a handwritten seven", "image": inpaint(...)}.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from PIL import Image
from torch import Tensor

from mdm.data.processor import Processor

MOST = 2**20  # tokens of all gaps: far more than a model has positions, and no memory
GAP = re.compile(r"\[mask(?::(\d+))?\]")


@dataclass(frozen=True)
class Edit:
    """tokens: global ids of the whole; region: those that are generated anew; open_end: and all that may follow."""

    tokens: Int[Tensor, " n"]
    region: Bool[Tensor, " n"]
    open_end: bool = False

    def on_canvas(self, length: int) -> Bool[Tensor, " length"]:
        """The region on a canvas of that length; what fills it up behind the content is given, unless the end is open."""
        fill = torch.full((length - len(self.region),), self.open_end)
        return torch.cat([self.region, fill])


def infill(processor: Processor, text: str) -> Edit:
    """A text with gaps: `[mask]` is one token to generate, `[mask:5]` five. Raises ValueError where there is no gap."""
    require(processor, "text")
    pieces, region, at, left = [], [], 0, MOST
    for gap in [*GAP.finditer(text), None]:
        piece = text[at : gap.start() if gap else len(text)]
        ids = processor.encode("text", piece) if piece else torch.zeros(0, dtype=torch.long)
        count = int((gap.group(1) or "1")[:20]) if gap else 0
        left -= count
        if left < 0:
            raise ValueError(f"edit: its gaps have more than {MOST:,} tokens")
        pieces += [ids, torch.full((count,), processor.vocabulary.mask_id)]
        region += [torch.zeros(len(ids), dtype=torch.bool), torch.ones(count, dtype=torch.bool)]
        at = gap.end() if gap else at
    return checked(
        Edit(torch.cat(pieces), torch.cat(region)), f"edit: {text!r} has no gap; write [mask], or [mask:5] for five tokens"
    )


def inpaint(processor: Processor, image: Image.Image, box: tuple[int, int, int, int]) -> Edit:
    """An image of which the tokens that touch the box are drawn anew. Raises ValueError where the box is empty or outside."""
    tokenizer = require(processor, "image")
    left, top, right, bottom = box
    if not (0 <= left < right <= tokenizer.size and 0 <= top < bottom <= tokenizer.size):
        raise ValueError(f"region {box}: left, top, right, bottom in pixels, inside 0..{tokenizer.size}, and not empty")
    side, patch = tokenizer.size // tokenizer.patch, tokenizer.patch
    edge = torch.arange(side) * patch
    rows, columns = ((edge < high) & (edge + patch > low) for low, high in ((top, bottom), (left, right)))
    patches = rows[:, None] & columns
    tokens = processor.encode("image", blanked(image, np.kron(patches.numpy(), np.ones((patch, patch), dtype=bool))))
    return Edit(tokens, patches.flatten().repeat_interleave(len(tokenizer.codebooks)))


def blanked(image: Image.Image, hidden: Bool[np.ndarray, "height width"]) -> Image.Image:
    """The image with the mean colour of the rest where it is hidden, mid-grey where there is no rest."""
    if image.mode not in ("L", "RGB"):
        raise ValueError(f"edit: an image of mode {image.mode}; it can be L or RGB")
    if image.size != hidden.shape[::-1]:
        return image  # the tokenizer refuses it
    levels = np.array(image)
    levels[hidden] = 128 if hidden.all() else np.rint(levels[~hidden].mean(axis=0))
    return Image.fromarray(levels)


def respeak(processor: Processor, audio: Any, start: float, stop: float | None = None) -> Edit:
    """A clip of which the frames that touch start .. stop (seconds) are spoken anew; without `stop`, to an end of its own.

    Raises ValueError where the span is empty or outside the clip.
    """
    tokenizer = require(processor, "audio")
    seconds = len(audio) / tokenizer.sample_rate
    if not 0 <= start < (seconds if stop is None else min(stop, seconds)):
        raise ValueError(
            f"region {start}-{'' if stop is None else stop}: start-stop in seconds, inside 0-{seconds:.2f}, not empty"
        )
    if not hasattr(tokenizer, "frame_samples"):
        raise ValueError(f"edit: {type(tokenizer).__name__} does not say how many frame_samples it has")
    per_frame, rate = tokenizer.frame_samples, tokenizer.sample_rate
    first = min(round(start * rate), len(audio) - 1) // per_frame
    end = None if stop is None else max(math.ceil(round(stop * rate) / per_frame), first + 1)
    silenced = np.array(audio)
    silenced[first * per_frame : None if end is None else end * per_frame] = 0
    tokens = processor.encode("audio", silenced)
    frame = frames_of(tokenizer, len(tokens))
    region = frame >= first
    if end is not None:
        region &= frame < end
    return Edit(tokens, region, open_end=end is None)


def frames_of(tokenizer: Any, length: int) -> Int[Tensor, " length"]:
    """The frame of each code of a clip; a tokenizer says it itself where its codes do not come frame by frame."""
    if hasattr(tokenizer, "frames_of"):
        return tokenizer.frames_of(length)
    return torch.arange(length) // len(tokenizer.codebooks)


def checked(edit: Edit, message: str) -> Edit:
    if not bool(edit.region.any()):
        raise ValueError(message)
    return edit


def require(processor: Processor, modality: str) -> Any:
    """The tokenizer of a modality. Raises ValueError where the model has none."""
    if modality not in processor.tokenizers:
        raise ValueError(f"edit: the model has no {modality}, only {', '.join(processor.tokenizers)}")
    return processor.tokenizers[modality]
