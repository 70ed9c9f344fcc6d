"""The one batch type that flows from data to loss, and what the masker makes of it.

A reader follows one tensor from file to gradient: data -> Batch -> masker -> NoisyBatch -> model -> loss.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

STRUCTURE = -1
"""Modality and id range of positions that belong to no canvas: task, boundary and pad tokens."""
PAD_DOCUMENT = -1
"""Document id of padding: attended by nothing, never masked, never scored."""


M = TypeVar("M", bound="Movable")


@dataclass(frozen=True)
class Movable:
    """Gives a dataclass of tensors `to(device)`."""

    def to(self: M, device: torch.device | str) -> M:
        """The same with every tensor (and whatever else can move) on `device`."""
        return replace(self, **{f.name: _moved(getattr(self, f.name), device) for f in fields(self)})


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)  # from pinned memory a copy does not block
    if isinstance(value, Movable):
        return value.to(device)
    return [_moved(v, device) for v in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Batch(Movable):
    """Clean token sequences, and what may stand where.

    tokens:   global ids (see `components.vocabulary`)
    modality: index of the position's modality, STRUCTURE outside canvases
    id_range: index of the id range the position's token comes from (a modality's, or one codebook's), or STRUCTURE
    maskable: may be masked, hence predicted and scored; prompts, structure and padding may not
    document: global index of the sample the position belongs to, PAD_DOCUMENT at padding. The index counts on through
              the steps and epochs: it is what the noise is a function of, so a batch whose indices do not advance gets the
              masks of the one before. Attention stays inside a document.
    position: index inside the document (rotary position embedding)
    """

    tokens: Int[Tensor, "batch seq"]
    modality: Int[Tensor, "batch seq"]
    id_range: Int[Tensor, "batch seq"]
    maskable: Bool[Tensor, "batch seq"]
    document: Int[Tensor, "batch seq"]
    position: Int[Tensor, "batch seq"]

    @classmethod
    def of(cls, tokens: Int[Tensor, "batch seq"], first_index: int) -> Batch:
        """Plain rows of one modality and id range, each a document, all of it to be predicted.

        first_index: global index of the first row, the number of rows that came before it. Advance it with every step: a masker
                     draws from (its seed, this index) alone, and the same index is the same mask

            for step, tokens in enumerate(loader):
                noisy = masker(Batch.of(tokens, first_index=step * len(tokens)))
        """
        zeros, rows = torch.zeros_like(tokens), torch.arange(len(tokens), device=tokens.device)
        return cls(
            tokens=tokens,
            modality=zeros,
            id_range=zeros,
            maskable=torch.ones_like(tokens, dtype=torch.bool),
            document=(first_index + rows)[:, None].expand_as(tokens).contiguous(),
            position=torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens).contiguous(),
        )

    @property
    def one_document_per_row(self) -> bool:
        """True where no row is packed or padded, so that attention needs no mask. Call it on the CPU: it syncs."""
        return bool((self.document == self.document[:, :1]).all())

    @property
    def num_tokens(self) -> int:
        """Tokens seen: every non-pad position, prompts included. Call it on the CPU: it syncs."""
        return int((self.document != PAD_DOCUMENT).sum())


@dataclass(frozen=True)
class NoisyBatch(Movable):
    """A batch after masking: what the model sees, and what each prediction weighs.

    noisy:  tokens with the masked ones replaced by the mask id
    mask:   True where masked
    weight: NELBO weight -alpha'(t) / (1 - alpha(t)) of each masked position, 0 elsewhere
    """

    clean: Batch
    noisy: Int[Tensor, "batch seq"]
    mask: Bool[Tensor, "batch seq"]
    weight: Float[Tensor, "batch seq"]
