"""Where sampling begins: pure noise, of the kind that the model was trained against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from components.kernels import MASKED, prior
from components.noise import sample_rng
from components.samplers.state import SamplerState


def check_sampler(sampler: object, state: SamplerState) -> None:
    """Raises ValueError for a sampler that unmasks, at positions whose noise is no mask at the start, and for positions of a
    modality that has no noise."""
    if state.noise.masks_only:  # no sampler knows less
        return
    one = len(state.noise.each) == 1
    without = state.generate & ((state.modality < 0) | (state.modality >= len(state.noise.each)))
    if not one and bool(without.any()):
        modality = int(state.modality[without][0])
        raise ValueError(
            f"sample: noise of {len(state.noise.each)} modalities, and positions of modality {modality} to generate"
        )
    for i, noise in enumerate(state.noise.each):
        parts = along(sampler, None if one else i)
        unknowing = next((part for part in parts if not getattr(part, "any_noise", False)), None)
        here = state.generate if one else state.generate & (state.modality == i)
        if unknowing is not None and not noise.kernel.ends_masked and bool(here.any()):
            raise ValueError(
                f"sample: {type(unknowing).__name__} fills in masks, and the noise that the model was trained with, "
                f"{noise.kernel}, ends in none; take Ancestral, Psi or LeastSureFirst"
            )


def along(sampler: object, modality: int | None) -> Iterator[object]:
    """A sampler, and those inside it that have to do with a modality, None being all: each speaks for itself."""
    yield sampler
    each = list(getattr(sampler, "samplers", None) or ())
    inner = [getattr(sampler, "sampler", None), *(each if modality is None else each[modality : modality + 1])]
    for part in inner:
        if part is not None:
            yield from along(part, modality)


def pure_noise(state: SamplerState, allowed: Tensor | None, seed: int, index: Sequence[int]) -> SamplerState:
    """The state before the first step: masks, or tokens drawn uniformly from those that may stand there.

    Without `allowed`, those are all below the mask token. Raises ValueError where there is none.
    """
    if state.noise.masks_only:
        return state
    if allowed is None and state.mask_id < 1:
        raise ValueError(
            "sample: the mask token is the first of all ids, so that noise needs `allowed`: the ids that it may be"
        )
    vocab = state.mask_id + 1 if allowed is None else allowed.shape[-1]
    if allowed is None:
        allowed = torch.ones(1, 1, vocab, dtype=torch.bool, device=state.tokens.device)
    ids = (allowed & (torch.arange(vocab, device=allowed.device) != state.mask_id)).expand(*state.tokens.shape, -1)
    numbers = np.ones((len(state.tokens), 2, state.tokens.shape[1]))
    for row, (i, own) in enumerate(zip(index, state.generate.cpu().numpy(), strict=False)):
        numbers[row][:, own] = sample_rng(seed, "start", i).random((2, own.sum()))
    position, token = torch.from_numpy(numbers).to(state.tokens.device).unbind(dim=1)
    levels = state.noise.levels(torch.ones_like(position), state.modality)
    mask = levels.mask
    for i, noise in enumerate(state.noise.each):
        if noise.kernel.ends_masked:  # those that fill in masks find nothing else
            mask = mask.masked_fill((state.modality == i) | (len(state.noise.each) == 1), 1.0)
    place = prior(replace(levels, mask=mask), position, token, ids.sum(dim=-1))
    drawn = torch.searchsorted(ids.long().cumsum(dim=-1), place[..., None] + 1)[..., 0]  # the place-th of those allowed
    drawn = torch.where(place == MASKED, state.mask_id, drawn.clamp(max=vocab - 1))
    return replace(state, tokens=torch.where(state.generate, drawn, state.tokens))
