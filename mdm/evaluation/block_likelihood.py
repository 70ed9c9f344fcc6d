"""The likelihood of given tokens under a model of blocks: its bound, and its autoregressive mode, which takes one pass."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from components.block_diffusion import BlockMasker
from components.likelihood import Bound
from components.maskers import FixedCountMasker, LowDiscrepancyTimes
from components.precision import precise
from components.range_losses import range_cross_entropy, range_divergence
from components.types import Batch
from components.visibility import FINISHED, Places
from components.vocabulary import Vocabulary
from mdm.data.corruption import bound_corruption, layout_of
from mdm.data.pipeline import MicroBatch, micro_batch
from mdm.data.settings import LossSettings
from mdm.evaluation.nelbo import hidden_of
from mdm.hardware import local
from mdm.models.transformer import MaskedDiffusionModel


@torch.no_grad()
def block_nelbo(
    model: MaskedDiffusionModel, batch: Batch, vocabulary: Vocabulary, draws: int = 16, batch_size: int = 64, seed: int = 0
) -> Bound:
    """The bound of each row (a document, on the CPU): of its maskable positions given the others before them, in nats.

    Raises ValueError for fewer than two draws, and for what is no number.
    """
    if draws < 2:
        raise ValueError(f"nelbo: draws must be at least 2, got {draws}")
    layout = layout_of(model.config, vocabulary)
    assert layout is not None
    own = batch.repeated(draws)
    noise, times = model.config.noise, LowDiscrepancyTimes(draws)
    masks = FixedCountMasker(vocabulary.mask_id, times, seed=seed)
    masker = BlockMasker(bound_corruption(noise, vocabulary, times, seed) if noise else masks, layout)
    parts = torch.arange(len(own.tokens)).split(batch_size)
    made = (micro_batch(own.select(part), masker, LossSettings(reduction="token"), vocabulary) for part in parts)
    each = torch.cat([nats_by_row(model, micro, vocabulary) for micro in made]).reshape(-1, draws)
    return Bound.finite(each)


def nats_by_row(model: MaskedDiffusionModel, micro: MicroBatch, vocabulary: Vocabulary) -> Float[Tensor, " rows"]:
    """What each row of a micro-batch of copies (of blocks, or of two streams) adds to its bound, on the CPU, in nats."""
    assert micro.rows is not None
    micro = micro.to(model.embedding.weight.device)
    hidden, unembedding = hidden_of(model, micro), local(model.unembedding.weight)
    each = torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device)
    for p in micro.positions:
        where = (vocabulary.ranges[p.range_index], vocabulary.end_id, vocabulary.mask_id, 2**27)
        chosen = hidden.flatten(0, 1)[p.index]
        if p.replaced is None:
            nats = range_cross_entropy(chosen, unembedding, p.target, *where)
        else:
            nats = range_divergence(chosen, unembedding, p.target, p.replaced, *where)
        each.index_add_(0, p.index // hidden.shape[1], (p.weight * nats).double())
    return each.cpu()


@torch.no_grad()
def autoregressive_nats(model: MaskedDiffusionModel, batch: Batch, vocabulary: Vocabulary) -> Float[Tensor, " rows"]:
    """-log p of the maskable tokens of each row by the autoregressive mode of a model of causal blocks, in one pass: exact.

    A token that a document begins with is given. Raises ValueError for a model that has no such mode.
    """
    if not (model.config.blocks and model.config.causal):
        raise ValueError("likelihood: only blocks that are trained with model.causal=true say what the next token is")
    batch = batch.to(model.embedding.weight.device)
    layout = layout_of(model.config, vocabulary)
    assert layout is not None
    places = Places(batch.document, batch.position, layout(batch), torch.full_like(batch.document, FINISHED))
    logits = precise(model.unembedding(model.hidden(batch.tokens, model.sees(places), batch.position)))[:, :-1]
    log_p = vocabulary.restrict(logits, batch.id_range[:, 1:]).log_softmax(dim=-1)
    nats = -log_p.gather(-1, batch.tokens[:, 1:, None])[..., 0]
    scored = batch.maskable[:, 1:] & (batch.position[:, 1:] > 0)
    return torch.where(scored, nats, 0.0).double().sum(dim=1).cpu()
