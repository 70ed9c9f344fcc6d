"""Masked cross-entropy, from hidden states or from anybody's logits.

    L = sum_i c_i (-log p(x_i | noisy)) / denominator,    over the masked positions i

`coefficients` gives c and the denominator: c is the NELBO weight (MDLM, 2406.07524) or 1 (plain, MaskGIT, 2202.04200).
Numerators and denominators are summed over micro-batches and ranks before the one division, so that how a batch is cut up
does not matter.

From hidden states no logit is computed that the loss does not need: the masked positions are gathered per id range, and
only that range's rows of the unembedding (and the end token's, where it is allowed) are multiplied, which *is* the
restriction of the distribution to the ids that may stand there. A large range goes in chunks, recomputed in the backward
pass, so the full logits are never held: by Liger's fused kernels where they are installed and the tensors on a GPU
(`pip install "trimodal-mdm[gpu]"`), else by PyTorch.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from components.precision import precise
from components.types import PAD_DOCUMENT, STRUCTURE, Movable, NoisyBatch
from components.vocabulary import IdRange, Vocabulary

RULED_OUT = -1e30  # a logit whose probability is 0, and its gradient too: minus infinity alone in a chunk would have none


def coefficients(
    noisy: NoisyBatch,
    weighting: Literal["nelbo", "plain"] = "nelbo",
    reduction: Literal["sequence", "token"] = "sequence",
) -> tuple[Float[Tensor, "batch seq"], float]:
    """What each masked position's cross-entropy counts in the loss, and the loss's denominator. On the CPU, without a sync.

    weighting: "nelbo" weighs by -alpha'/(1 - alpha) and divides by maskable positions; "plain" weighs by 1 and divides by
               masked ones
    reduction: "sequence" averages each document over its positions, then over documents (a four-token caption weighs as
               much as an image); "token" averages over all positions
    """
    counted = noisy.clean.maskable if weighting == "nelbo" else noisy.mask
    weight = noisy.weight if weighting == "nelbo" else noisy.mask.float()
    if reduction == "token":
        return weight, float(counted.sum())
    ids, document = noisy.clean.document.unique(return_inverse=True)
    positions = torch.bincount(document.flatten(), counted.flatten().float(), minlength=len(ids))
    per_document = weight / positions.clamp(min=1)[document]
    return per_document.float(), float(((ids != PAD_DOCUMENT) & (positions > 0)).sum())


@dataclass(frozen=True)
class RangePositions(Movable):
    """The masked positions of one id range: index into the flattened batch, target id, coefficient and NELBO weight.

    Rounded up to a multiple of the bucket with coefficient-0 entries, so that shapes repeat.
    """

    range_index: int
    index: Int[Tensor, " n"]
    target: Int[Tensor, " n"]
    coefficient: Float[Tensor, " n"]
    weight: Float[Tensor, " n"]


def positions_by_range(
    targets: Int[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    id_range: Int[Tensor, "batch seq"],
    coefficient: Float[Tensor, "batch seq"],
    weight: Float[Tensor, "batch seq"],
    vocabulary: Vocabulary,
    bucket: int = 64,
) -> list[RangePositions]:
    """Gathers the masked positions per id range. Call it on the CPU, where the counts are known without a sync.

    Raises ValueError for a target outside the ids of its range (of which the mask token is none): no loss would be right.
    """
    flat_range = torch.where(mask, id_range, STRUCTURE).flatten()
    found = []
    for r in flat_range.unique().tolist():
        if r == STRUCTURE:
            continue
        index = (flat_range == r).nonzero()[:, 0]
        _check_targets(targets.flatten()[index], index, targets.shape[1], vocabulary, r)
        fill = -len(index) % bucket
        index = torch.cat([index, index[:1].expand(fill)])  # the first position stands in; its coefficient below is 0
        valid = torch.arange(len(index)) < len(index) - fill
        found.append(
            RangePositions(
                range_index=r,
                index=index,
                target=targets.flatten()[index],
                coefficient=torch.where(valid, coefficient.flatten()[index].float(), 0.0),
                weight=torch.where(valid, weight.flatten()[index].float(), 0.0),
            )
        )
    return found


def _check_targets(
    target: Int[Tensor, " n"], index: Int[Tensor, " n"], length: int, vocabulary: Vocabulary, range_index: int
) -> None:
    own = vocabulary.ranges[range_index]
    known = (target >= own.start) & (target < own.stop)
    if own.may_end:
        known |= target == vocabulary.end_id
    wrong = ~known | (target == vocabulary.mask_id)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        row, position = divmod(int(index[first]), length)
        end = f", or the end token {vocabulary.end_id}" if own.may_end else ""
        raise ValueError(
            f"loss: the target at row {row}, position {position} is {int(target[first])}, which cannot stand in the range "
            f"{own.name!r}: ids {own.start} to {own.stop - 1}{end}, and not the mask token {vocabulary.mask_id}"
        )


@dataclass(frozen=True)
class LossSums:
    """Numerators: `loss` = sum of c_i CE_i (differentiable); `nelbo` = sum of w_i CE_i per id range, in nats (detached)."""

    loss: Float[Tensor, ""]
    nelbo: Float[Tensor, " ranges"]


def loss_from_hidden(
    hidden: Float[Tensor, "batch seq width"],
    unembedding: Float[Tensor, "vocab width"],
    positions: Sequence[RangePositions],
    vocabulary: Vocabulary,
    max_logits: int = 2**27,
) -> LossSums:
    """Sums over the masked positions from hidden states.

    max_logits: logits held at once, at the most (the default is 0.5 GB in float32); a range that would make more goes in
                chunks, computed again in the backward pass
    """
    flat = hidden.flatten(0, 1)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    loss = flat.new_zeros((), dtype=dtype)
    if not positions:  # a gradient all the same, of every weight: ranks exchange them
        loss = (precise(flat).sum() + precise(unembedding[:1]).sum()) * 0
    nelbo = flat.new_zeros(len(vocabulary.ranges), dtype=dtype)
    for p in positions:
        own = vocabulary.ranges[p.range_index]
        chosen = flat.index_select(0, p.index)
        ce = range_cross_entropy(chosen, unembedding, p.target, own, vocabulary.end_id, vocabulary.mask_id, max_logits)
        loss = loss + (p.coefficient * ce).sum()
        nelbo[p.range_index] = (p.weight * ce.detach()).sum()
    return LossSums(loss, nelbo)


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
    end_outside = id_range.may_end and not id_range.start <= end_id < id_range.stop
    end = [unembedding[end_id : end_id + 1]] if end_outside else []
    column = torch.where(target == end_id, id_range.size, target - id_range.start) if end_outside else target - id_range.start
    own, ruled_out = unembedding[id_range.start : id_range.stop], mask_id - id_range.start
    if len(hidden) * id_range.size <= max_logits:
        logits = precise(hidden @ torch.cat([own, *end]).T)
        if 0 <= ruled_out < id_range.size:
            logits[:, ruled_out] = RULED_OUT
        return torch.nn.functional.cross_entropy(logits, column, reduction="none")
    fused = _liger(hidden.device.type)
    if fused is not None:
        rows = torch.cat([own, *end])
        bias = None
        if 0 <= ruled_out < id_range.size:
            bias = rows.new_zeros(len(rows)).index_fill_(0, torch.tensor(ruled_out, device=rows.device), RULED_OUT)
        return precise(fused.apply(hidden, rows, column, bias, None, -100, 0.0, 0.0, "none")[0])
    log_z = precise(hidden.new_full((len(hidden),), -math.inf))
    at_target = torch.full_like(log_z, -math.inf)
    start = 0
    for rows in [*own.split(max(max_logits // len(hidden), 1)), *end]:
        out = ruled_out - start if start < id_range.size else -1
        chunk_z, chunk_target = checkpoint(_chunk, hidden, rows, column - start, out, use_reentrant=False)
        inside = (column >= start) & (column < start + len(rows))
        log_z, at_target = torch.logaddexp(log_z, chunk_z), torch.where(inside, chunk_target, at_target)
        start += len(rows)
    return log_z - at_target


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
    hidden: Float[Tensor, "n width"], rows: Float[Tensor, "rows width"], column: Int[Tensor, " n"], ruled_out: int
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """log-sum-exp over the chunk, and the target's logit where the target lies in it (another one elsewhere)."""
    logits = precise(hidden @ rows.T)
    if 0 <= ruled_out < len(rows):
        logits[:, ruled_out] = RULED_OUT
    return logits.logsumexp(dim=1), logits.gather(1, column.clamp(0, len(rows) - 1)[:, None])[:, 0]


