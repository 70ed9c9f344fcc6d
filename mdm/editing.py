"""Any-order editing: a part of a text, an image or a clip is generated anew, the rest is given and stays to the token.

    infill(processor, "the [mask:2] statement")        text, two tokens of it
    inpaint(processor, image, (4, 0, 8, 8))            an image, a box of it in pixels: left, top, right, bottom
    respeak(processor, audio, 0.1, 0.3)                a clip, a span of it in seconds

An `Edit` stands in a prompt where the modality that is generated would: {"text": "a handwritten seven", "image": inpaint(...)}.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from PIL import Image
from torch import Tensor

from mdm.processor import Processor

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
    pieces, region, at = [], [], 0
    for gap in [*GAP.finditer(text), None]:
        piece = text[at : gap.start() if gap else len(text)]
        ids = processor.encode("text", piece) if piece else torch.zeros(0, dtype=torch.long)
        count = int(gap.group(1) or 1) if gap else 0
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
    tokens = processor.encode("image", image)
    return Edit(tokens, (rows[:, None] & columns).flatten())


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
    tokens = processor.encode("audio", audio)
    books = len(tokenizer.codebooks)
    frame = seconds / (len(tokens) // books)
    begins = torch.arange(len(tokens)) // books * frame
    region = begins + frame > start
    if stop is not None:
        region &= begins < stop
    return Edit(tokens, region, open_end=stop is None)


def checked(edit: Edit, message: str) -> Edit:
    if not bool(edit.region.any()):
        raise ValueError(message)
    return edit


def require(processor: Processor, modality: str) -> Any:
    """The tokenizer of a modality. Raises ValueError where the model has none."""
    if modality not in processor.tokenizers:
        raise ValueError(f"edit: the model has no {modality}, only {', '.join(processor.tokenizers)}")
    return processor.tokenizers[modality]
