"""What a sampler sees of the model: only the positions that are generated, and only the ids that may stand there.

    sampler's tokens [rows, slots]  ->  whole sequences  ->  hidden states  ->  logits [rows, slots, ids]

A slot is a generated position, from left to right; its tokens are local ids: places in `ids`, the mask token last. So no logits
are computed for what is given, nor for ids of another modality.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import linear

from components.kv_cache import PositionCache, attending_to
from components.samplers import LogitsFn, Selectable
from components.types import Batch
from components.visibility import Places
from mdm.hardware import local, recorded
from mdm.models.transformer import MaskedDiffusionModel

CACHES = ("off", "prefix", "dual")


@dataclass(frozen=True)
class Canvas:
    """Where the slots are in their sequences, and what their local ids mean.

    index: position of each slot; rows with fewer slots than the longest point one behind the sequence
    ids:   global id of each local one
    """

    tokens: Int[Tensor, "rows seq"]
    index: Int[Tensor, "rows slots"]
    ids: Int[Tensor, " ids"]

    @classmethod
    def of(cls, tokens: Int[Tensor, "rows seq"], generate: Bool[Tensor, "rows seq"], ids: Int[Tensor, " ids"]) -> Canvas:
        """The canvas of the positions `generate`."""
        slots = int(generate.sum(dim=1).max())
        behind = torch.full_like(tokens, tokens.shape[1])
        place = torch.where(generate, torch.arange(tokens.shape[1], device=tokens.device), behind)
        return cls(tokens, place.sort(dim=1).values[:, :slots], ids)

    @property
    def slots(self) -> Bool[Tensor, "rows slots"]:
        """Which slots there are."""
        return self.index < self.tokens.shape[1]

    def take(self, values: Shaped[Tensor, "rows seq ..."]) -> Shaped[Tensor, "rows slots ..."]:
        """The values at the slots; arbitrary ones where there is no slot."""
        index = self.index.clamp(max=values.shape[1] - 1)
        return values.gather(1, index.view(*index.shape, *[1] * (values.ndim - 2)).expand(*index.shape, *values.shape[2:]))

    def whole(self, local: Int[Tensor, "rows slots"]) -> Int[Tensor, "rows seq"]:
        """Whole sequences with the slots filled."""
        padded = torch.nn.functional.pad(self.tokens, (0, 1))  # slots that are none fall into the last column
        return padded.scatter(1, self.index, self.ids[local])[:, :-1]

    def spread(self, values: Float[Tensor, "rows slots"]) -> Float[Tensor, "rows seq"]:
        """Values of the slots at their positions, 0 elsewhere."""
        zeros = values.new_zeros(len(values), self.tokens.shape[1] + 1)
        return zeros.scatter(1, self.index, values)[:, :-1]

    def to(self, device: torch.device) -> Canvas:
        return Canvas(self.tokens.to(device), self.index.to(device), self.ids.to(device))

    def select(self, rows: Int[Tensor, " rows"]) -> Canvas:
        return Canvas(self.tokens[rows], self.index[rows], self.ids)


@dataclass(frozen=True)
class OnCanvas:
    """The sampler's logits function: local ids of the slots -> logits of the slots, by a function of whole sequences."""

    canvas: Canvas
    logits_fn: LogitsFn

    def __call__(self, local: Int[Tensor, "rows slots"]) -> Float[Tensor, "rows slots ids"]:
        return self.logits_fn(self.canvas.whole(local))

    def select(self, rows: Int[Tensor, " rows"]) -> OnCanvas:
        inner = self.logits_fn
        return OnCanvas(self.canvas.select(rows), inner.select(rows) if isinstance(inner, Selectable) else inner)


