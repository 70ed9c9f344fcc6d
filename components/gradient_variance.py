"""How noisy a gradient is: its total variance over independent draws at fixed weights, without bias.

    tr Sigma = (sum_k |g_k|^2 - |sum_k g_k|^2 / K) / (K - 1)
    |mu|^2   = |sum_k g_k|^2 / K^2 - tr Sigma / K

Two losses with the same expectation (any schedule's NELBO, with or without anti-masking) share mu, so that their variances
compare; otherwise tr Sigma / |mu|^2 does. A mean of squared norms alone is |mu|^2 + tr Sigma.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class GradientVariance:
    """Sums over draws; a tensor of any shape for each parameter, the same ones in every draw."""

    def __init__(self) -> None:
        self.draws: int = 0
        self._sums: list[Tensor] = []
        self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, gradients: Iterable[Tensor | None]) -> None:
        """One draw; a parameter that got none has a gradient of 0 and must be None in every draw."""
        own = [g.detach().double() for g in gradients if g is not None]
        self._sums = [s + g for s, g in zip(self._sums, own, strict=True)] if self.draws else own
        self._squares = self._squares + sum((g.square().sum() for g in own), torch.zeros((), dtype=torch.float64)).cpu()
        self.draws += 1

    @property
    def variance(self) -> float:
        """tr Sigma of one draw. Raises ValueError for fewer than two."""
        if self.draws < 2:
            raise ValueError(f"GradientVariance: a variance needs at least 2 draws, got {self.draws}")
        return float(self._squares - self._squared_sum / self.draws) / (self.draws - 1)

    @property
    def squared_mean(self) -> float:
        """|mu|^2; an estimate without bias, which may be negative where the noise is large."""
        return self._squared_sum / self.draws**2 - self.variance / self.draws

    @property
    def _squared_sum(self) -> float:
        return float(sum(s.square().sum() for s in self._sums))
