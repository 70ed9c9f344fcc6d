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

    def select(self, rows: Int[Tensor, " rows"] | slice) -> Batch:
        """Some of the rows, as often as they are named."""
        return Batch(*(getattr(self, f.name)[rows] for f in fields(self)))

    def repeated(self, times: int) -> Batch:
        """Each row so often, one after the other, all of them documents of their own: of other noise."""
        own = self.select(torch.arange(len(self.tokens)).repeat_interleave(times))
        index = torch.arange(len(own.tokens))[:, None].expand_as(own.tokens)
        return replace(own, document=torch.where(own.document == PAD_DOCUMENT, PAD_DOCUMENT, index))

    @property
    def one_document_per_row(self) -> bool:
        """True where no row is packed or padded, so that attention needs no mask. Call it on the CPU: it syncs."""
        return bool((self.document == self.document[:, :1]).all())

    @property
    def num_tokens(self) -> int:
        """Tokens seen: every non-pad position, prompts included. Call it on the CPU: it syncs."""
        return int((self.document != PAD_DOCUMENT).sum())


@dataclass(frozen=True)
class Replaced(Movable):
    """Of noise that puts other tokens in a token's place: what a loss needs beside a weight (see components/divergence.py).

    token:          what stands at the position
    alpha, uniform: shares of kept and of uniformly drawn tokens at its noise level; uniform 0: the loss is cross-entropy
    tilt:           log-odds by which the model's distribution favours the token that stands there over what the other positions
                    say of it (see components/corruption.py); None where it is leave-one-out
    cross_entropy:  trained by cross-entropy there too; the bound never is
    """

    token: Int[Tensor, "*shape"]
    alpha: Float[Tensor, "*shape"]
    uniform: Float[Tensor, "*shape"]
    tilt: Float[Tensor, "*shape"] | None = None
    cross_entropy: bool = False

    def at(self, index: Int[Tensor, " n"]) -> Replaced:
        """Those of some places of the flattened batch."""
        token, alpha, uniform = (v.flatten()[index] for v in (self.token, self.alpha, self.uniform))
        return Replaced(token, alpha, uniform, None if self.tilt is None else self.tilt.flatten()[index], self.cross_entropy)


@dataclass(frozen=True)
class Arrivals(Movable):
    """Of orders that the model itself decides: what is left to chance (see components/learned_orders.py). A row is a document.

    place:   of a document's maskable positions, from left to right: index into the flattened batch; 0 where there are no more
    there:   which places are positions
    arrival: of each sample, -log u with u ~ U(0, 1): a position whose exponent is e is generated at -log t = arrival / e
    masked:  how many positions of a document are masked
    most:    by id range, how many of its positions may be masked in a sample, at the most
    """

    place: Int[Tensor, "documents positions"]
    there: Bool[Tensor, "documents positions"]
    arrival: Float[Tensor, "samples documents positions"]
    masked: Int[Tensor, " documents"]
    most: tuple[int, ...]


@dataclass(frozen=True)
class NoisyBatch(Movable):
    """A batch after corruption: what the model sees, and what each prediction weighs.

    noisy:    tokens, some of them replaced by the mask id or by others
    mask:     True where predicted: the masked positions; and all that are maskable, where tokens may have become others
    weight:   in the bound; of masks -alpha'(t) / (1 - alpha(t)); 0 where nothing is predicted
    training: in the training loss; None: the same
    replaced: where tokens may have become others
    block:    of block diffusion, of each position: it is predicted given the finished ones before (components/block_diffusion);
              of an order, its rank (components/orders.py)
    apart:    what is predicted sees nothing that is predicted beside it: a model of two streams
    arrivals: of learned orders: nothing is masked yet, `mask` is what may be, and `weight` how many that are in the document
    """

    clean: Batch
    noisy: Int[Tensor, "batch seq"]
    mask: Bool[Tensor, "batch seq"]
    weight: Float[Tensor, "batch seq"]
    training: Float[Tensor, "batch seq"] | None = None
    replaced: Replaced | None = None
    block: Int[Tensor, "batch seq"] | None = None
    apart: bool = False
    arrivals: Arrivals | None = None