def loss_from_logits(
    logits: Float[Tensor, "batch seq vocab"],
    targets: Int[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    coefficient: Float[Tensor, "batch seq"],
) -> Float[Tensor, ""]:
    """Sum of c_i CE_i over the masked positions from anybody's logits (restrict them first where a vocabulary says so).

    Raises ValueError, on a CPU, for a target that is none of the ids, or whose logit is -inf. (On a GPU PyTorch stops at the
    first, and the loss is infinite with the second: to look would be to wait for the device.)
    """
    own, chosen = targets[mask], precise(logits[mask])
    if own.device.type == "cpu":
        _check_logits(own, chosen)
    ce = torch.nn.functional.cross_entropy(chosen, own, reduction="none")
    return (coefficient[mask] * ce).sum()


def _check_logits(targets: Int[Tensor, " n"], logits: Float[Tensor, "n vocab"]) -> None:
    size = logits.shape[1]
    outside = (targets < 0) | (targets >= size)
    if bool(outside.any()):
        raise ValueError(f"loss: the target {int(targets[outside][0])} is none of the {size} ids that there are logits of")
    ruled_out = logits.gather(1, targets[:, None])[:, 0] == -math.inf
    if bool(ruled_out.any()):
        raise ValueError(f"loss: the target {int(targets[ruled_out][0])} is ruled out where it stands: its logit is -inf")


def bits_per_token(nelbo_nats: float, tokens: int) -> float:
    """NELBO in bits per token; `tokens` counts each canvas up to and including its first end token."""
    return nelbo_nats / math.log(2) / max(tokens, 1)


def bits_per_byte(nelbo_nats: float, text_bytes: int) -> float:
    """NELBO of text in bits per byte of the text it encodes: comparable between tokenizers."""
    return nelbo_nats / math.log(2) / max(text_bytes, 1)
