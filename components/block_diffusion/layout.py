"""Which block each position is of.

Inside a document, what is given (prompts, structure) between what is generated makes one block; a generated canvas falls into
blocks of its modality's size, the last as long as is left. Counted `from_start`, blocks take no notice of canvases (LLaDA2,
SDAR): the first block that is generated may begin with the end of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
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
        own = size[torch.where(batch.maskable, batch.modality, len(self.modalities))]
        kind = torch.where(batch.maskable, batch.modality, STRUCTURE - 1)  # all that is given is of one kind
        index = torch.arange(batch.tokens.shape[1], device=batch.tokens.device).expand_as(batch.tokens)
        begins = torch.ones_like(batch.maskable)  # a document
        begins[:, 1:] = batch.document[:, 1:] != batch.document[:, :-1]
        run = begins.clone()
        run[:, 1:] |= kind[:, 1:] != kind[:, :-1]
        offset = index - torch.where(run, index, 0).cummax(dim=1).values
        count = (run | (offset % own == 0)).long().cumsum(dim=1)
        return count - torch.where(begins, count, 0).cummax(dim=1).values
