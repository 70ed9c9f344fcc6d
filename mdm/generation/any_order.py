"""What a sampler sees of a model of two streams: logits at the slots that are still masked, each from all that is known.

    cache exact   a pass computes what has become known since the last one, and the queries; all else is kept
    cache off     everything that is known is computed in every pass

Both give the same logits to rounding. What became known in a pass is a group, of which a token sees the others. What is given
comes before the first (`components.orders.given_ranks`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.kv_cache import PositionCache, attending_to
from components.samplers import Editing, Gibbs, LeastSureFirst, Psi, ReMDM, Sampler, SelfCorrect
from components.samplers.any_noise.start import along
from components.samplers.orders.in_order import earliest
from components.types import PAD_DOCUMENT
from mdm.generation.canvas import SlotLogits
from mdm.models.two_stream import UNKNOWN, hidden_at


@dataclass
class Known:
    """What is known of all rows of a batch, and whose keys are kept.

    rank: of what is `given`, and then of the pass in which a token was first seen
    """

    tokens: Int[Tensor, "rows seq"]
    given: Int[Tensor, "rows seq"]
    rank: Int[Tensor, "rows seq"]
    layers: list[PositionCache] | None
    passes: int = 0


@dataclass(frozen=True)
class TwoStreamLogits(SlotLogits):
    """Whole sequences -> logits at their masked slots; zero elsewhere.

    known:  shared with all selections of these rows
    turn:   of each slot its rank, where the order is fixed beforehand: then only those whose turn it is are asked
    """

    mask_id: int
    known: Known
    rows: Int[Tensor, " rows"]
    turn: Int[Tensor, "rows slots"] | None = field(default=None)

    @classmethod
    def around(
        cls,
        inner: SlotLogits,
        mask_id: int,
        cached: bool,
        given: Int[Tensor, "rows seq"],
        turn: Int[Tensor, "rows slots"] | None = None,
    ) -> TwoStreamLogits:
        """given, turn: of the rows as often as `inner` has them"""
        tokens = inner.canvas.tokens
        layers = [PositionCache() for _ in inner.model.blocks] if cached else None
        for layer in layers or ():
            layer.shape = (len(tokens), tokens.shape[1] + 1)
        known = Known(tokens.clone(), given, torch.full_like(tokens, UNKNOWN), layers)
        own: dict[str, Any] = {f.name: getattr(inner, f.name) for f in fields(inner)}
        return cls(**own, mask_id=mask_id, known=known, rows=torch.arange(len(tokens), device=tokens.device), turn=turn)

    def __call__(self, tokens: Int[Tensor, "rows seq"]) -> Float[Tensor, "rows slots ids"]:
        """Raises ValueError where a token has changed whose keys are kept."""
        masked = (self.canvas.take(tokens) == self.mask_id) & self.canvas.slots
        asked = masked if self.turn is None else earliest(self.turn, masked)
        new, rank, changed = self._learn(tokens, masked)
        content = new if self.known.layers is not None else rank < UNKNOWN
        counts = torch.stack([asked.sum(dim=1).max(), content.sum(dim=1).max(), changed.long()])
        queries, known, stale = counts.tolist()  # the one synchronisation of a pass
        if stale and self.known.layers is not None:
            raise ValueError("cache 'exact' keeps what is known, and the sampler has changed some of it; set cache=off")
        slots, positions = first(asked, queries), first(content, known)
        behind = torch.nn.functional.pad(self.canvas.index, (0, 1), value=tokens.shape[1])
        where = behind.gather(1, slots)
        if self.known.layers is None:
            hidden = hidden_at(self.model, tokens, rank, where, positions, self.mask_id)
        else:
            both = torch.cat([where, positions], dim=1)
            with attending_to(self.known.layers, self.model.blocks, self.rows, both):
                hidden = hidden_at(self.model, tokens, rank, where, positions, self.mask_id, kept=True)
        logits = self.unembed(hidden)
        out = torch.zeros(len(tokens), self.canvas.index.shape[1] + 1, logits.shape[-1], device=tokens.device)
        return out.scatter(1, slots[..., None].expand_as(logits), logits)[:, :-1]

    def _learn(self, tokens: Int[Tensor, "rows seq"], masked: Bool[Tensor, "rows slots"]) -> tuple[Tensor, Tensor, Tensor]:
        """What is new since the last pass, the rank of everything, and whether anything else has changed."""
        known, before = self.known, self.known.rank[self.rows]
        now = self.canvas.spread(masked.double()) == 0
        if self.document is not None:
            now = now & (self.document != PAD_DOCUMENT)
        was = before < UNKNOWN
        changed = was & (~now | (tokens != known.tokens[self.rows]))
        new = now & (~was | changed)
        fresh = known.given[self.rows] if known.passes == 0 else 1 + known.passes
        rank = torch.where(new, fresh, before.masked_fill(~now, UNKNOWN))
        known.rank[self.rows], known.tokens[self.rows] = rank, tokens
        known.passes += 1
        return new, rank, changed.any()

    def select(self, rows: Int[Tensor, " rows"]) -> TwoStreamLogits:
        """Some of these rows."""
        document = None if self.document is None else self.document[rows]
        turn = None if self.turn is None else self.turn[rows]
        return replace(self, canvas=self.canvas.select(rows), document=document, rows=self.rows[rows], turn=turn)


def first(flags: Bool[Tensor, "rows n"], count: int) -> Int[Tensor, "rows count"]:
    """The first places of each row where a flag is up; n where there are no more."""
    place = torch.arange(flags.shape[1], device=flags.device).expand_as(flags)
    return torch.where(flags, place, flags.shape[1]).sort(dim=1).values[:, :count]


def check_two_streams(sampler: Sampler | None, cache: str) -> str:
    """The cache that is meant. Raises ValueError for samplers and caches that two streams have no use for."""
    if cache in ("prefix", "dual"):
        raise ValueError(f"cache {cache!r} approximates what a model of two streams has exactly; set cache=exact, or off")
    parts = [] if sampler is None else list(along(sampler, None))
    asking = next((p for p in parts if isinstance(p, (Editing, Gibbs, LeastSureFirst, SelfCorrect))), None)
    if asking is not None:
        raise ValueError(
            f"{type(asking).__name__} asks what else could stand where a token stands, and two streams say what comes next "
            "alone; take InOrder, Confidence or another sampler that fills in what is masked"
        )
    masking = next((p for p in parts if isinstance(p, (ReMDM, Psi))), None)
    if masking is not None and cache == "exact":
        raise ValueError(f"cache 'exact' keeps what {type(masking).__name__} may mask again; set cache=off")
    return "exact" if cache == "auto" and masking is None else "off" if cache == "auto" else cache
