"""What a sampler sees of a model that learned its order: log rates for logits (components/samplers/orders)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.types import Batch
from components.vocabulary import Vocabulary
from mdm.generation.canvas import SlotLogits
from mdm.models.orders import LearnedOrder, TokenRates


@dataclass(frozen=True)
class LogRates(SlotLogits):
    """log p(token) + log r of each slot. Both are of what a slot was trained with: the ids of its range and the end token.

    maskable: the positions that a row's exponents are compared over;  trained: which ids those are
    """

    maskable: Bool[Tensor, "rows seq"]
    trained: Bool[Tensor, "rows slots ids"]

    @classmethod
    def around(cls, inner: SlotLogits, batch: Batch, vocabulary: Vocabulary) -> LogRates:
        """Of a batch (on the CPU) whose rows come as often as `inner` was told; each is a document."""
        device = inner.canvas.tokens.device
        rows = torch.arange(len(inner.canvas.tokens)) % len(batch.tokens)
        trained = inner.canvas.take(vocabulary.allowed(batch.id_range[rows]).to(device)[..., inner.canvas.ids])
        own: dict[str, Any] = {f.name: getattr(inner, f.name) for f in fields(inner)}
        return cls(**own, maskable=batch.maskable[rows].to(device), trained=trained)

    def __call__(self, tokens: Int[Tensor, "rows seq"]) -> Float[Tensor, "rows slots ids"]:
        mask, order = self.mask(), self.model.order
        hidden = self.hidden(tokens, mask)
        logits = self.unembed(self.canvas.take(hidden))
        log_z = logits.masked_fill(~self.trained, float("-inf")).logsumexp(dim=-1, keepdim=True)
        if isinstance(order, TokenRates):
            return logits - log_z + self.model.log_rates()[self.canvas.ids]
        assert isinstance(order, LearnedOrder)  # else nothing was learned
        reverse = order.exponents(order.noisy(hidden, mask), self.maskable)
        return logits - log_z + self.canvas.take(reverse.log())[..., None]

    def select(self, rows: Int[Tensor, " rows"]) -> LogRates:
        """Some of these rows."""
        document = None if self.document is None else self.document[rows]
        own = {"maskable": self.maskable[rows], "trained": self.trained[rows]}
        return replace(self, canvas=self.canvas.select(rows), document=document, **own)