@dataclass(frozen=True)
class SlotLogits:
    """Whole sequences -> logits at their slots, by a forward pass over everything.

    hidden:      (tokens, mask) -> hidden states
    unembedding: the local ids' rows of the model's, gathered once; after `hidden`, since only then a sharded model has them
    """

    model: MaskedDiffusionModel
    canvas: Canvas
    document: Int[Tensor, "rows seq"] | None
    hidden: Callable[..., Tensor]
    unembedding: Callable[[], Float[Tensor, "ids width"]]

    @classmethod
    def of(cls, model: MaskedDiffusionModel, canvas: Canvas, batch: Batch, copies: int) -> SlotLogits:
        """For a batch (on the CPU) whose rows come `copies` times: twice under guidance."""
        rows = torch.arange(len(batch.tokens)).repeat(copies)
        device = canvas.tokens.device
        document = None if batch.one_document_per_row else batch.document[rows].to(device)
        hidden = recorded(model.hidden, model.recorder)
        unembedding = functools.cache(lambda: local(model.unembedding.weight)[canvas.ids])
        return cls(model, canvas.select(rows.to(device)), document, hidden, unembedding)

    def __call__(self, tokens: Int[Tensor, "rows seq"]) -> Float[Tensor, "rows slots ids"]:
        return self.unembed(self.canvas.take(self.hidden(tokens, self.mask())))

    def mask(self) -> Any:
        """Who sees whom; None: everything of a row."""
        if self.document is None:
            return None
        index = torch.arange(self.document.shape[1], device=self.document.device).expand_as(self.document)
        return self.model.sees(Places(self.document, index))

    def unembed(self, hidden: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape ids"]:
        """Logits over the local ids alone."""
        return linear(hidden, self.unembedding()).float()

    def select(self, rows: Int[Tensor, " rows"]) -> SlotLogits:
        return replace(self, canvas=self.canvas.select(rows), document=None if self.document is None else self.document[rows])


@dataclass
class CacheState:
    """What is kept between passes: keys and values, and for each row its block and the steps since its refresh."""

    layers: list[PositionCache]
    block: Int[Tensor, " rows"]
    age: Int[Tensor, " rows"]


@dataclass(frozen=True)
class CachedSlotLogits(SlotLogits):
    """The same with a key/value cache, for decoding in blocks: right in the block that a row is in, and only there.

    A row's first pass in a block is over everything, and so is every `refresh_every`-th one (None: no other). Those between
    compute

        dual    the block alone; everything before and behind it is kept
        prefix  the block and everything behind it; only what lies before is kept

    hidden: (tokens, mask, positions, rows) -> hidden states
    """

    mode: Literal["prefix", "dual"]
    block_length: int
    refresh_every: int | None
    kept: CacheState
    rows: Int[Tensor, " rows"]

    @classmethod
    def around(cls, inner: SlotLogits, mode: str, block_length: int, refresh_every: int | None) -> CachedSlotLogits:
        """Raises ValueError for an unknown mode or a refresh that is never."""
        if mode not in CACHES[1:]:
            raise ValueError(f"cache {mode!r} is not one of {', '.join(CACHES)}")
        if refresh_every is not None and refresh_every < 1:
            raise ValueError(f"refresh_every must be at least 1, or null for once a block; got {refresh_every}")
        rows = torch.arange(len(inner.canvas.tokens), device=inner.canvas.tokens.device)
        layers = [PositionCache() for _ in inner.model.blocks]
        for layer in layers:
            layer.shape = (len(rows), inner.canvas.tokens.shape[1])
        kept = CacheState(layers, torch.full_like(rows, -1), torch.zeros_like(rows))

        def attend(
            tokens: Int[Tensor, "rows new"], mask: Any, positions: Int[Tensor, "rows new"], rows: Int[Tensor, " rows"]
        ) -> Float[Tensor, "rows new width"]:
            with attending_to(layers, inner.model.blocks, rows, positions):
                return inner.model.hidden(tokens, mask, positions)

        hidden = recorded(attend, inner.model.recorder)
        own: dict[str, Any] = {f.name: getattr(inner, f.name) for f in fields(inner)} | {"hidden": hidden}
        return cls(**own, mode=mode, block_length=block_length, refresh_every=refresh_every, kept=kept, rows=rows)

    def __call__(self, tokens: Int[Tensor, "rows seq"]) -> Float[Tensor, "rows slots ids"]:
        """Logits of the slots of each row's block; where a row is not refreshed, those of other blocks are zero."""
        masked = (self.canvas.take(tokens) == self.canvas.ids[-1]) & self.canvas.slots
        block = masked.long().argmax(dim=1) // self.block_length  # blocks go from left to right: the first masked slot's
        fresh = block != self.kept.block[self.rows]
        if self.refresh_every is not None:
            fresh = fresh | (self.kept.age[self.rows] + 1 >= self.refresh_every)
        self.kept.block[self.rows] = block
        self.kept.age[self.rows] = torch.where(fresh, 0, self.kept.age[self.rows] + 1)
        start = self.canvas.index.gather(1, block[:, None] * self.block_length)[:, 0]
        anew, starts = torch.stack([fresh.long(), start]).tolist()  # the one synchronisation of a pass
        if all(anew):
            return self._all(tokens)
        if not any(anew):
            return self._block(tokens, block, min(starts))
        logits = torch.zeros(*self.canvas.index.shape, len(self.canvas.ids), device=tokens.device)
        everything, some = ([i for i, now in enumerate(anew) if bool(now) == which] for which in (True, False))
        rows = torch.tensor(everything, device=tokens.device)
        logits[rows] = self.select(rows)._all(tokens[rows])
        first, rows = min(starts[i] for i in some), torch.tensor(some, device=tokens.device)
        logits[rows] = self.select(rows)._block(tokens[rows], block[rows], first)
        return logits

    def _all(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.unembed(self.canvas.take(self._hidden(tokens, positions)))

    def _block(self, tokens: Tensor, block: Tensor, first: int) -> Tensor:
        """first: the position of the foremost slot of any row's block."""
        length = tokens.shape[1]
        slots = block[:, None] * self.block_length + torch.arange(self.block_length, device=tokens.device)
        positions = self.canvas.index.gather(1, slots)
        if self.mode == "dual":
            hidden = self._some(tokens, positions)
        else:
            start = positions[:, :1]
            # a row that has less behind its block computes its last position several times, to the same values
            behind = (start + torch.arange(length - first, device=tokens.device)).clamp(max=length - 1)
            hidden = self._some(tokens, behind)
            hidden = hidden.gather(1, (positions - start)[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = self.unembed(hidden)
        out = torch.zeros(*self.canvas.index.shape, logits.shape[-1], device=tokens.device)
        return out.scatter(1, slots[..., None].expand_as(logits), logits)

    def _some(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Hidden states of some positions; the one before each is computed too where it is what predicts it."""
        if not self.model.config.predicts_next:
            return self._hidden(tokens.gather(1, positions), positions)
        both = torch.stack([(positions - 1).clamp(min=0), positions], dim=-1).flatten(1)
        return self._hidden(tokens.gather(1, both), both)[:, 1::2]

    def _hidden(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Hidden states at some positions, which attend to all of their row."""
        mask = None
        if self.document is not None:
            own = self.document.gather(1, positions)
            mask = own[:, :, None] == self.document[:, None, :]
        return self.hidden(tokens, mask, positions, self.rows)

    def select(self, rows: Int[Tensor, " rows"]) -> CachedSlotLogits:
        """Some of these rows."""
        document = None if self.document is None else self.document[rows]
        return replace(self, canvas=self.canvas.select(rows), document=document, rows=self.rows[rows])


def local_ids(allowed: Bool[Tensor, "positions vocab"], mask_id: int) -> Int[Tensor, " ids"]:
    """The ids that may stand at any of the positions, the mask token last."""
    some = allowed.any(dim=0)
    some[mask_id] = False
    return torch.cat([some.nonzero()[:, 0], torch.tensor([mask_id], device=some.device)])
