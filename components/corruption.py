"""Corruption of any kernel, for each modality its own: Batch -> NoisyBatch.

    t ~ time sampler,  tau = 1 - alpha(t),  z_i ~ alpha x_i + mask m + uniform u     (components/kernels.py)

The bound's density at (z, t) is weight * D (components/divergence.py): D is the cross-entropy where noise is masks alone, and
weight -alpha'/(1 - alpha); else D is KL(q(.|x) || q(.|p)) + rho - log rho - 1 and the weight dtau/dt rate(z)/q(z | x), at every
position, since any token may be noise. In training another weight may stand in its place: components/weightings.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from components.divergence import LEAST_UNIFORM
from components.kernels import Kernel, Mask
from components.maskers import LowDiscrepancyTimes, Masker, TimeSampler, documents
from components.noise import sample_rng
from components.schedules import Linear, Schedule
from components.types import Batch, NoisyBatch, Replaced
from components.vocabulary import Vocabulary
from components.weightings import Noise

Corruption = Masker
"""What corrupts a batch. Maskers do, and what they have is all that is asked."""
NEXT_TO_CLEAN = 1e-12  # a noise level, and the distance to 1 of another: sixteen digits give the rates there four


@dataclass(frozen=True)
class KernelCorruption:
    """Corrupts every maskable position by its modality's kernel, at the time of its document.

    kernel:     one for all, or one per modality name
    vocabulary: which ids may stand where
    schedule:   tau = 1 - alpha(t)
    pairs:      samples 2j and 2j + 1 are one sequence, at antithetic times and numbers: t and 1 - t, u and 1 - u. Each is a
                sample of the process, so that any of its expectations is unbiased; of masks on the linear schedule the two are
                complements (anti-masking), and with other noise every token is noise at least once in a pair
    t_min, t_max: times are drawn between them. t_max null is 1 for masks alone, 1 - t_min for pairs (it has to be), else 0.999:
                at 1 nothing of a token is left, and rates are infinite
    weighting, clip: in training, see above
    per_token:  a time for each position instead of each document: a training loss, no bound
    """

    vocabulary: Vocabulary
    kernel: Kernel | Mapping[str, Kernel] = field(default_factory=Mask)
    schedule: Schedule = field(default_factory=Linear)
    times: TimeSampler = field(default_factory=LowDiscrepancyTimes)
    pairs: bool = False
    seed: int = 0
    t_min: float = 1e-3
    t_max: float | None = None
    weighting: str = "exact"
    clip: float | None = None
    per_token: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.t_min < (0.5 if self.pairs else self._t_max) <= 1:
            range_ = "[0, 0.5) with pairs" if self.pairs else f"[0, t_max = {self._t_max})"
            raise ValueError(f"KernelCorruption: t_min must be in {range_}, and t_max at most 1; got {self.t_min}")
        if self.pairs and self.t_max not in (None, 1 - self.t_min):
            raise ValueError(f"KernelCorruption: pairs are at t and 1 - t, so t_max is 1 - t_min; got {self.t_max}")
        modalities = self.vocabulary.modalities
        if isinstance(self.kernel, Mapping) and set(self.kernel) != set(modalities):
            named = ", ".join(self.kernel) or "none"
            raise ValueError(f"KernelCorruption: a kernel for each of {', '.join(modalities)}, got one for {named}")
        self.noise  # noqa: B018  (its settings are checked)

    @property
    def noise(self) -> dict[str, Noise]:
        """What each modality's tokens are corrupted by, and what a model learns there."""
        kernels = self.kernel if isinstance(self.kernel, Mapping) else dict.fromkeys(self.vocabulary.modalities, self.kernel)
        return {name: Noise(kernel, self.weighting, self.clip) for name, kernel in kernels.items()}

    @property
    def complete(self) -> bool:
        """Whether the weighted loss is a bound."""
        return self.schedule.complete and not self.per_token

    @property
    def _t_max(self) -> float:
        masks = all(noise.kernel.masks_only for noise in self.noise.values())
        return self.t_max if self.t_max is not None else 1 - self.t_min if self.pairs else 1.0 if masks else 0.999

    def __call__(self, batch: Batch) -> NoisyBatch:
        of = self.noise
        noises = [of[name] for name in self.vocabulary.modalities]
        t, u, v = self._draw(batch)
        size, ids = _ids(self.vocabulary)
        ranges = batch.id_range.clamp(min=0)
        count = size[ranges]
        others = ids[ranges, (v * count).long().clamp(max=count - 1)]
        tau, speed = 1 - self.schedule.alpha(t), -self.schedule.alpha_prime(t)
        noisy, clean = batch.tokens.clone(), batch.tokens
        zeros = torch.zeros_like(t)
        mask, weight, training = torch.zeros_like(batch.maskable), zeros.clone(), zeros.clone()
        alpha, uniform, tilt = zeros + 1, zeros.clone(), zeros.clone()
        for i, noise in enumerate(noises):
            here = batch.maskable & (batch.modality == i)
            if not bool(here.any()):
                continue
            at, n = tau[here], count[here]
            if not noise.kernel.masks_only:  # at both ends rates are 0 times infinity, and a steep schedule rounds to them
                at = at.clamp(NEXT_TO_CLEAN, 1 - NEXT_TO_CLEAN)
            levels = noise.kernel.levels(at)
            masked = u[here] < levels.mask
            drawn = torch.where(
                masked, self.vocabulary.mask_id, torch.where(u[here] < 1 - levels.alpha, others[here], clean[here])
            )
            if noise.kernel.masks_only:  # cross-entropy, of masked positions alone
                bound = torch.where(masked, self.schedule.nelbo_weight(t[here]), 0.0)
                known = {"exact": bound, "low_variance": masked.double(), "cross_entropy": masked.double()}
                own = levels.alpha * noise.weight(levels, at, masked, ~masked, n)  # D is alpha times the cross-entropy
                own = torch.where(masked, own * speed[here] if noise.weighting == "clipped" else own, 0.0)
                own = known.get(noise.weighting, own)
            else:
                same = drawn == clean[here]
                per_tau = Noise(noise.kernel).weight(levels, at, masked, same, n)
                bound = per_tau * speed[here]
                own = noise.weight(levels, at, masked, same, n)
                own = own * speed[here] if noise.weighting in ("exact", "clipped") else own
                alpha[here], uniform[here] = levels.alpha, levels.uniform.clamp(min=LEAST_UNIFORM)
                tilt[here] = noise.tilt(levels, at, masked, n)
            noisy[here], mask[here] = drawn, masked if noise.kernel.masks_only else True
            weight[here], training[here] = bound, own
        replaced = None
        if not all(noise.kernel.masks_only for noise in noises):
            own = None if all(noise.leave_one_out for noise in noises) else tilt.float()
            replaced = Replaced(noisy, alpha.float(), uniform.float(), own, self.weighting == "cross_entropy")
        return NoisyBatch(batch, noisy, mask, weight.float(), training.float(), replaced)

    def _draw(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of each position its time, and two uniform numbers: what becomes of it, and which other token."""
        t, u, v = np.full(batch.tokens.shape, 0.5), np.ones(batch.tokens.shape), np.zeros(batch.tokens.shape)
        t_max = self._t_max
        for row, span, index in documents(batch):
            key, length = index // 2 if self.pairs else index, span.stop - span.start
            drawn = self.times(self.seed, key)
            if self.per_token:
                drawn = (drawn + sample_rng(self.seed, "level", key).random(length)) % 1.0
            t[row, span] = t_max - (t_max - self.t_min) * drawn
            u[row, span] = sample_rng(self.seed, "mask", key).random(length)
            v[row, span] = sample_rng(self.seed, "replacement", index).random(length)
            if self.pairs and index % 2 == 1:
                t[row, span], u[row, span] = 1 - t[row, span], 1 - u[row, span]
        return torch.from_numpy(t), torch.from_numpy(u), torch.from_numpy(v)


def _ids(vocabulary: Vocabulary) -> tuple[Int[Tensor, " ranges"], Int[Tensor, "ranges most"]]:
    """How many ids may stand at each range's positions, and which."""
    allowed = vocabulary.allowed(torch.arange(len(vocabulary.ranges)))
    size = allowed.sum(dim=1)
    return size, allowed.int().argsort(dim=1, descending=True, stable=True)[:, : int(size.max())]
