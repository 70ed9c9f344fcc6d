"""Likelihood of given tokens under a masked diffusion model, for any logits function; conditional on whatever is not scored.

    NELBO          E_k [ L/k * sum over k masked positions of -log p(x_i | the others) ],  k uniform on 1..L      >= -log p(x)
    any order      log p(x) = sum_j log p(x_o(j) | the tokens before it in the order o),  L forwards a sequence

The first is a bound by Monte Carlo: k is stratified over the draws of a sequence, so that few of them cover all mask rates. The
second is exact for the order that is asked for, from left to right if none is. The NELBO is its mean over all orders (RADD,
2406.03736; any-order autoregressive models, 2110.02037). Noise of other kinds has a bound of its own (`corrupted_nelbo`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.corruption import Corruption
from components.divergence import divergence
from components.noise import sample_rng
from components.precision import precise
from components.samplers.base import LogitsFn, Selectable, ruled_out
from components.types import Batch, NoisyBatch
from components.vocabulary import Vocabulary
from components.weightings import untilted


@dataclass(frozen=True)
class Bound:
    """nats: the NELBO of each sequence, an upper bound of -log p; error: its standard error over the draws."""

    nats: Float[Tensor, " batch"]
    error: Float[Tensor, " batch"]

    @classmethod
    def of(cls, each: Float[Tensor, "batch draws"]) -> Bound:
        """From the bound that each draw estimates."""
        return cls(each.mean(dim=1), each.std(dim=1) / each.shape[1] ** 0.5)

    @classmethod
    def finite(cls, each: Float[Tensor, "batch draws"]) -> Bound:
        """The same. Raises ValueError for what is no number."""
        if not bool(each.isfinite().all()):
            row = int((~each.isfinite()).nonzero()[0, 0])
            raise ValueError(f"likelihood: the bound of row {row} is not finite (broken weights, or an overflow of float16?)")
        return cls.of(each)


@torch.no_grad()
def nelbo(
    logits_fn: LogitsFn,
    tokens: Int[Tensor, "batch seq"],
    mask_id: int,
    scored: Bool[Tensor, "batch seq"] | None = None,
    allowed: Bool[Tensor, "#batch #seq vocab"] | None = None,
    draws: int = 16,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Bound:
    """The NELBO of each sequence, in nats.

    scored:     positions whose likelihood is asked for; the others are the prompt. None is all
    allowed:    ids that may stand at each position (the softmax is over them); the mask token never may
    draws:      masks of each sequence; batch_size: rows of a forward pass
    progress:   called with the number of rows done

    Raises ValueError for a row without a scored position, a scored token that may not stand there, NaN logits, and fewer than
    two draws (there is no error then).
    """
    scored = torch.ones_like(tokens, dtype=torch.bool) if scored is None else scored
    if draws < 2:
        raise ValueError(f"nelbo: draws must be at least 2, got {draws}")
    lengths = _lengths(scored)
    _check_targets(tokens, scored, mask_id, allowed)
    masks = torch.from_numpy(
        np.stack([_stratified_masks(row.cpu().numpy(), draws, seed, i) for i, row in enumerate(scored)])
    ).to(tokens.device)  # [batch, draws, seq]
    log_p = score(logits_fn, tokens, masks, mask_id, allowed, batch_size, progress)
    weight = lengths[:, None] / masks.sum(dim=2)
    each = -weight * log_p.sum(dim=2)
    return Bound.of(each)


@torch.no_grad()
def corrupted_nelbo(
    logits_fn: LogitsFn,
    batch: Batch,
    corruption: Corruption,
    vocabulary: Vocabulary,
    draws: int = 16,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> Bound:
    """The bound of each row under any corruption: of its maskable positions, given the others, in nats.

    batch:      a document a row; what is drawn is a function of its place in the batch
    corruption: its times should cover all noise levels over `draws` consecutive samples: LowDiscrepancyTimes(draws)

    Bounds of different corruptions are not comparable by their tightness. Raises ValueError for one whose weighted loss is no
    bound, NaN logits, and fewer than two draws.
    """
    if not getattr(corruption, "complete", True):
        raise ValueError(
            f"nelbo: {type(corruption).__name__} is not complete (a schedule that does not meet both ends, or a time for each "
            "token), so that its weighted loss is no bound"
        )
    if draws < 2:
        raise ValueError(f"nelbo: draws must be at least 2, got {draws}")
    rows = torch.arange(len(batch.tokens)).repeat_interleave(draws)
    noisy = corruption(batch.repeated(draws))
    allowed, found = vocabulary.allowed(batch.id_range), torch.zeros(len(rows), dtype=torch.float64)
    for part in torch.arange(len(rows)).split(batch_size):
        fn = logits_fn.select(rows[part]) if isinstance(logits_fn, Selectable) else logits_fn
        logits = precise(fn(noisy.noisy[part])).masked_fill(~allowed[rows[part]], float("-inf"))
        found[part] = _weighed(logits, noisy, part, vocabulary.mask_id)
        if not bool(found[part].isfinite().all()):
            row = int(rows[part][~found[part].isfinite()][0])
            raise ValueError(f"likelihood: the bound of row {row} is not finite (broken weights, or an overflow of float16?)")
        if progress is not None:
            progress(len(part))
    each = found.reshape(-1, draws)
    return Bound.of(each)


def _weighed(
    logits: Float[Tensor, "rows seq vocab"], noisy: NoisyBatch, rows: Int[Tensor, " rows"], mask_id: int
) -> Float[Tensor, " rows"]:
    """What some rows of a noisy batch add to their bound: weight times D at every predicted position."""
    mask, target = noisy.mask[rows], noisy.clean.tokens[rows]
    log_p = logits - logits.logsumexp(dim=-1, keepdim=True)
    each = -torch.where(mask, log_p.gather(-1, target[..., None])[..., 0], 0.0)
    if noisy.replaced is not None:
        others = mask & (noisy.replaced.uniform[rows] > 0)
        here = noisy.replaced.at((torch.arange(noisy.mask.numel()).view_as(noisy.mask)[rows])[others])
        place, chosen = here.token.masked_fill(here.token == mask_id, -1), logits[others]
        size = (chosen > float("-inf")).sum(dim=1)
        chosen = chosen if here.tilt is None else untilted(chosen, place, here.tilt)
        each[others] = divergence(chosen, target[others], place, here.alpha, here.uniform, size).to(each.dtype)
    return (noisy.weight[rows].double() * each.double()).sum(dim=1)


@torch.no_grad()
def ordered(
    logits_fn: LogitsFn,
    tokens: Int[Tensor, "batch seq"],
    mask_id: int,
    scored: Bool[Tensor, "batch seq"] | None = None,
    order: Int[Tensor, "batch seq"] | None = None,
    allowed: Bool[Tensor, "#batch #seq vocab"] | None = None,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> Float[Tensor, "batch seq"]:
    """log p of each scored token given the prompt and the tokens before it in the order, in nats; 0 elsewhere.

    Their sum over a row is the model's exact log-likelihood in that order.

    order: a rank for each position, lower is earlier; None is left to right

    Raises ValueError for a row without a scored position, a scored token that may not stand there, and NaN logits.
    """
    scored = torch.ones_like(tokens, dtype=torch.bool) if scored is None else scored
    _lengths(scored)
    _check_targets(tokens, scored, mask_id, allowed)
    rank = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens) if order is None else order
    rank = rank.masked_fill(~scored, int(1e9)).argsort(dim=1, stable=True).argsort(dim=1)
    steps = torch.arange(int(scored.sum(dim=1).max()), device=tokens.device)
    masks = scored[:, None] & (rank[:, None] >= steps[None, :, None])  # [batch, steps, seq]: what is not known at each step
    log_p = score(logits_fn, tokens, masks, mask_id, allowed, batch_size, progress)
    return (log_p * (rank[:, None] == steps[None, :, None])).sum(dim=1)


def score(
    logits_fn: LogitsFn,
    tokens: Int[Tensor, "batch seq"],
    masks: Bool[Tensor, "batch variants seq"],
    mask_id: int,
    allowed: Bool[Tensor, "#batch #seq vocab"] | None,
    batch_size: int,
    progress: Callable[[int], object] | None,
) -> Float[Tensor, "batch variants seq"]:
    """log p of the masked tokens of every variant of every sequence, 0 at visible ones. Raises ValueError for NaN logits."""
    batch, variants, seq = masks.shape
    flat = masks.reshape(-1, seq)
    rows = torch.arange(batch, device=tokens.device).repeat_interleave(variants)
    out = torch.zeros(flat.shape, dtype=torch.float64, device=tokens.device)
    needed = flat.any(dim=1).nonzero()[:, 0]
    for part in needed.split(batch_size):
        own = rows[part]
        fn = logits_fn.select(own) if isinstance(logits_fn, Selectable) else logits_fn
        logits = precise(fn(tokens[own].masked_fill(flat[part], mask_id)))
        barred = ruled_out(allowed if allowed is None or len(allowed) == 1 else allowed[own], mask_id, logits)
        logits = logits.masked_fill(barred, float("-inf"))
        chosen, log_z = logits.gather(-1, tokens[own][..., None])[..., 0].double(), logits.logsumexp(dim=-1).double()
        out[part] = torch.where(flat[part], chosen - log_z, 0.0)
        broken = flat[part] & ~log_z.isfinite()
        if bool(broken.any()):
            row, position = broken.nonzero()[0].tolist()
            raise ValueError(
                f"likelihood: the logits at position {position} of row {int(own[row])} are NaN, infinite or rule out every id "
                "(broken weights, or an overflow of float16?)"
            )
        if progress is not None:
            progress(len(part))
    return out.reshape(masks.shape)


def _stratified_masks(scored: np.ndarray, draws: int, seed: int, index: int) -> Bool[np.ndarray, "draws seq"]:
    """Masks of k positions, k = ceil(t L) with one t in each of `draws` equal strata of (0, 1]."""
    rng = sample_rng(seed, "mask", index)
    positions = np.flatnonzero(scored)
    t = (np.arange(draws) + 1 - rng.random(draws)) / draws
    masks = np.zeros((draws, len(scored)), dtype=bool)
    for mask, k in zip(masks, np.ceil(t * len(positions)).astype(int), strict=True):
        mask[rng.choice(positions, size=k, replace=False)] = True
    return masks


def _check_targets(tokens: Tensor, scored: Tensor, mask_id: int, allowed: Tensor | None) -> None:
    """Raises ValueError for a scored token that may not stand where it is: its likelihood would be 0, whatever the model."""
    wrong = tokens == mask_id
    if allowed is not None:
        known = (tokens >= 0) & (tokens < allowed.shape[-1])
        ids = tokens.clamp(0, allowed.shape[-1] - 1)[..., None]
        wrong = wrong | ~known | ~allowed.expand(*tokens.shape, -1).gather(-1, ids)[..., 0]
    wrong = wrong & scored
    if bool(wrong.any()):
        row, position = wrong.nonzero()[0].tolist()
        which = "the mask token" if int(tokens[row, position]) == mask_id else "not allowed there"
        raise ValueError(f"likelihood: token {int(tokens[row, position])} at position {position} of row {row} is {which}")


def _lengths(scored: Bool[Tensor, "batch seq"]) -> Int[Tensor, " batch"]:
    lengths = scored.sum(dim=1)
    if bool((lengths == 0).any()):
        raise ValueError(f"likelihood: row {int((lengths == 0).nonzero()[0])} has no scored position")
    return lengths
