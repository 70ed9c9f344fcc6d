"""What self-speculation sees of a model: what the finished copy of a block says of its tokens, and drafts of the rest of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from mdm.generation.blockwise import BlockwiseLogits, take

WHOLE_ROW = -1  # the copy that a finished position is of


class DraftLogits(BlockwiseLogits):
    """Logits `[rows, 1 + copies, width, ids]` of each row's block: what its finished tokens say of the next; then, of noisy
    copies in which the first 0, 1, ..., width - 1 tokens are seen, what stands at each position.

    drafts: whether the noisy copies are made
    """

    drafts: bool = True

    def __call__(
        self, tokens: Int[Tensor, "rows seq"], start: Sequence[int], stop: Sequence[int], width: int
    ) -> Float[Tensor, "rows copies width ids"]:
        """Raises ValueError for a row whose first token is to be generated: nothing stands before it."""
        if min(start) == 0 and bool((tokens[[at == 0 for at in start], 0] == self.ids[-1]).any()):
            raise ValueError("from left to right the first token needs one before it: give a prompt")
        device, number = tokens.device, width if self.drafts else 0
        begin, first, last = (torch.tensor(v, device=device)[:, None] for v in (self.begin, start, stop))
        span = max(b - a for a, b in zip(self.begin, stop, strict=True))
        offset = torch.arange(width, device=device)
        noisy = (first + offset).repeat(1, number)
        copy = torch.arange(number, device=device).repeat_interleave(width).expand(len(tokens), -1)
        places = torch.cat([begin + torch.arange(span, device=device), noisy], dim=1)
        of = torch.cat([torch.full((len(tokens), span), WHOLE_ROW, device=device), copy], dim=1)
        seen = []
        for own in self.copies(tokens):
            hidden_ones = (of != WHOLE_ROW) & (places - first >= of)
            seen.append(take(own, places).masked_fill(hidden_ones, int(self.ids[-1])))
        hidden = self._seen(torch.cat(seen), places, of, first, last, max(self.begin) + span)
        before = (first - begin - 1 + offset).clamp(0, span - 1).repeat(len(seen), 1)  # each is predicted by the one before it
        p = hidden.gather(1, before[..., None].expand(-1, -1, hidden.shape[-1]))
        every = torch.cat([p, hidden[:, span:]], dim=1)
        logits = linear(every, self.unembedding()).float().unflatten(1, (1 + number, width))
        if self.cache is not None:
            self.begin = [max(at - 1, 0) for at in start]
        return self.guided(logits)

    def _seen(
        self,
        tokens: Int[Tensor, "copies some"],
        places: Int[Tensor, "rows some"],
        copy: Int[Tensor, "rows some"],
        first: Int[Tensor, "rows 1"],
        last: Int[Tensor, "rows 1"],
        finished: int,
    ) -> Float[Tensor, "copies some width"]:
        """Hidden states; of the noisy copies, each of which sees itself and what is finished before the block.

        finished: beyond all finished positions; in a cache, the noisy copies stand from there on
        """
        keys, of, slots = places, copy, places
        if self.cache is not None:
            noisy = copy[0] != WHOLE_ROW
            row = torch.arange(finished, device=places.device).expand(len(places), -1)
            keys = torch.cat([row, places[:, noisy]], dim=1)
            of = torch.cat([torch.full_like(row, WHOLE_ROW), copy[:, noisy]], dim=1)
            slots = torch.where(copy == WHOLE_ROW, places, finished + (copy != WHOLE_ROW).long().cumsum(dim=1) - 1)
        alike = (of == WHOLE_ROW)[:, None] | (of[:, None] == copy[..., None])
        mask = (
            self.model.sees(self.known(places, copy != WHOLE_ROW), self.known(keys, of != WHOLE_ROW))
            & alike
            & (keys < last)[:, None]
        )
        first_key = torch.arange(keys.shape[1], device=keys.device) == 0
        mask = mask | (places >= last)[..., None] & first_key  # no softmax is over nothing
        repeats = len(tokens) // len(places)
        mask, positions = mask.repeat(repeats, 1, 1), places.clamp(max=self.block.shape[1] - 1).repeat(repeats, 1)
        if self.cache is None:
            return self.model.hidden(tokens, mask, positions)
        length = keys.shape[1]
        with self.cache.attending(self.model.blocks, slots.repeat(repeats, 1), length, length):
            return self.model.hidden(tokens, mask, positions)


class CausalLogits(DraftLogits):
    """Without the noisy copies: the autoregressive mode."""

    drafts = False
