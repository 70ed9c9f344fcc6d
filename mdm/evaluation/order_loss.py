"""The loss and the bound of a model of learned orders (components/learned_orders.py), from the rows as they are.

    clean rows -> forward exponents -> masks of each sample -> one pass over them all -> reverse exponents and -log p

How many positions each document masks was drawn with the batch on the CPU, so nothing has to be counted on the device: of each
id range as many positions are gathered as may be masked at the most, the others weigh nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from components.learned_orders import LearnedOrderMasker, density, leave_one_out, log_probability, ranks
from components.likelihood import Bound
from components.losses import LossSums, RangePositions
from components.maskers import LowDiscrepancyTimes
from components.range_losses import range_cross_entropy, range_rates
from components.types import Arrivals, Batch
from components.visibility import Places
from components.vocabulary import Vocabulary
from mdm.data.pipeline import MicroBatch, micro_batch
from mdm.data.settings import LossSettings
from mdm.hardware import local
from mdm.models.orders import LearnedOrder, TokenRates
from mdm.models.transformer import MaskedDiffusionModel

MAX_LOGITS = 2**27  # held at once
BUCKET = 64  # that numbers of positions are rounded up to, so that shapes repeat


@dataclass(frozen=True)
class Masked:
    """The samples of a micro-batch. A place is an index into a flattened sample.

    forward:  exponent of each maskable place;  reverse: of each sample too, where heads say so
    masked:   which places are masked;  total: sum of forward exponents over a document's;  owner: each place's document
    chance:   log-probability of what was drawn
    hidden:   hidden states
    """

    forward: Float[Tensor, " places"]
    reverse: Float[Tensor, "samples places"] | None
    masked: Bool[Tensor, "samples places"]
    total: Float[Tensor, "samples documents"]
    owner: Int[Tensor, " places"]
    chance: Float[Tensor, "samples documents"]
    hidden: Float[Tensor, "samples places width"]


@dataclass(frozen=True)
class Terms:
    """Of some places of every sample, what they add to the bound, and to the loss; 0 where one is not masked."""

    owner: Int[Tensor, "samples n"]
    bound: Float[Tensor, "samples n"]
    trained: Float[Tensor, "samples n"]


def order_loss(model: MaskedDiffusionModel, micro: MicroBatch, vocabulary: Vocabulary) -> LossSums:
    """Sums over the samples' masked positions, each sample weighing alike; see `components.losses.LossSums`.

    With two samples the loss has the gradient of what was drawn too (RLOO), which its value does not show.
    """
    drawn = draw_masks(model, micro, vocabulary.mask_id)
    samples, documents = drawn.total.shape
    loss = drawn.hidden.new_zeros((), dtype=drawn.forward.dtype)
    each = loss.new_zeros(samples * documents)
    nelbo = loss.new_zeros(len(vocabulary.ranges))
    row = torch.arange(samples, device=loss.device)[:, None] * documents
    if not micro.positions:  # a gradient all the same, of every weight: ranks exchange them
        parts = (drawn.hidden, drawn.forward, drawn.reverse, local(model.unembedding.weight)[:1])
        loss = torch.stack([part.sum() for part in parts if part is not None]).sum() * 0
    for p in micro.positions:
        terms = _terms(model, drawn, p, micro.noisy.arrivals, vocabulary)
        loss = loss + terms.trained.sum() / samples
        nelbo[p.range_index] += terms.bound.detach().sum() / samples
        each = each.index_add(0, (row + terms.owner).flatten(), terms.trained.detach().flatten())
    if samples == 2:
        loss = loss + leave_one_out(each.view(2, documents), drawn.chance).sum()
    return LossSums(loss, nelbo)


@torch.no_grad()
def order_nelbo(
    model: MaskedDiffusionModel, batch: Batch, vocabulary: Vocabulary, draws: int = 16, batch_size: int = 64, seed: int = 0
) -> Bound:
    """The bound of each row (a document, on the CPU): of its maskable positions given the others, in nats.

    draws: of a row, whose counts of masks are spread evenly;  batch_size: masked rows of a pass

    Raises ValueError for fewer than two draws, a row of which nothing is maskable, and for what is no number.
    """
    if draws < 2:
        raise ValueError(f"nelbo: draws must be at least 2, got {draws}")
    if not bool((scored := batch.maskable.any(dim=1)).all()):
        raise ValueError(f"likelihood: row {int((~scored).nonzero()[0])} has no scored position")
    own = batch.repeated(draws)
    masker = LearnedOrderMasker(vocabulary.mask_id, LowDiscrepancyTimes(draws), samples=1, seed=seed)
    found = []
    for part in torch.arange(len(own.tokens)).split(batch_size):
        micro = micro_batch(own.select(part), masker, LossSettings(reduction="token"), vocabulary)
        found.append(document_nats(model, micro.to(model.embedding.weight.device), vocabulary).cpu())
    each = torch.cat(found).reshape(-1, draws)
    return Bound.finite(each)


def document_nats(model: MaskedDiffusionModel, micro: MicroBatch, vocabulary: Vocabulary) -> Float[Tensor, " documents"]:
    """What each document's first sample estimates its bound to be, in nats."""
    drawn = draw_masks(model, micro, vocabulary.mask_id)
    each = drawn.total.new_zeros(drawn.total.shape[1], dtype=torch.float64)
    for p in micro.positions:
        terms = _terms(model, drawn, p, micro.noisy.arrivals, vocabulary)
        each.index_add_(0, terms.owner[0], terms.bound[0].double())
    return each


