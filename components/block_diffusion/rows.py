"""The noisy and the finished copy of a batch in one row, so that one pass trains all blocks (BD3-LM, 2503.09573).

    [ noisy positions of the blocks that are generated ; finished positions that a later block sees ]

Nothing else is computed: a document of one block after its prompt costs what it does without blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from components.types import PAD_DOCUMENT, Movable, NoisyBatch
from components.visibility import FINISHED, NOISY, Places

ROUND = 16  # widths repeat, so that few graphs are compiled


@dataclass(frozen=True)
class DoubledRows(Movable):
    """What the model is given in place of a noisy batch of blocks.

    content: of two streams, the last so many columns are the finished ones: nothing else is attended to
    column: in a row, of each position's noisy copy and then of each one's finished copy; -1 where it is left out
    """

    tokens: Int[Tensor, "batch width"]
    places: Places
    column: Int[Tensor, "batch both"]
    content: int | None = None

    @property
    def position(self) -> Int[Tensor, "batch width"]:
        """Of the rotations: a token and its noisy copy stand at the same."""
        assert self.places.position is not None
        return self.places.position

    @property
    def pairs(self) -> int:
        """Of how many pairs of positions one attends to the other, as the rules say (`doubled_causal` has some fewer)."""
        document, block = self.places.document, self.places.block
        assert block is not None
        here = document != PAD_DOCUMENT
        row = torch.arange(len(document))[:, None].expand_as(document)
        own = torch.stack([row[here], document[here]]).unique(dim=1, return_inverse=True)[1]
        shape = (int(own.max()) + 1, int(block.max()) + 1) if len(own) else (0, 1)
        place, noisy = own * shape[1] + block[here], self.places.stream[here] == NOISY  # pyright: ignore[reportOptionalSubscript]
        of = [torch.bincount(place[some], minlength=shape[0] * shape[1]).view(shape) for some in (noisy, ~noisy)]
        until = of[1].cumsum(dim=1)
        beside = of[0] if self.content is None else 0
        return int((of[0] * (beside + until - of[1]) + of[1] * until).sum())

    def index(self, flat: Int[Tensor, " n"], stream: int) -> Int[Tensor, " n"]:
        """Places of the flattened batch -> of the flattened rows."""
        length = self.column.shape[1] // 2
        row, position = flat // length, flat % length
        return row * self.tokens.shape[1] + self.column[row, position + stream * length]


def doubled_rows(noisy: NoisyBatch, next_token: bool = False) -> DoubledRows:
    """The rows of a batch that a `BlockMasker` or an `OrderMasker` has made. On the CPU, where counts are known without a sync.

    next_token: finished positions are predicted from, too: none of a generated block is left out
    """
    batch, block = noisy.clean, noisy.block
    assert block is not None
    present = batch.document != PAD_DOCUMENT
    ids, document = batch.document.unique(return_inverse=True)
    last = torch.full((len(ids),), -1).scatter_reduce(0, document[batch.maskable], block[batch.maskable], "amax")[document]
    wanted = [present & _generated(block, batch.maskable, document), present & (block < last + next_token)]
    if noisy.apart:  # each at columns of their own
        (order, here, column), (behind, there, other) = (_packed(flags) for flags in wanted)
        other = torch.where(wanted[1], other + order.shape[1], -1)
        order, here = torch.cat([order, behind + block.shape[1]], dim=1), torch.cat([here, there], dim=1)
        column, content = torch.cat([column, other], dim=1), behind.shape[1]
    else:
        (order, here, column), content = _packed(torch.cat(wanted, dim=1)), None

    def both(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first, second], dim=1).gather(1, order)

    streams = both(torch.full_like(block, NOISY), torch.full_like(block, FINISHED))
    at = Places(both(batch.document, batch.document), both(batch.position, batch.position), both(block, block), streams)
    places = Places(
        torch.where(here, at.document, PAD_DOCUMENT), *(_zeroed(v, here) for v in (at.position, at.block, at.stream))
    )
    return DoubledRows(both(noisy.noisy, batch.tokens), places, column, content)


def _packed(wanted: Bool[Tensor, "batch all"]) -> tuple[Tensor, Tensor, Tensor]:
    """Which of all are at each column, where there is one, and the column of each."""
    width = max(-(-int(wanted.sum(dim=1).max()) // ROUND), 1) * ROUND
    order = (~wanted).long().argsort(dim=1, stable=True)[:, :width]
    order = torch.nn.functional.pad(order, (0, max(width - order.shape[1], 0)))
    here = torch.arange(width) < wanted.sum(dim=1, keepdim=True)
    return order, here, torch.where(wanted, wanted.long().cumsum(dim=1) - 1, -1)


def _zeroed(values: Tensor | None, here: Bool[Tensor, "batch width"]) -> Tensor:
    assert values is not None
    return torch.where(here, values, 0)


def _generated(
    block: Int[Tensor, "batch seq"], maskable: Bool[Tensor, "batch seq"], document: Int[Tensor, "batch seq"]
) -> Bool[Tensor, "batch seq"]:
    """Positions of blocks in which anything is generated."""
    key = document * (int(block.max()) + 1) + block
    return torch.isin(key, key[maskable])
