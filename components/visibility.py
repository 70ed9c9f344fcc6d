"""Who may attend to whom: pure functions of what is known of two positions, and the attention masks they make.

    same_document    every position of its document: masked diffusion, packed or padded
    causal           those before it: an autoregressive model
    block_causal     those of its block and of earlier ones: block diffusion without a noisy copy
    doubled          block diffusion in training and in decoding (BD3-LM, 2503.09573): a noisy position sees its own block's
                     noisy ones and the finished ones of earlier blocks; a finished one, the finished ones up to its block
    two_streams      any order in one pass (XLNet, 1906.08237): a query, which holds no token, sees the finished positions of
                     earlier ranks; a finished one those up to its own rank
    doubled_causal   the same, but a finished position sees no finished one behind it: its hidden state can predict the next
                     token (an autoregressive model in the same weights)

A rule must be transitive, or what a layer hides another one leaks: if q sees m and m sees k, q may see k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from components.types import Movable

NOISY, FINISHED = 0, 1
"""The streams of a doubled row."""


@dataclass(frozen=True)
class Places(Movable):
    """What is known of positions. Of padding, document is an id of its own; it sees padding alone, and nothing sees it.

    position: index inside the document
    block:    of block diffusion, in the order of decoding; of two streams, the rank
    stream:   NOISY (a query of two streams) or FINISHED, where a row holds both
    """

    document: Int[Tensor, "*batch seq"]
    position: Int[Tensor, "*batch seq"] | None = None
    block: Int[Tensor, "*batch seq"] | None = None
    stream: Int[Tensor, "*batch seq"] | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Places:
        """The same with each of its tensors changed."""
        others = (self.position, self.block, self.stream)
        return Places(change(self.document), *(None if value is None else change(value) for value in others))


Rule = Callable[[Any, Any], Any]
"""(query, key) -> whether the query may attend to the key: two `Places` of shapes that broadcast."""


def same_document(q: Any, k: Any) -> Any:
    """Every position of the document."""
    return q.document == k.document


def causal(q: Any, k: Any) -> Any:
    """Those of the document up to the query."""
    return same_document(q, k) & (k.position <= q.position)


def block_causal(q: Any, k: Any) -> Any:
    """Those of the document up to the end of the query's block."""
    return same_document(q, k) & (k.block <= q.block)


def doubled(q: Any, k: Any) -> Any:
    """Noisy: its own block's noisy ones, and the finished of earlier blocks. Finished: the finished up to its block."""
    return same_document(q, k) & (_noisy(q, k) | (k.stream == FINISHED) & (q.stream == FINISHED) & (k.block <= q.block))


def doubled_causal(q: Any, k: Any) -> Any:
    """`doubled`, but a finished position sees no finished one behind it."""
    return same_document(q, k) & (_noisy(q, k) | (k.stream == FINISHED) & (q.stream == FINISHED) & (k.position <= q.position))


def two_streams(q: Any, k: Any) -> Any:
    """A query (NOISY): the finished of earlier ranks, nothing of the first. Finished: the finished up to its rank."""
    own = (q.stream == FINISHED) & (k.block == q.block)
    return same_document(q, k) & (k.stream == FINISHED) & ((k.block < q.block) | own)


def _noisy(q: Any, k: Any) -> Any:
    """What a noisy position may see."""
    beside = (k.stream == NOISY) & (k.block == q.block)
    return (q.stream == NOISY) & (beside | (k.stream == FINISHED) & (k.block < q.block))


def attention_mask(
    rule: Rule, places: Places, keys: Places | None = None, last: int | None = None
) -> Bool[Tensor, "batch queries keys"] | Any:
    """The mask of a rule: True where a query may attend to a key.

    keys: None are the queries themselves, or the `last` of them (components/blocks.py attends to as many as the mask has)

    On CUDA, where queries are the keys, a FlexAttention BlockMask, which skips blocks that nobody sees; a boolean tensor else.
    """
    if keys is None and places.document.is_cuda:
        from torch.nn.attention.flex_attention import create_block_mask

        batch, seq = places.document.shape
        skipped = 0 if last is None else seq - last

        def may_attend(b: Int[Tensor, ""], h: Int[Tensor, ""], q: Int[Tensor, ""], k: Int[Tensor, ""]) -> Bool[Tensor, ""]:
            return rule(places.map(lambda own: own[b, q]), places.map(lambda own: own[b, k + skipped]))

        return create_block_mask(may_attend, batch, None, seq, seq - skipped, device=places.document.device)
    if keys is None:
        keys = places if last is None else places.map(lambda own: own[:, -last:])
    return rule(places.map(lambda own: own[..., :, None]), keys.map(lambda own: own[..., None, :]))
