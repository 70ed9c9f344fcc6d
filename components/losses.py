"""The loss of a diffusion model, from hidden states or from anybody's logits.

    L = sum_i c_i D_i / denominator,    over the predicted positions i

D is the cross-entropy -log p(x_i | noisy) where noise is masks alone, and the divergence of components/divergence.py where a
token may have become any other. `coefficients` gives c and the denominator: c is the NELBO weight (MDLM, 2406.07524), what the
corruption has for training in its place, or 1 (plain, MaskGIT, 2202.04200).
Numerators and denominators are summed over micro-batches and ranks before the one division, so that how a batch is cut up
does not matter.

From hidden states no logit is computed that the loss does not need: the predicted positions are gathered per id range, and
only that range's ids are multiplied (components/range_losses.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.divergence import LEAST_UNIFORM, divergence
from components.precision import precise
from components.range_losses import range_cross_entropy, range_divergence
from components.types import PAD_DOCUMENT, STRUCTURE, Movable, NoisyBatch, Replaced
from components.vocabulary import Vocabulary


def coefficients(
    noisy: NoisyBatch,
    weighting: Literal["nelbo", "plain"] = "nelbo",
    reduction: Literal["sequence", "token"] = "sequence",
) -> tuple[Float[Tensor, "batch seq"], float]:
    """What each predicted position counts in the loss, and the loss's denominator. On the CPU, without a sync.

    weighting: "nelbo" weighs by -alpha'/(1 - alpha), or as the corruption says for training, and divides by maskable positions;
               "plain" weighs by 1 and divides by predicted ones
    reduction: "sequence" averages each document over its positions, then over documents (a four-token caption weighs as
               much as an image); "token" averages over all positions
    """
    counted = noisy.clean.maskable if weighting == "nelbo" else noisy.mask
    own = noisy.weight if noisy.training is None else noisy.training
    weight = own if weighting == "nelbo" else noisy.mask.float()
    if reduction == "token":
        return weight, float(counted.sum())
    ids, document = noisy.clean.document.unique(return_inverse=True)
    positions = torch.bincount(document.flatten(), counted.flatten().float(), minlength=len(ids))
    per_document = weight / positions.clamp(min=1)[document]
    return per_document.float(), float(((ids != PAD_DOCUMENT) & (positions > 0)).sum())


@dataclass(frozen=True)
class RangePositions(Movable):
    """The predicted positions of one id range: index into the flattened batch, target id, coefficient and NELBO weight.

    Rounded up to a multiple of the bucket with coefficient-0 entries, so that shapes repeat.

    replaced: where tokens may have become others; None: the loss is cross-entropy
    """

    range_index: int
    index: Int[Tensor, " n"]
    target: Int[Tensor, " n"]
    coefficient: Float[Tensor, " n"]
    weight: Float[Tensor, " n"]
    replaced: Replaced | None = None


def positions_by_range(
    targets: Int[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    id_range: Int[Tensor, "batch seq"],
    coefficient: Float[Tensor, "batch seq"],
    weight: Float[Tensor, "batch seq"],
    vocabulary: Vocabulary,
    bucket: int = 64,
    replaced: Replaced | None = None,
) -> list[RangePositions]:
    """Gathers the predicted positions per id range. Call it on the CPU, where the counts are known without a sync.

    replaced: of a batch whose tokens may have become others (`NoisyBatch.replaced`)

    Raises ValueError for a target outside the ids of its range (of which the mask token is none): no loss would be right.
    """
    flat_range = torch.where(mask, id_range, STRUCTURE).flatten()
    others = torch.zeros_like(mask) if replaced is None else replaced.uniform > 0
    kind = torch.where(flat_range == STRUCTURE, STRUCTURE, 2 * flat_range + others.flatten())
    found = []
    for k in kind.unique().tolist():
        if k == STRUCTURE:
            continue
        r, other = divmod(k, 2)
        index = (kind == k).nonzero()[:, 0]
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
                replaced=replaced.at(index) if replaced is not None and other else None,
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
    """Numerators: `loss` = sum of c_i D_i (differentiable); `nelbo` = sum of w_i D_i per id range, in nats (detached)."""

    loss: Float[Tensor, ""]
    nelbo: Float[Tensor, " ranges"]


def loss_from_hidden(
    hidden: Float[Tensor, "batch seq width"],
    unembedding: Float[Tensor, "vocab width"],
    positions: Sequence[RangePositions],
    vocabulary: Vocabulary,
    max_logits: int = 2**27,
) -> LossSums:
    """Sums over the predicted positions from hidden states.

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
        where = (own, vocabulary.end_id, vocabulary.mask_id, max_logits)
        if p.replaced is None or p.replaced.cross_entropy:
            trained = range_cross_entropy(chosen, unembedding, p.target, *where)
        else:
            trained = range_divergence(chosen, unembedding, p.target, replace(p.replaced, tilt=None), *where)
        bound = trained.detach()
        if p.replaced is not None and p.replaced.tilt is not None:  # the bound wants another distribution than the model learns
            with torch.no_grad():
                bound = range_divergence(chosen, unembedding, p.target, p.replaced, *where)
        loss = loss + (p.coefficient * trained).sum()
        nelbo[p.range_index] += (p.weight * bound).sum()
    return LossSums(loss, nelbo)


def loss_from_logits(
    logits: Float[Tensor, "batch seq vocab"],
    targets: Int[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    coefficient: Float[Tensor, "batch seq"],
    replaced: Replaced | None = None,
    mask_id: int | None = None,
) -> Float[Tensor, ""]:
    """Sum of c_i D_i over the predicted positions from anybody's logits (restrict them first where a vocabulary says so).

    replaced, mask_id: of a batch whose tokens may have become others; ids that may not stand somewhere, the mask among them,
                       have a logit of -inf there: noise is uniform over the others

    Raises ValueError, on a CPU, for a target that is none of the ids, or whose logit is -inf. (On a GPU PyTorch stops at the
    first, and the loss is infinite with the second: to look would be to wait for the device.)
    """
    own, chosen = targets[mask], precise(logits[mask])
    if own.device.type == "cpu":
        _check_logits(own, chosen)
    each = torch.nn.functional.cross_entropy(chosen, own, reduction="none")
    if replaced is not None and not replaced.cross_entropy:
        token, alpha, uniform = replaced.token[mask], replaced.alpha[mask], replaced.uniform[mask]
        place = token if mask_id is None else token.masked_fill(token == mask_id, -1)
        others = divergence(chosen, own, place, alpha, uniform.clamp(min=LEAST_UNIFORM), (chosen > -math.inf).sum(dim=1))
        each = torch.where(uniform > 0, others, each)
    return (coefficient[mask] * each).sum()


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
