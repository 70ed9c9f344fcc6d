"""Mask schedules: alpha(t) is the probability that a token is still visible at time t.

    q(x_t = mask | x) = 1 - alpha(t),    alpha(0) = 1,    alpha(1) = 0,    alpha decreasing

The NELBO weighs the cross-entropy at time t by -alpha'(t) / (1 - alpha(t))  (MDLM, arXiv 2406.07524; MD4, 2406.04329). The
bound is the same for every complete schedule (one that meets both ends) that all positions share; its variance is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Schedule(Protocol):
    """Anything with these methods is a schedule; nothing needs to inherit. `t` is in [0, 1]."""

    @property
    def complete(self) -> bool:
        """Whether alpha(0) = 1 and alpha(1) = 0: only then is the weighted loss a NELBO."""
        ...

    def alpha(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Probability that a token is visible at time t."""
        ...

    def alpha_prime(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """d alpha / dt, never positive."""
        ...

    def nelbo_weight(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """-alpha'(t) / (1 - alpha(t)), simplified so that it is accurate near both ends."""
        ...

    def inverse(self, alpha: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The time at which alpha is reached."""
        ...


@dataclass(frozen=True)
class Polynomial:
    """alpha(t) = 1 - t**power. power = 1 is the linear schedule of LLaDA (2502.09992), with weight 1/t."""

    power: float = 1.0
    complete = True

    def __post_init__(self) -> None:
        if self.power <= 0:
            raise ValueError(f"Polynomial: power must be positive, got {self.power}")

    def alpha(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return 1 - t**self.power

    def alpha_prime(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return -self.power * t ** (self.power - 1)

    def nelbo_weight(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return self.power / t  # the powers of t cancel: finite wherever a token is masked at all

    def inverse(self, alpha: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return (1 - alpha) ** (1 / self.power)


def Linear() -> Polynomial:
    """alpha(t) = 1 - t: the mask rate is t itself."""
    return Polynomial(1.0)


LogLinear = Linear
"""MDLM's name for it: its log-linear noise, sigma(t) = -log(1 - (1 - eps) t), is the linear schedule up to eps."""


@dataclass(frozen=True)
class Cosine:
    """alpha(t) = 1 - cos(pi/2 (1 - t)): MaskGIT's (2202.04200), in MD4's notation. The *mask rate* is a cosine of 1 - t."""

    complete = True

    def alpha(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return 2 * torch.sin(math.pi / 4 * (1 - t)) ** 2  # 1 - cos(x) = 2 sin^2(x / 2), without cancellation at t = 1

    def alpha_prime(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return -math.pi / 2 * torch.sin(math.pi / 2 * (1 - t))

    def nelbo_weight(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        angle = math.pi / 2 * t  # sin(pi/2 (1 - t)) = cos(pi/2 t): no cancellation at t = 0
        return math.pi / 2 * torch.cos(angle) / torch.sin(angle)

    def inverse(self, alpha: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return 1 - 4 / math.pi * torch.asin(torch.sqrt(alpha / 2))


@dataclass(frozen=True)
class MDLMCosine:
    """alpha(t) = cos(pi/2 t): MDLM's (2406.07524). The *visible* share is the cosine: not MaskGIT's, which is `Cosine`."""

    complete = True

    def alpha(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return torch.sin(math.pi / 2 * (1 - t))  # cos(pi/2 t), without cancellation at t = 1

    def alpha_prime(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return -math.pi / 2 * torch.sin(math.pi / 2 * t)

    def nelbo_weight(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return math.pi / 2 / torch.tan(math.pi / 4 * t)  # sin(x) / (1 - cos(x)) = 1 / tan(x / 2): none at t = 0

    def inverse(self, alpha: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return 2 / math.pi * torch.acos(alpha)


@dataclass(frozen=True)
class Geometric:
    """alpha(t) = (g(t) - g(1)) / (g(0) - g(1)) with g(t) = exp(-beta_min^(1-t) beta_max^t).

    g is the geometric schedule of MD4 (2406.04329, table 1; the defaults are its values). By itself it meets neither
    end exactly; normalised, it does.
    """

    beta_min: float = 1e-5
    beta_max: float = 20.0
    complete = True

    def __post_init__(self) -> None:
        if not 0 < self.beta_min < self.beta_max:
            raise ValueError(f"Geometric: 0 < beta_min < beta_max, got {self.beta_min} and {self.beta_max}")

    def _sigma(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return self.beta_min * (self.beta_max / self.beta_min) ** t

    @property
    def _span(self) -> float:
        return math.exp(-self.beta_min) - math.exp(-self.beta_max)

    def alpha(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return (torch.exp(-self._sigma(t)) - math.exp(-self.beta_max)) / self._span

    def alpha_prime(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        sigma = self._sigma(t)
        return -math.log(self.beta_max / self.beta_min) * sigma * torch.exp(-sigma) / self._span

    def nelbo_weight(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        # 1 - alpha = (g(0) - g(t)) / span, and g(0) - g(t) = -g(0) expm1(sigma(0) - sigma(t)) keeps its digits as t -> 0
        sigma = self._sigma(t)
        rise = self.beta_min * torch.expm1(t * math.log(self.beta_max / self.beta_min))  # sigma(t) - sigma(0)
        masked = -math.exp(-self.beta_min) * torch.expm1(-rise)
        return math.log(self.beta_max / self.beta_min) * sigma * torch.exp(-sigma) / masked

    def inverse(self, alpha: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        sigma = -torch.log(alpha * self._span + math.exp(-self.beta_max))
        return torch.log(sigma / self.beta_min) / math.log(self.beta_max / self.beta_min)


@dataclass(frozen=True)
class Truncated:
    """Mask rate rescaled to lo + (hi - lo) (1 - alpha_base(t)): with a linear base it is drawn from U[lo, hi].

    For training only (BD3-LM, 2503.09573): it is not complete, so its loss is no NELBO. The inverse is defined for mask
    rates in [lo, hi].
    """

    lo: float
    hi: float
    base: Schedule = field(default_factory=Linear)
    complete = False

    def __post_init__(self) -> None:
        if not 0 <= self.lo < self.hi <= 1:
            raise ValueError(f"Truncated: 0 <= lo < hi <= 1, got lo = {self.lo} and hi = {self.hi}")

    def alpha(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return 1 - self.lo - (self.hi - self.lo) * (1 - self.base.alpha(t))

    def alpha_prime(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return (self.hi - self.lo) * self.base.alpha_prime(t)

    def nelbo_weight(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return -self.alpha_prime(t) / (1 - self.alpha(t))

    def inverse(self, alpha: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return self.base.inverse(1 - (1 - alpha - self.lo) / (self.hi - self.lo))
