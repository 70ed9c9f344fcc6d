"""The likelihood of given tokens under a model of two streams: exact in any order, by one pass over a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from components.likelihood import Bound
from components.orders import Order, OrderMasker, Permuted, Sequential
from components.types import Batch
from components.vocabulary import Vocabulary
from mdm.data.pipeline import micro_batch
from mdm.data.processor import Processor
from mdm.data.settings import LossSettings, StreamSettings
from mdm.data.validation import validation_batches
from mdm.evaluation.block_likelihood import nats_by_row
from mdm.evaluation.nelbo import nelbo, task_bits
from mdm.hardware import Hardware
from mdm.models.transformer import MaskedDiffusionModel


@torch.no_grad()
def ordered_nats(
    model: MaskedDiffusionModel,
    batch: Batch,
    vocabulary: Vocabulary,
    order: Order = Sequential(),  # noqa: B008 (frozen)
    batch_size: int = 64,
    seed: int = 0,
) -> Float[Tensor, " rows"]:
    """-log p of the maskable tokens of each row (on the CPU) given the others, generated in that order: exact, one pass a row.

    Raises ValueError for a model with one stream, for what is no order, and for what is no number.
    """
    if not model.config.two_streams:
        raise ValueError("likelihood: one pass gives it to a model of two streams alone (model.orders=two_streams)")
    masker = OrderMasker(vocabulary.mask_id, order, seed)
    found = []
    for part in torch.arange(len(batch.tokens)).split(batch_size):
        micro = micro_batch(batch.select(part), masker, LossSettings(reduction="token"), vocabulary)
        found.append(nats_by_row(model, micro, vocabulary))
    nats = torch.cat(found)
    if not bool(nats.isfinite().all()):
        row = int((~nats.isfinite()).nonzero()[0, 0])
        raise ValueError(f"likelihood: that of row {row} is not finite (broken weights, or an overflow of float16?)")
    return nats


@torch.no_grad()
def any_order_nelbo(
    model: MaskedDiffusionModel, batch: Batch, vocabulary: Vocabulary, draws: int = 16, batch_size: int = 64, seed: int = 0
) -> Bound:
    """The mean over orders of each row's likelihood: masked diffusion's bound, by a pass for each order and not for each mask.

    Raises ValueError for fewer than two draws, and as `ordered_nats` does.
    """
    if draws < 2:
        raise ValueError(f"nelbo: draws must be at least 2, got {draws}")
    own = batch.repeated(draws)
    return Bound.of(ordered_nats(model, own, vocabulary, Permuted(), batch_size, seed).reshape(-1, draws))


def left_to_right_figures(
    data: Mapping[str, StreamSettings],
    held_out: Mapping[str, Any],
    processor: Processor,
    model: MaskedDiffusionModel,
    hw: Hardware,
    samples: int,
) -> dict[str, float]:
    """Bits per token of each task from left to right, where a model of two streams says them; of others nothing."""
    if not model.config.two_streams:
        return {}
    plan = validation_batches(data, held_out, processor, samples=samples, model=model.config, order=Sequential())
    nats = nelbo(model, plan, processor.vocabulary, hw)
    return {f"{task}_left_to_right_bits_per_token": value for task, value in task_bits(nats, plan).items()}
