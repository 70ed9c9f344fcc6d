"""Which block each position is of.

A canvas (a run of one modality) in which anything is generated falls into blocks of its modality's size, the last as long as is
left; a prompt that it begins with is counted too, so that a text goes on as it was trained. All else that is given, between two
such canvases, is one block. Counted `from_start`, blocks take no notice of canvases (LLaDA2, SDAR).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from components.types import STRUCTURE, Batch

WHOLE = 2**40  # the size of a block that has no end


@dataclass(frozen=True)
class Layout:
    """sizes: positions of a block, by modality; a modality without one is one block, however long. modalities: their names

    Raises ValueError for a size below 1 or of no modality, and where blocks that are counted from the start have several sizes.
    """

    sizes: Mapping[str, int]
    modalities: Sequence[str]
    from_start: bool = False

    def __post_init__(self) -> None:
        for modality, size in self.sizes.items():
            if modality not in self.modalities:
                raise ValueError(f"blocks.{modality}: there is no such modality; there are {', '.join(self.modalities)}")
            if size < 1:
                raise ValueError(f"blocks.{modality} must be at least 1, got {size}")
        if self.from_start and len(set(self.sizes.values())) != 1:
            raise ValueError(f"blocks that are counted from the start have one size; got {dict(self.sizes)}")

    def __call__(self, batch: Batch) -> Int[Tensor, "batch seq"]:
        """The block of each position, from 0 in each document."""
        if self.from_start:
            return batch.position // next(iter(self.sizes.values()))
        size = torch.tensor([*(self.sizes.get(m, WHOLE) for m in self.modalities), WHOLE], device=batch.tokens.device)
        index = torch.arange(batch.tokens.shape[1], device=batch.tokens.device).expand_as(batch.tokens)
        begins = torch.ones_like(batch.maskable)  # a document
        begins[:, 1:] = batch.document[:, 1:] != batch.document[:, :-1]
        canvas = (begins | _changes(batch.modality)).flatten().long().cumsum(dim=0).view_as(index)
        generated = torch.isin(canvas, canvas[batch.maskable])
        own = size[torch.where(generated, batch.modality, len(self.modalities))]
        run = begins | _changes(torch.where(generated, batch.modality, STRUCTURE - 1))  # all that is given is of one kind
        offset = index - torch.where(run, index, 0).cummax(dim=1).values
        count = (run | (offset % own == 0)).long().cumsum(dim=1)
        return count - torch.where(begins, count, 0).cummax(dim=1).values


def _changes(values: Int[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """Where a value is another than the one before."""
    changed = torch.zeros_like(values, dtype=torch.bool)
    changed[:, 1:] = values[:, 1:] != values[:, :-1]
    return changed
