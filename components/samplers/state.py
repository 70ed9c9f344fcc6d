"""A batch of sequences on their way, which is what a sampler's step takes and gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.weightings import Noises

TOKEN, POSITION, TIME = 0, 1, 2
"""What each of a position's three random numbers decides."""

MASKS = Noises()
"""The noise of masked diffusion."""


@dataclass(frozen=True)
class SamplerState:
    """A batch of sequences on their way. All tensors; a step never reads one on the host.

    tokens:     the canvas so far, mask tokens where `masked`; with noise of other kinds, what stands there at this time
    masked:     positions still to be filled, or that may still change
    generate:   positions that are generated at all; the others are given
    modality:   which modality (or any other grouping) each position belongs to
    confidence: probability that each generated token had when it was drawn; 0 before
    uniform:    this step's random numbers, for each position three: TOKEN, POSITION, TIME
    step:       steps done (in the current block)
    total:      positions masked at the start (of the current block)
    time:       of the reverse process, from 1 down to 0
    block:      the current block, in semi-autoregressive decoding
    extra:      passes done with nothing left to fill (in the current block), by samplers that revise
    finished:   rows that need no further step
    mask_id:    the mask token
    noise:      what the model was trained against, by modality; masks unless it is said
    rank:       of an order that is followed, of each position its turn (see orders/in_order.py)
    group:      the most positions of a row whose turn is the same
    draft:      what tokens that still are `masked` were drawn from, by a sampler that judges them in its next step
    children:   states of the parts, in a sampler made of several
    """

    tokens: Int[Tensor, "batch seq"]
    masked: Bool[Tensor, "batch seq"]
    generate: Bool[Tensor, "batch seq"]
    modality: Int[Tensor, "batch seq"]
    confidence: Float[Tensor, "batch seq"]
    uniform: Float[Tensor, "batch 3 seq"]
    step: Int[Tensor, " batch"]
    total: Int[Tensor, " batch"]
    time: Float[Tensor, " batch"]
    block: Int[Tensor, " batch"]
    extra: Int[Tensor, " batch"]
    finished: Bool[Tensor, " batch"]
    mask_id: int
    noise: Noises = MASKS
    rank: Int[Tensor, "batch seq"] | None = None
    group: int = 0
    draft: Float[Tensor, "batch seq vocab"] | None = None
    children: tuple[SamplerState, ...] = ()

    @classmethod
    def start(
        cls,
        tokens: Int[Tensor, "batch seq"],
        generate: Bool[Tensor, "batch seq"],
        mask_id: int,
        modality: Int[Tensor, "batch seq"] | None = None,
        noise: Noises = MASKS,
    ) -> SamplerState:
        """Everything that is to be generated is masked."""
        total = generate.sum(dim=1)
        zeros = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
        return cls(
            tokens=tokens.masked_fill(generate, mask_id),
            masked=generate,
            generate=generate,
            modality=torch.zeros_like(tokens) if modality is None else modality,
            confidence=zeros,
            uniform=zeros[:, None].repeat(1, 3, 1),
            step=torch.zeros_like(total),
            total=total,
            time=torch.ones(len(tokens), dtype=torch.float64, device=tokens.device),
            block=torch.zeros_like(total),
            extra=torch.zeros_like(total),
            finished=total == 0,
            mask_id=mask_id,
            noise=noise,
        ).clone()

    def unmask(
        self,
        now: Bool[Tensor, "batch seq"],
        drawn: Int[Tensor, "batch seq"],
        probability: Float[Tensor, "batch seq"],
        time: Float[Tensor, " batch"] | None = None,
    ) -> SamplerState:
        """The state after a step that puts the drawn tokens at the positions `now`."""
        masked = self.masked & ~now
        return replace(
            self,
            tokens=torch.where(now, drawn, self.tokens),
            masked=masked,
            confidence=torch.where(now, probability, self.confidence),
            step=self.step + 1,
            time=self.time if time is None else time,
            finished=~masked.any(dim=1),
        )

    def clone(self) -> SamplerState:
        """A state that shares no tensor with this one: a step compiled for shared ones would be compiled again without."""
        return self._map(lambda own: own.clone())

    def select(self, rows: Int[Tensor, " rows"]) -> SamplerState:
        """Some of the rows."""
        return self._map(lambda own: own[rows])

    def merge(self, rows: Int[Tensor, " rows"], part: SamplerState) -> SamplerState:
        """The whole batch, with the given rows replaced by those of `part`, which another sampler may have made."""
        return self._like(part)._map(lambda own, other: own.index_copy(0, rows, other), part._like(self))

    def _like(self, other: SamplerState) -> SamplerState:
        """With ranks, a draft and children where another has some: of no probability, and a sampler's that asks for none."""
        rank = self.rank if self.rank is not None or other.rank is None else torch.zeros_like(self.tokens)
        draft, bare = self.draft, replace(self, children=())
        if draft is None and other.draft is not None:
            draft = other.draft.new_zeros(*self.tokens.shape, other.draft.shape[-1])
        some = self.children + (bare,) * (len(other.children) - len(self.children))
        alike = [child._like(theirs) for child, theirs in zip(some, other.children, strict=False)]
        return replace(self, rank=rank, group=max(self.group, other.group), draft=draft, children=(*alike, *some[len(alike) :]))

    def _map(self, change: Callable[..., Tensor], *others: SamplerState) -> SamplerState:
        """The state with each of its tensors changed, given the same one of the others."""
        changed = {}
        for f in fields(self):
            own, *theirs = (getattr(state, f.name) for state in (self, *others))
            if isinstance(own, tuple):
                own = tuple(child._map(change, *rest) for child, *rest in zip(own, *theirs, strict=True))
            changed[f.name] = change(own, *theirs) if isinstance(own, Tensor) else own
        return SamplerState(**changed)
