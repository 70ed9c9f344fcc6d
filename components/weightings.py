"""What a prediction weighs in training, and what a model learns by it.

The bound's density in the noise level tau is rate(z)/q(z | x) times D (components/divergence.py). In training another weight
may stand in its place:

    exact          the bound's own
    clipped        at most `clip` (of the density in tau)
    low_variance   a function of time taken out, such that masks weigh 1 (2602.15014; for log-SNR times 2512.10858)
    dynamic        2 on masks, 1 on tokens that have become others, noise/q(z|x) on clean ones (GIDD, 2503.04482; its code
                   approximates that last one)
    cross_entropy  plain: weight 1 everywhere, D the cross-entropy. A token-to-token loss, for samplers that edit

What a model learns follows from the weight. Where it is the exact one times a function of (t, z in {mask, changed, clean} such
that clean over changed stays noise/q), the minimiser is what the other positions say, P(x_i | z without i): exact,
low_variance, dynamic. Cross-entropy learns E[x_i | z], and `clipped` something in between. All differ by the log-odds of one
token, z_i: `tilt` says by how many at a noise level, and bound and samplers take it off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from components.kernels import KERNELS, Kernel, Levels, Mask, described

LEAVE_ONE_OUT = ("exact", "low_variance", "dynamic")
"""Weightings under which a model learns the leave-one-out distribution."""
WEIGHTINGS = (*LEAVE_ONE_OUT, "clipped", "cross_entropy")


@dataclass(frozen=True)
class Noise:
    """What a modality's tokens are corrupted by, and what a model learned there: see `tilt`."""

    kernel: Kernel = field(default_factory=Mask)
    weighting: str = "exact"
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"corruption: weighting {self.weighting!r} is not one of {', '.join(WEIGHTINGS)}")
        if (self.clip is not None) != (self.weighting == "clipped") or (self.clip is not None and not self.clip > 0):
            raise ValueError(
                f"corruption: clip, a positive number, goes with weighting=clipped; got {self.clip}, {self.weighting}"
            )

    @property
    def leave_one_out(self) -> bool:
        """Whether a model learns what the other positions say of a token."""
        return self.kernel.masks_only or self.weighting in LEAVE_ONE_OUT

    def weight(self, levels: Levels, tau: Tensor, masked: Tensor, clean: Tensor, size: Tensor | int) -> Float[Tensor, "*shape"]:
        """What D weighs in the density in tau, in training. masked, clean: what the token became;  size: N"""
        noise, rate = levels.of_token(masked, size)
        exact = rate / (noise + torch.where(clean, levels.alpha, 0.0))
        if self.weighting == "clipped":
            return exact.clamp(max=self.clip)
        if self.weighting == "low_variance":
            return exact * tau
        if self.weighting == "dynamic":
            return torch.where(masked, 2.0, torch.where(clean, noise / (noise + levels.alpha), 1.0))
        return torch.ones_like(exact) if self.weighting == "cross_entropy" else exact

    def tilt(self, levels: Levels, tau: Tensor, masked: Tensor, size: Tensor | int) -> Float[Tensor, "*shape"]:
        """Log-odds by which the model favours the token that stands there over the leave-one-out distribution.

        The minimiser weighs x by P(x | z without i) q(z | x) weight(z, x), so that they are those of q * weight at x = z and at
        any other x.
        """
        if self.leave_one_out:
            return torch.zeros_like(levels.alpha)
        noise, _ = levels.of_token(masked, size)
        yes, no = torch.ones_like(masked), torch.zeros_like(masked)
        here = (noise + levels.alpha) * self.weight(levels, tau, no, yes, size)
        elsewhere = noise * self.weight(levels, tau, no, no, size)
        tiny = torch.finfo(here.dtype).tiny
        return torch.where(masked, 0.0, torch.log(here.clamp(min=tiny)) - torch.log(elsewhere.clamp(min=tiny)))

    def to_dict(self) -> dict[str, Any]:
        """As plain values. Raises ValueError for a kernel that is not the library's own."""
        clip = {} if self.clip is None else {"clip": self.clip}
        return {**described(self.kernel), "weighting": self.weighting, **clip}

    @classmethod
    def from_dict(cls, raw: Any) -> Noise:
        """What `to_dict` wrote. Raises ValueError for anything else."""
        if not isinstance(raw, Mapping) or raw.get("kernel") not in tuple(KERNELS):
            raise ValueError(f"noise must name one of the kernels {', '.join(KERNELS)}, got {str(raw)[:80]}")
        kind = KERNELS[raw["kernel"]]
        settings = {k: v for k, v in raw.items() if k not in ("kernel", "weighting", "clip")}
        numbers = settings if raw.get("clip") is None else {**settings, "clip": raw["clip"]}
        unknown = set(settings) - set(kind.__dataclass_fields__)
        if unknown or not all(map(_is_number, numbers.values())):
            names = ", ".join([*kind.__dataclass_fields__, "clip"])
            raise ValueError(f"noise {raw['kernel']} takes numbers for {names}, got {str(raw)[:80]}")
        weighting = raw.get("weighting", "exact")
        if weighting not in WEIGHTINGS:
            raise ValueError(f"noise: weighting {str(weighting)[:30]!r} is not one of {', '.join(WEIGHTINGS)}")
        return cls(kind(**settings), weighting, raw.get("clip"))


