"""A masker, or any corruption, with a time for each block in place of each document.

The bound is the sum of the blocks', each given the finished ones before it:

    -log p(x) <= sum_b E_t [ weight(t) * D(x_b | z_b, x_<b) ]

With blocks of one position and a fixed count that is the autoregressive likelihood, with one block masked diffusion's bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from components.block_diffusion.layout import Layout
from components.maskers import Masker
from components.types import PAD_DOCUMENT, Batch, NoisyBatch

DOCUMENTS = 40  # bits of a document's index


@dataclass(frozen=True)
class BlockMasker:
    """What `masker` does to a document is done to each block, with noise of its own.

    Block b of document i has the noise of document i + b * 2^40: the first blocks of all documents that of the masker without
    blocks, and times of low discrepancy cover each block's noise levels over consecutive documents.
    """

    masker: Masker
    layout: Layout

    @property
    def pairs(self) -> bool:
        return self.masker.pairs

    @property
    def noise(self) -> Mapping[str, Any]:
        """As the masker's."""
        return getattr(self.masker, "noise", {})

    @property
    def complete(self) -> bool:
        """Whether the weighted loss is a bound."""
        return getattr(self.masker, "complete", True)

    def __call__(self, batch: Batch) -> NoisyBatch:
        block = self.layout(batch)
        rank = (block - _first(block, batch)).clamp(min=0)
        own = torch.where(batch.document == PAD_DOCUMENT, PAD_DOCUMENT, batch.document + (rank << DOCUMENTS))
        return replace(self.masker(replace(batch, document=own)), clean=batch, block=block)


def _first(block: Int[Tensor, "batch seq"], batch: Batch) -> Int[Tensor, "batch seq"]:
    """At every position, the first block of its document in which anything is generated."""
    ids, document = batch.document.unique(return_inverse=True)
    never = torch.full((len(ids),), int(block.max()) + 1)
    return never.scatter_reduce(0, document[batch.maskable], block[batch.maskable], "amin")[document]