def draw_masks(model: MaskedDiffusionModel, micro: MicroBatch, mask_id: int) -> Masked:
    """Masks every sample of a micro-batch by the model's own exponents, and passes them all through it."""
    clean, noise = micro.noisy.clean, micro.noisy.arrivals
    assert noise is not None  # the batch is a LearnedOrderMasker's
    tokens, samples = clean.tokens, len(noise.arrival)
    forward = forward_exponents(model, micro, noise)
    rank = ranks(noise.arrival, forward, noise.there)
    finished = noise.there.sum(dim=1) - noise.masked
    hit = noise.there & (rank >= finished[:, None])
    masked = _spread(hit, noise, tokens.numel())
    shown = tokens.expand(samples, -1, -1).masked_fill(masked.view(samples, *tokens.shape), mask_id).flatten(0, 1)
    place = clean.position.repeat(samples, 1)
    sees = None if micro.whole_rows else model.sees(Places(clean.document.repeat(samples, 1), place))
    hidden = model.hidden(shown, sees, place)
    reverse = None
    if isinstance(model.order, LearnedOrder):
        scores = model.order.noisy(hidden.detach(), sees, place).view(samples, -1)[:, noise.place]
        reverse = _spread(model.order.exponents(scores, noise.there), noise, tokens.numel())
    owner = torch.arange(len(noise.place), device=tokens.device)[:, None].expand_as(noise.place)
    return Masked(
        forward=_spread(forward[None], noise, tokens.numel())[0],
        reverse=reverse,
        masked=masked,
        total=torch.where(hit, forward, 0.0).sum(dim=-1),
        owner=_spread(owner[None], noise, tokens.numel())[0],
        chance=log_probability(forward, rank, noise.there, finished),
        hidden=hidden.view(samples, tokens.numel(), -1),
    )


def forward_exponents(model: MaskedDiffusionModel, micro: MicroBatch, noise: Arrivals) -> Float[Tensor, "documents positions"]:
    """The exponents of a micro-batch's maskable positions, which know its tokens."""
    clean = micro.noisy.clean
    if isinstance(model.order, TokenRates):
        return model.log_rates().exp()[clean.tokens.flatten()[noise.place]]
    assert isinstance(model.order, LearnedOrder)
    sees = None if micro.whole_rows else model.sees(Places(clean.document, clean.position))
    with torch.no_grad():  # the heads learn from what the transformer is, and do not teach it (LoMDM's stop-gradient)
        hidden = model.hidden(clean.tokens, sees, clean.position)
    scores = model.order.clean(hidden, sees, clean.position)
    return model.order.exponents(scores.flatten()[noise.place], noise.there)


def _spread(values: Any, noise: Arrivals, size: int) -> Any:
    """Values of documents' positions [samples, documents, positions] at their places [samples, size], 0 (False) elsewhere."""
    index = noise.place.masked_fill(~noise.there, size).flatten()
    flat = values.expand(len(values), *noise.place.shape).flatten(1)
    return values.new_zeros(len(values), size + 1).scatter(1, index.expand(len(values), -1), flat)[:, :size]


def _terms(
    model: MaskedDiffusionModel, drawn: Masked, p: RangePositions, noise: Arrivals | None, vocabulary: Vocabulary
) -> Terms:
    """Of an id range: its masked positions in every sample, rounded up by others."""
    assert noise is not None  # `draw_masks` has used it
    samples, size = drawn.masked.shape
    count = min(noise.most[p.range_index] + -noise.most[p.range_index] % BUCKET, len(p.index))
    hit = drawn.masked[:, p.index] & (p.weight > 0)
    some = (~hit).byte().argsort(dim=1, stable=True)[:, :count]  # the masked ones first, from left to right
    place = p.index[some]
    rows = torch.arange(samples, device=place.device)[:, None]
    chosen = drawn.hidden.flatten(0, 1).index_select(0, (rows * size + place).flatten())
    target, own = p.target[some].flatten(), vocabulary.ranges[p.range_index]
    unembedding, where = local(model.unembedding.weight), (own, vocabulary.end_id, vocabulary.mask_id, MAX_LOGITS)
    if isinstance(model.order, TokenRates):
        nats, log_reverse = range_rates(chosen, unembedding, model.log_rates(), target, *where)
        reverse = log_reverse.exp().view_as(place)
    else:
        assert drawn.reverse is not None  # heads have said so
        nats, reverse = range_cross_entropy(chosen, unembedding, target, *where), drawn.reverse.gather(1, place)
    owner = drawn.owner[place]
    valid = hit.gather(1, some)
    weight = torch.where(valid, p.weight[some] / drawn.total.gather(1, owner), 0.0)
    each = density(nats.view_as(place), torch.where(valid, drawn.forward[place], 1.0), torch.where(valid, reverse, 1.0))
    reduced = torch.where(valid, p.weight[some] / p.coefficient[some], 1.0)  # what the loss divides a document's bound by
    return Terms(owner, weight * each, weight / reduced * each)
