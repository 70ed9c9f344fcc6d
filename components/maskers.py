"""When and what to mask: Batch -> NoisyBatch.

    t ~ time sampler,    Bernoulli: each maskable position is masked with probability 1 - alpha(t)
    k ~ U{1..L},         fixed count: k of the L maskable positions are masked, each weighs L / k

Both give the NELBO; the fixed count is the linear schedule's with t integrated out, so its variance is finite where that of
the Bernoulli weight 1/t diverges as t -> 0. Masks are drawn per document from (seed, document index) alone, on the CPU,
with the batch: the same index is the same mask, so every step needs new ones (`Batch.of(tokens, first_index)`).
Anti-masking (arXiv 2602.21472, reported): samples 2j and 2j + 1 are one sequence, the second with the complement of the
first's mask, so a pair predicts every token exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from components.noise import sample_rng
from components.schedules import Linear, Schedule
from components.types import PAD_DOCUMENT, Batch, NoisyBatch


@runtime_checkable
class TimeSampler(Protocol):
    """A time in [0, 1) for a sample, as a function of (seed, index)."""

    def __call__(self, seed: int, index: int) -> float: ...


@dataclass(frozen=True)
class UniformTimes:
    """Independent uniform times."""

    def __call__(self, seed: int, index: int) -> float:
        return sample_rng(seed, "time", index).random()


@dataclass(frozen=True)
class LowDiscrepancyTimes:
    """(u + k/G) mod 1 for the k-th of a group of G consecutive samples that share one uniform offset u (VDM, 2107.00630)."""

    group: int = 32

    def __post_init__(self) -> None:
        _check_group(type(self).__name__, self.group)

    def __call__(self, seed: int, index: int) -> float:
        offset = sample_rng(seed, "group", index // self.group).random()
        return (offset + index % self.group / self.group) % 1.0


@dataclass(frozen=True)
class StratifiedTimes:
    """(u + k)/G for the k-th of a group of G consecutive samples, u drawn anew for each (MDLM, 2406.07524)."""

    group: int = 32

    def __post_init__(self) -> None:
        _check_group(type(self).__name__, self.group)

    def __call__(self, seed: int, index: int) -> float:
        return (sample_rng(seed, "time", index).random() + index % self.group) / self.group


def _check_group(name: str, group: int) -> None:
    if group < 1:
        raise ValueError(f"{name}: group must be at least 1, got {group}")


@runtime_checkable
class Masker(Protocol):
    """Anything that turns a batch into a noisy one. Its noise is a function of the batch's `document` (see `Batch.of`)."""

    @property
    def pairs(self) -> bool:
        """Whether consecutive samples (2j, 2j + 1) must be one sequence."""
        ...

    def __call__(self, batch: Batch) -> NoisyBatch: ...


