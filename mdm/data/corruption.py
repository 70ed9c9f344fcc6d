"""What corrupts the rows of a run, and what its model learns to undo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from components.block_diffusion.layout import Layout
from components.block_diffusion.masker import BlockMasker
from components.corruption import KernelCorruption
from components.learned_orders import LearnedOrderMasker
from components.maskers import Masker, NextToken, TimeSampler
from components.noise import seed_of
from components.orders import OrderMasker
from components.tasks import INSTRUCT, find_task
from components.vocabulary import Vocabulary
from components.weightings import Noise
from mdm.config import UserError
from mdm.config.errors import one_line
from mdm.config.protocols import conforming
from mdm.data.settings import MASKER_SUPPLIED, BatchSettings, LossSettings, StreamSettings, row_length


def maskers(
    data: Mapping[str, StreamSettings],
    default: Mapping[str, Any],
    vocabulary: Vocabulary,
    seed: int,
    layout: Layout | None = None,
    rows: Mapping[str, int] | None = None,
) -> dict[str, Masker]:
    """What masks each stream's rows, with a seed of its own: the stream's masker, or that of the node `default`.

    layout: of a model of blocks: each block has noise of its own;  rows: of each stream in the whole training, see `horizon`
    """
    built = {}
    for name, settings in data.items():
        supplied = (vocabulary.mask_id, vocabulary.modalities, seed_of(seed, name), vocabulary, (rows or {}).get(name, 1))
        node, key = (default, "masker") if settings.masker is None else (settings.masker, f"data.{name}.masker")
        masker = conforming(node, key, Masker, **dict(zip(MASKER_SUPPLIED, supplied, strict=True)))
        built[name] = masker if layout is None else BlockMasker(masker, layout)
    return built


def horizon(data: Mapping[str, StreamSettings], canvas: Mapping[str, int | None], tokens: int) -> dict[str, int]:
    """How many rows of each stream a training of so many tokens has: about, since canvases and packs are counted as full."""
    mean = {
        name: sum(share * row_length(s, task, canvas) for task, share in s.tasks.items()) / sum(s.tasks.values())
        for name, s in data.items()
    }
    window = sum(s.weight * mean[name] for name, s in data.items())
    return {name: max(int(tokens * s.weight / max(window, 1)), 1) for name, s in data.items()}


def layout_of(model: Any, vocabulary: Vocabulary) -> Layout | None:
    """Which positions a model (its config: `blocks`, `blocks_from_start`) generates together; None where it has no blocks.

    Raises UserError for blocks of no modality, and for those that cut a frame.
    """
    if not model.blocks:
        return None
    with one_line("model"):
        layout = Layout(model.blocks, vocabulary.modalities, model.blocks_from_start)
    for modality, size in model.blocks.items():
        frame = len(vocabulary.ranges_of(modality))
        if size % frame and not model.blocks_from_start:
            raise UserError(f"model.blocks.{modality}={size} cuts a frame of {frame} tokens in two; take a multiple of {frame}")
    return layout


def check_orders(model: Any, masker: Mapping[str, Masker], loss: LossSettings) -> None:
    """Raises UserError where a model (its config) that goes by orders, its maskers and its loss do not go together."""
    for kind, orders in ((OrderMasker, ("two_streams",)), (LearnedOrderMasker, ("learned", "learned_by_token"))):
        if {isinstance(m, kind) for m in masker.values()} != {model.orders in orders}:
            got = ", ".join(sorted({type(m).__name__ for m in masker.values()}))
            raise UserError(
                f"masker: {kind.__module__}.{kind.__name__} goes with model.orders={' or '.join(orders)}, and that with it,"
                f" for every stream (a `data.NAME.masker` too); got {got} with model.orders={model.orders or 'null'}"
            )
    if model.orders and loss.weighting != "nelbo":
        why = "in an order every token weighs the same" if model.two_streams else "an order is learned from the bound"
        raise UserError(f"loss.weighting={loss.weighting} is for masks alone; {why}: set nelbo")


def check_autoregressive(model: Any, masker: Mapping[str, Masker], loss: LossSettings) -> bool:
    """Whether a model (its config) is trained to predict the next token alone: a baseline, see mdm.models.builders.model.

    Raises UserError where masker, loss and model do not go together.
    """
    check_orders(model, masker, loss)
    next_token = {isinstance(getattr(m, "masker", m), NextToken) for m in masker.values()}
    if model.blocks and True in next_token:
        raise UserError(
            "masker: components.maskers.NextToken is for a model without blocks; in blocks loss.next_token trains that beside"
        )
    autoregressive = model.causal and not model.blocks
    if next_token != {autoregressive}:
        raise UserError(
            "masker: components.maskers.NextToken goes with model.autoregressive=true, and that with it; a checkpoint that is "
            "autoregressive learns to unmask in blocks, e.g. blocks={text: 32} (config adapt)"
        )
    if loss.next_token and not (model.causal and model.blocks):
        raise UserError(
            f"loss.next_token={loss.next_token} is for blocks whose finished tokens see none behind them: set model.blocks and "
            "model.causal=true (of a finetuning, blocks and causal=true), or loss.next_token=0"
        )
    return autoregressive


def check_maskers(
    data: Mapping[str, StreamSettings],
    default: Mapping[str, Any],
    loss: LossSettings,
    modalities: Sequence[str],
    model: Any,
) -> dict[str, Noise]:
    """`learned_noise`, of what would corrupt each stream for a model (its config), before anything is read.

    Raises UserError where they do not go together, and for blocks of no modality.
    """
    with one_line("tokenizers"):
        stand_in = Vocabulary.build(dict.fromkeys(modalities, (2,)), may_end=())
    with one_line("model"):
        Layout(model.blocks, modalities)
    by = maskers(data, default, stand_in, 0)
    check_autoregressive(model, by, loss)
    return learned_noise(data, by, loss, model.noise)


def learned_noise(
    data: Mapping[str, StreamSettings],
    masker: Mapping[str, Masker],
    loss: LossSettings,
    before: Mapping[str, Noise] | None = None,
) -> dict[str, Noise]:
    """What a model learns to undo, of the modalities whose noise is not masks alone: its config keeps it.

    before: what it undid already: that stays, of modalities that no stream generates

    Raises UserError where streams corrupt a modality in different ways, and for weights that such noise does not go with.
    """
    found: dict[str, tuple[str, Noise]] = {}
    for name, settings in data.items():
        own: Mapping[str, Noise] = getattr(masker[name], "noise", {})
        generated = {m: None for task in settings.tasks for m in (["text"] if task == INSTRUCT else find_task(task).generated)}
        for modality in generated:
            noise = own.get(modality, Noise())
            first, known = found.setdefault(modality, (name, noise))
            if known != noise and not (known.kernel.masks_only and noise.kernel.masks_only):
                raise UserError(
                    f"data.{name}.masker: {modality} is corrupted by {noise.kernel} with weights {noise.weighting}, and in "
                    f"data.{first} by {known.kernel} with {known.weighting}; a model undoes one noise of each modality"
                )
    learned = {modality: noise for modality, (_, noise) in found.items() if not noise.kernel.masks_only}
    if learned and loss.weighting != "nelbo":
        raise UserError(
            f"loss.weighting={loss.weighting} is for masks; tokens that become others have weights of their own: set "
            "masker.weighting, e.g. to low_variance"
        )
    return {**{modality: noise for modality, noise in (before or {}).items() if modality not in found}, **learned}


def bound_corruption(noise: Mapping[str, Noise], vocabulary: Vocabulary, times: TimeSampler, seed: int) -> KernelCorruption:
    """What a model's bound is taken with: its noise, from almost no noise to all."""
    kernels = {m: noise.get(m, Noise()).kernel for m in vocabulary.modalities}
    return _Learned(vocabulary, kernels, times=times, seed=seed, t_min=1e-4, t_max=1 - 1e-4, learned=noise)


@dataclass(frozen=True)
class _Learned(KernelCorruption):
    """With what a model learned of each modality, which may be by different weights."""

    learned: Mapping[str, Noise] = field(default_factory=dict)

    @property
    def noise(self) -> dict[str, Noise]:
        return {modality: self.learned.get(modality, Noise()) for modality in self.vocabulary.modalities}


def check_pairs(batch: BatchSettings, masker: Mapping[str, Masker]) -> None:
    """Raises ValueError where a batch that comes later in the run than its first has half a pair."""
    pairs = next((name for name, m in masker.items() if m.pairs), None)
    for share, size in batch.ramp.items():
        if pairs is not None and size % 2:
            raise ValueError(f"batch.ramp.{share} = {size} must be even: data.{pairs} is masked in pairs")
