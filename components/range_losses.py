"""Losses of one id range from hidden states: only that range's rows of the unembedding are multiplied (and the end token's,
where it is allowed), which *is* the restriction of the distribution to the ids that may stand there.

A large range goes in chunks, recomputed in the backward pass, so the full logits are never held: by Liger's fused kernels where
they are installed and the tensors on a GPU (`pip install "trimodal-mdm[gpu]"`), else by PyTorch.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from components.divergence import chunked_divergence, divergence
from components.precision import precise
from components.types import Replaced
from components.vocabulary import IdRange
from components.weightings import untilted

RULED_OUT = -1e30  # a logit whose probability is 0, and its gradient too: minus infinity alone in a chunk would have none


def range_cross_entropy(
    hidden: Float[Tensor, "n width"],
    unembedding: Float[Tensor, "vocab width"],
    target: Int[Tensor, " n"],
    id_range: IdRange,
    end_id: int,
    mask_id: int,
    max_logits: int,
) -> Float[Tensor, " n"]:
    """-log p(target | hidden) with p restricted to the ids of one range (and the end token where it may end), in nats.

    The mask token is never among them, wherever its id lies. A target must be one of them: `positions_by_range` checks that.
    In float32, or float64 where the hidden states are.
    """
    own, end, column, ruled_out = _restricted(unembedding, target, id_range, end_id, mask_id)
    if len(hidden) * id_range.size <= max_logits:
        return torch.nn.functional.cross_entropy(_logits(hidden, [own, *end], ruled_out), column, reduction="none")
    fused = _liger(hidden.device.type)
    if fused is not None:
        rows = torch.cat([own, *end])
        bias = None
        if ruled_out >= 0:
            bias = rows.new_zeros(len(rows)).index_fill_(0, torch.tensor(ruled_out, device=rows.device), RULED_OUT)
        return precise(fused.apply(hidden, rows, column, bias, None, -100, 0.0, 0.0, "none")[0])
    pieces = [*own.split(max(max_logits // len(hidden), 1)), *end]
    log_z, at = _chunked(hidden, pieces, column[:, None], ruled_out)
    return log_z - at[:, 0]


def range_divergence(
    hidden: Float[Tensor, "n width"],
    unembedding: Float[Tensor, "vocab width"],
    target: Int[Tensor, " n"],
    replaced: Replaced,
    id_range: IdRange,
    end_id: int,
    mask_id: int,
    max_logits: int,
) -> Float[Tensor, " n"]:
    """The divergence D of components/divergence.py, with p restricted as in `range_cross_entropy`, in nats.

    Of leave-one-out p: `replaced.tilt`, where there is one, is taken off what the hidden states say.
    """
    own, end, column, ruled_out = _restricted(unembedding, target, id_range, end_id, mask_id)
    place = _restricted(unembedding, replaced.token, id_range, end_id, mask_id)[2].masked_fill(replaced.token == mask_id, -1)
    size = id_range.size + len(end) - (ruled_out >= 0)
    off = None if replaced.tilt is None else replaced.tilt.masked_fill(place < 0, 0.0)
    if len(hidden) * id_range.size <= max_logits:
        logits = _logits(hidden, [own, *end], ruled_out)
        if off is not None:
            logits = untilted(logits, place, off)
        return divergence(logits, column, place, replaced.alpha, replaced.uniform, size)
    pieces = [*own.split(max(max_logits // len(hidden), 1)), *end]
    columns = torch.stack([column, place.clamp(min=0)], dim=1)
    log_z, at = _chunked(hidden, pieces, columns, ruled_out)
    return chunked_divergence(
        hidden, pieces, ruled_out, log_z, at, columns, place < 0, off, replaced.alpha, replaced.uniform / size
    )


def range_rates(
    hidden: Float[Tensor, "n width"],
    unembedding: Float[Tensor, "vocab width"],
    log_rates: Float[Tensor, " vocab"],
    target: Int[Tensor, " n"],
    id_range: IdRange,
    end_id: int,
    mask_id: int,
    max_logits: int,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Where each id v has a rate w_v of its own: -log p'(target) of p' proportional to w p, and log of sum_v w_v p_v.

    p is restricted as in `range_cross_entropy`. Beyond `max_logits` it goes by some positions at a time.
    """
    own, end, column, ruled_out = _restricted(unembedding, target, id_range, end_id, mask_id)
    rated, closing, _, _ = _restricted(log_rates[:, None], target, id_range, end_id, mask_id)
    rows, log_w = torch.cat([own, *end]), torch.cat([rated, *closing])[:, 0]
    size = max(max_logits // len(rows), 1)
    found = []
    for chosen, at in zip(hidden.split(size), column.split(size), strict=True):
        args = (chosen, rows, log_w, at, ruled_out)
        found.append(_rated(*args) if len(hidden) <= size else checkpoint(_rated, *args, use_reentrant=False))
    nats, rates = zip(*found, strict=True)
    return torch.cat(nats), torch.cat(rates)


def _rated(
    hidden: Float[Tensor, "n width"], rows: Tensor, log_rates: Float[Tensor, " ids"], column: Int[Tensor, " n"], ruled_out: int
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    logits = _logits(hidden, [rows], ruled_out)
    tilted = logits + log_rates
    log_z = tilted.logsumexp(dim=1)
    return log_z - tilted.gather(1, column[:, None])[:, 0], log_z - logits.logsumexp(dim=1)


def _restricted(
    unembedding: Float[Tensor, "vocab width"], ids: Int[Tensor, " n"], id_range: IdRange, end_id: int, mask_id: int
) -> tuple[Float[Tensor, "rows width"], list[Float[Tensor, "1 width"]], Int[Tensor, " n"], int]:
    """A range's rows of the unembedding, the end token's where it is not among them, the columns that ids have in the two
    together, and the mask token's (-1: it is in neither)."""
    own, ruled_out = unembedding[id_range.start : id_range.stop], mask_id - id_range.start
    ruled_out = ruled_out if 0 <= ruled_out < id_range.size else -1
    if not id_range.may_end or id_range.start <= end_id < id_range.stop:
        return own, [], ids - id_range.start, ruled_out
    column = torch.where(ids == end_id, id_range.size, ids - id_range.start)
    return own, [unembedding[end_id : end_id + 1]], column, ruled_out


def _logits(hidden: Float[Tensor, "n width"], rows: list[Float[Tensor, "_ width"]], ruled_out: int) -> Float[Tensor, "n ids"]:
    logits = precise(hidden @ torch.cat(rows).T)
    if ruled_out >= 0:
        logits[:, ruled_out] = RULED_OUT
    return logits


def _chunked(
    hidden: Float[Tensor, "n width"],
    pieces: Sequence[Float[Tensor, "_ width"]],
    columns: Int[Tensor, "n some"],
    ruled_out: int,
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n some"]]:
    """log-sum-exp over all ids, and the logits at some columns, by a piece of the unembedding at a time."""
    log_z = precise(hidden.new_full((len(hidden),), -math.inf))
    found = torch.full_like(columns, -math.inf, dtype=log_z.dtype)
    start = 0
    for rows in pieces:
        chunk_z, chunk = checkpoint(_chunk, hidden, rows, columns - start, ruled_out - start, use_reentrant=False)
        inside = (columns >= start) & (columns < start + len(rows))
        log_z, found = torch.logaddexp(log_z, chunk_z), torch.where(inside, chunk, found)
        start += len(rows)
    return log_z, found


@functools.cache
def _liger(device: str) -> type[torch.autograd.Function] | None:
    """Liger's fused linear cross-entropy, a loss for each position; None where it (0.8 or later) is absent or cannot run."""
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import (  # pyright: ignore[reportMissingImports] (an extra)
            LigerFusedLinearCrossEntropyFunction,
        )
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyFunction


def _chunk(
    hidden: Float[Tensor, "n width"], rows: Float[Tensor, "rows width"], columns: Int[Tensor, "n some"], ruled_out: int
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n some"]]:
    """log-sum-exp over the chunk, and the logits at the columns that lie in it (another one elsewhere)."""
    logits = precise(hidden @ rows.T)
    if 0 <= ruled_out < len(rows):
        logits[:, ruled_out] = RULED_OUT
    return logits.logsumexp(dim=1), logits.gather(1, columns.clamp(0, len(rows) - 1))
