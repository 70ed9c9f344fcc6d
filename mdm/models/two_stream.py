"""Two streams (XLNet, 1906.08237; A3, 2601.13228): what stands at a position, asked without the token that stands there.

    content    tokens, each sees those up to its own rank
    queries    one vector for all (the mask token's embedding), told apart by their position alone; each sees the content of
               lower ranks, nothing that is asked beside it, and of the first rank nothing at all

All weights are shared: a row is [queries ; content], and the rule `two_streams` of components/visibility.py says who sees whom.
So one pass gives every term of -log p(x) in any order, and what is content never sees what comes later: its keys and values
are exact for good. Any masked or autoregressive checkpoint can go on so (`orders: two_streams` of a finetuning).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from components.visibility import FINISHED, NOISY, Places
from mdm.models.transformer import MaskedDiffusionModel

UNKNOWN = 2**40
"""The rank of a position whose token is not known."""


def hidden_at(
    model: MaskedDiffusionModel,
    tokens: Int[Tensor, "rows seq"],
    rank: Int[Tensor, "rows seq"],
    asked: Int[Tensor, "rows queries"],
    content: Int[Tensor, "rows some"],
    mask_id: int,
    kept: bool = False,
) -> Float[Tensor, "rows queries width"]:
    """Hidden states that predict the tokens at the positions `asked`, each from the content of lower ranks.

    rank:    of every position; UNKNOWN where the token is not known: nothing sees it
    content: positions that are computed as content: all; or, where the keys and values of the others are `kept` by a cache that
             attention asks, those that it lacks. As often as need be, asked and content may name seq, one position too far:
             nothing is there
    """
    length = tokens.shape[1]
    tokens, rank = pad(tokens, (0, 1)), pad(rank, (0, 1), value=UNKNOWN)
    shown = torch.cat([torch.full_like(asked, mask_id), tokens.gather(1, content)], dim=1)
    position = torch.cat([asked, content], dim=1)
    stream = torch.cat([torch.full_like(asked, NOISY), torch.full_like(content, FINISHED)], dim=1)
    places = Places(torch.zeros_like(position), position, rank.gather(1, position), stream)
    keys = places
    if kept:
        everywhere = torch.arange(length + 1, device=tokens.device).expand_as(rank)
        keys = Places(torch.zeros_like(rank), everywhere, rank, torch.full_like(rank, FINISHED))
    return model.hidden(shown, model.sees(places, keys), position.clamp(max=length - 1))[:, : asked.shape[1]]