@dataclass(frozen=True)
class BernoulliMasker:
    """Masks each position independently with probability 1 - alpha(t).

    schedule:   one for all, or one per modality name (then the bound is valid, but another one)
    t_min:      times are drawn from (t_min, 1], and with anti-masking from (t_min, 1 - t_min): the variance of the weight
                diverges at the ends. The bias is of the order of t_min; a large one trains on heavy noise alone.
    pairs:      anti-masking: the mask weighs -alpha'/(1 - alpha), its complement -alpha'/alpha
    modalities: the vocabulary's modality names, where `schedule` is a mapping
    """

    mask_id: int
    schedule: Schedule | Mapping[str, Schedule] = field(default_factory=Linear)
    times: TimeSampler = LowDiscrepancyTimes()
    pairs: bool = False
    seed: int = 0
    t_min: float = 1e-3
    modalities: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.t_min < (0.5 if self.pairs else 1.0):
            range_ = "[0, 0.5) with pairs" if self.pairs else "[0, 1)"
            raise ValueError(f"BernoulliMasker: t_min must be in {range_}, got {self.t_min}")
        if isinstance(self.schedule, Mapping) and set(self.schedule) != set(self.modalities):
            raise ValueError(
                f"BernoulliMasker: a schedule for each of {sorted(self.modalities)}, got one for {sorted(self.schedule)}"
            )

    @property
    def complete(self) -> bool:
        """Whether the weighted loss is a bound."""
        return all(s.complete for s in (self.schedule.values() if isinstance(self.schedule, Mapping) else [self.schedule]))

    def __call__(self, batch: Batch) -> NoisyBatch:
        u = np.ones(batch.tokens.shape)
        t = np.ones(batch.tokens.shape)
        complement = np.zeros(batch.tokens.shape, dtype=bool)
        t_max = 1 - self.t_min if self.pairs else 1.0
        for row, span, index in documents(batch):
            key = index // 2 if self.pairs else index
            t[row, span] = t_max - (t_max - self.t_min) * self.times(self.seed, key)
            u[row, span] = sample_rng(self.seed, "mask", key).random(span.stop - span.start)
            complement[row, span] = self.pairs and index % 2 == 1
        alpha, alpha_prime, weight = self._schedule(batch, torch.from_numpy(t))
        other = torch.from_numpy(complement)
        masked = (torch.from_numpy(u) < 1 - alpha) ^ other
        weight = torch.where(other, -alpha_prime / alpha, weight)
        return _noisy(batch, self.mask_id, masked, weight)

    def _schedule(self, batch: Batch, t: Float[Tensor, "batch seq"]) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, alpha' and NELBO weight at each position, by its modality's schedule."""
        if not isinstance(self.schedule, Mapping):
            return self.schedule.alpha(t), self.schedule.alpha_prime(t), self.schedule.nelbo_weight(t)
        out = (torch.ones_like(t), torch.ones_like(t), torch.ones_like(t))
        for i, name in enumerate(self.modalities):
            here = batch.modality == i
            values = self.schedule[name]
            for target, of in zip(out, (values.alpha, values.alpha_prime, values.nelbo_weight), strict=True):
                target[here] = of(t[here])
        return out


@dataclass(frozen=True)
class FixedCountMasker:
    """Masks exactly k of a document's L maskable positions, k ~ U{1..L}, weight L / k: evaluate with this one.

    pairs: k ~ U{0..L}; the mask weighs (L + 1)/k, its complement (L + 1)/(L - k); an empty side contributes nothing.
    least, most: shares of L that k stays between, and at 1 or above (BD3-LM's clipped schedule, 2503.09573): for training only,
                 and not in pairs. components/block_diffusion/clipping.py chooses them
    """

    mask_id: int
    times: TimeSampler = LowDiscrepancyTimes()
    pairs: bool = False
    seed: int = 0
    least: float = 0.0
    most: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.least < self.most <= 1:
            raise ValueError(f"FixedCountMasker: 0 <= least < most <= 1, got least = {self.least} and most = {self.most}")
        if self.pairs and not self.complete:
            raise ValueError(f"FixedCountMasker: pairs have every count, not least = {self.least} to most = {self.most}")

    @property
    def complete(self) -> bool:
        """Whether the weighted loss is a bound."""
        return (self.least, self.most) == (0, 1)

    def __call__(self, batch: Batch) -> NoisyBatch:
        masked = np.zeros(batch.tokens.shape, dtype=bool)
        weight = np.zeros(batch.tokens.shape)
        maskable = batch.maskable.numpy()
        for row, span, index in documents(batch):
            where = span.start + np.flatnonzero(maskable[row, span])
            length = len(where)
            key = index // 2 if self.pairs else index
            order = np.argsort(sample_rng(self.seed, "mask", key).random(length))
            uniform = self.times(self.seed, key)
            if self.pairs:
                k = int(uniform * (length + 1))
                chosen = order[:k] if index % 2 == 0 else order[k:]
                scale = length + 1
            else:
                fewest, largest = counts(length, self.least, self.most)
                chosen, scale = order[: fewest + int(uniform * (largest - fewest + 1))], length
            masked[row, where[chosen]] = True
            weight[row, where[chosen]] = scale / max(len(chosen), 1)
        return _noisy(batch, self.mask_id, torch.from_numpy(masked), torch.from_numpy(weight))


def counts(length: int, least: float, most: float) -> tuple[int, int]:
    """The fewest and the most of `length` positions within these shares: one at least, and the fewest where none is within."""
    fewest = max(1, math.ceil(least * length - 1e-9))  # a product may be a little off
    return fewest, max(fewest, math.floor(most * length + 1e-9))


@dataclass(frozen=True)
class NextToken:
    """The autoregressive baseline: nothing is masked and everything predicted, each token from those before it.

    For a model that is causal and predicts the next token. The weight is 1, and the "bound" the negative log-likelihood itself.
    """

    pairs: bool = False

    def __call__(self, batch: Batch) -> NoisyBatch:
        return NoisyBatch(clean=batch, noisy=batch.tokens, mask=batch.maskable, weight=batch.maskable.float())


def documents(batch: Batch) -> list[tuple[int, slice, int]]:
    """(row, positions, document index) of every document of a batch; padding is none."""
    document = batch.document.numpy()
    found = []
    for row, ids in enumerate(document):
        edges = [0, *(np.flatnonzero(np.diff(ids)) + 1), len(ids)]
        for start, stop in pairwise(edges):
            if ids[start] != PAD_DOCUMENT:
                found.append((row, slice(int(start), int(stop)), int(ids[start])))
    return found


def _noisy(batch: Batch, mask_id: int, masked: Bool[Tensor, "batch seq"], weight: Float[Tensor, "batch seq"]) -> NoisyBatch:
    mask = masked & batch.maskable
    return NoisyBatch(
        clean=batch,
        noisy=batch.tokens.masked_fill(mask, mask_id),
        mask=mask,
        weight=torch.where(mask, weight, 0.0).float(),
    )