def _is_number(value: Any) -> bool:
    """Whether a value of a file is a number that any setting may be: a whole one may have any number of digits there."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


@dataclass(frozen=True)
class Noises:
    """The noise of each modality, by its index. One alone is of all of them."""

    each: Sequence[Noise] = field(default_factory=lambda: [Noise()])

    def __post_init__(self) -> None:
        if not self.each:
            raise ValueError("Noises: name the noise of at least one modality")

    @classmethod
    def of(cls, noise: Mapping[str, Noise], modalities: Sequence[str]) -> Noises:
        """From names; a modality that is not named is masked. Raises ValueError for one that there is none of."""
        for name in noise:
            if name not in modalities:
                raise ValueError(f"noise of {name[:30]}: the modalities are {', '.join(modalities)}")
        return cls([noise.get(name, Noise()) for name in modalities])

    @property
    def masks_only(self) -> bool:
        """Whether all noise is the mask token."""
        return all(noise.kernel.masks_only for noise in self.each)

    def of_modality(self, index: int) -> Noise:
        return self.each[min(index, len(self.each) - 1)]

    def levels(self, tau: Float[Tensor, "*shape"], modality: Int[Tensor, "*shape"]) -> Levels:
        """Each position's levels, by its modality's kernel."""
        found = [noise.kernel.levels(tau) for noise in self.each]
        chosen = found[0]
        for i, own in enumerate(found[1:], 1):
            here = modality == i
            pairs = zip(vars(own).values(), vars(chosen).values(), strict=True)
            chosen = Levels(*(torch.where(here, a, b) for a, b in pairs))
        return chosen

    def tilt(
        self, levels: Levels, tau: Tensor, modality: Tensor, masked: Tensor, size: Tensor
    ) -> Float[Tensor, "*shape"] | None:
        """Each position's `Noise.tilt`; None where all of them are leave-one-out."""
        if all(noise.leave_one_out for noise in self.each):
            return None
        tilt = torch.zeros_like(levels.alpha)
        for i, noise in enumerate(self.each):
            here = modality == i if len(self.each) > 1 else torch.ones_like(masked)
            tilt = torch.where(here, noise.tilt(levels, tau, masked, size), tilt)
        return tilt


def untilted(
    logits: Float[Tensor, "*shape ids"], place: Int[Tensor, "*shape"], tilt: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape ids"]:
    """Leave-one-out logits from a model's: its log-odds for the token that stands there are taken off. place < 0: the mask"""
    off = torch.where(place < 0, 0.0, -tilt).to(logits.dtype)
    return logits.scatter_add(-1, place.clamp(min=0)[..., None], off[..., None])
