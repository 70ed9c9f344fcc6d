"""What corrupts the rows of a run, and what its model learns to undo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from components.corruption import KernelCorruption
from components.maskers import Masker, TimeSampler
from components.noise import seed_of
from components.tasks import INSTRUCT, find_task
from components.vocabulary import Vocabulary
from components.weightings import Noise
from mdm.config import UserError
from mdm.config.errors import one_line
from mdm.config.protocols import conforming
from mdm.data.settings import MASKER_SUPPLIED, BatchSettings, LossSettings, StreamSettings


def maskers(
    data: Mapping[str, StreamSettings], default: Mapping[str, Any], vocabulary: Vocabulary, seed: int
) -> dict[str, Masker]:
    """What masks each stream's rows, with a seed of its own: the stream's masker, or that of the node `default`."""
    built = {}
    for name, settings in data.items():
        supplied = (vocabulary.mask_id, vocabulary.modalities, seed_of(seed, name), vocabulary)
        node, key = (default, "masker") if settings.masker is None else (settings.masker, f"data.{name}.masker")
        built[name] = conforming(node, key, Masker, **dict(zip(MASKER_SUPPLIED, supplied, strict=True)))
    return built


def check_maskers(
    data: Mapping[str, StreamSettings], default: Mapping[str, Any], loss: LossSettings, modalities: Sequence[str]
) -> dict[str, Noise]:
    """`learned_noise`, of what would corrupt each stream, before anything is read. Raises UserError."""
    with one_line("tokenizers"):
        stand_in = Vocabulary.build(dict.fromkeys(modalities, (2,)), may_end=())
    return learned_noise(data, maskers(data, default, stand_in, 0), loss)


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
