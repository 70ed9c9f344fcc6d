"""Any-order editing: a part of a sample is generated anew, the rest is given and stays to the token.

    edit(processor, "image", image, "16,0,32,32")         a box of an image in pixels: left, top, right, bottom
    edit(processor, "audio", audio, "0.1-0.3")         a span of a clip in seconds; "0.1-" goes on to a new end
    infill(processor, "the [mask:2] statement")        text, two tokens of it

What a part of a sample is, and how it is named, its tokenizer knows (`region`, see components/tokenizers/modality.py). A
learned tokenizer's codes tell of their neighbourhood, so what is generated anew is blanked before it is encoded: whatever was
there, the codes that stay are the same.

An `Edit` stands in a prompt where the modality that is generated would: {"text": "a handwritten seven", "image": edit(...)}.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from components.tokenizers import Tokenizer, modality
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


def edit(processor: Processor, name: str, raw: Any, where: str) -> Edit:
    """A sample of the modality `name`, of which the part that `where` names is generated anew.

    Raises ValueError where the tokenizer finds no such part, or knows of none.
    """
    return of_region(processor, name, modality.region(require(processor, name), raw, where, name))


def second_half(processor: Processor, name: str, raw: Any) -> Edit:
    """A sample whose second half is generated anew."""
    return of_region(processor, name, modality.second_half(require(processor, name), raw))


def of_region(processor: Processor, name: str, part: modality.Region) -> Edit:
    """The part of a sample in tokens. Raises ValueError where it is of another number of codes than the sample."""
    tokens = processor.encode(name, part.raw)
    if len(part.codes) != len(tokens):
        raise ValueError(f"edit: the region of {name} is of {len(part.codes)} codes, and what it leaves has {len(tokens)}")
    return Edit(tokens, part.codes, part.open_end)


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
    found = Edit(torch.cat(pieces), torch.cat(region))
    if not bool(found.region.any()):
        raise ValueError(f"edit: {text!r} has no gap; write [mask], or [mask:5] for five tokens")
    return found


def require(processor: Processor, name: str) -> Tokenizer:
    """The tokenizer of a modality. Raises ValueError where the model has none."""
    if name not in processor.tokenizers:
        raise ValueError(f"edit: the model has no {name}, only {', '.join(processor.tokenizers)}")
    return processor.tokenizers[name]
