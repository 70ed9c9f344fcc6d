"""Scaling laws: the loss as a function of parameters N and tokens D, and how many tokens a model of N should see.

    L(N, D) = E + A / N^a + B / D^b                      (Hoffmann et al., 2203.15556, approach 3)
    D*(N) = (b B N^a / (a A))^(1/b)                      the least loss at equal compute, C proportional to N D

Fitted by least Huber loss of log L, so that a run that went wrong counts little; intervals by bootstrap over runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NAMES = ("E", "A", "B", "a", "b")
DELTA = 1e-3  # of the Huber loss, in log L: Hoffmann et al.'s
PAPER = (7754.0, 0.84)  # D*(N) = 7754 N^0.84, fitted to tri-modal masked diffusion in 2602.21472


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted law. E is in the loss's unit; `A / N^a` and `B / D^b` too."""

    E: float
    A: float
    B: float
    a: float
    b: float

    def loss(self, parameters: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray | float:
        """L(N, D)."""
        return self.E + self.A / np.asarray(parameters, float) ** self.a + self.B / np.asarray(tokens, float) ** self.b

    def optimal_tokens(self, parameters: np.ndarray | float) -> np.ndarray | float:
        """D*(N): the tokens at which neither more parameters nor more tokens would spend the next FLOP better."""
        return (self.b * self.B * np.asarray(parameters, float) ** self.a / (self.a * self.A)) ** (1 / self.b)

    @property
    def exponent(self) -> float:
        """D*(N) grows as N to this power."""
        return self.a / self.b


@dataclass(frozen=True)
class Fit:
    """law: of all runs;  draws: of bootstrap samples of them;  error: root mean square of log L - log of the law's."""

    law: ScalingLaw
    draws: list[ScalingLaw]
    error: float

    def interval(self, name: str, level: float = 0.9) -> tuple[float, float]:
        """The bootstrap interval of a constant, or of `exponent`."""
        values = [getattr(law, name) for law in self.draws]
        tail = (1 - level) / 2
        low, high = np.quantile(values, [tail, 1 - tail])
        return float(low), float(high)


def fit(
    parameters: Sequence[float] | np.ndarray,
    tokens: Sequence[float] | np.ndarray,
    losses: Sequence[float] | np.ndarray,
    draws: int = 200,
    seed: int = 0,
) -> Fit:
    """Fits the law to runs; a loss that is not finite (a run that diverged) is left out.

    Raises ValueError where fewer than six runs, or fewer than three sizes or horizons, are left: five constants need them.
    """
    n, d, y = (np.asarray(v, dtype=float) for v in (parameters, tokens, losses))
    if not len(n) == len(d) == len(y):
        raise ValueError(f"scaling: {len(n)} sizes, {len(d)} horizons and {len(y)} losses; one of each for every run")
    finite = np.isfinite(y) & (y > 0)
    n, d, y = n[finite], d[finite], y[finite]
    if len(y) < 6 or len(np.unique(n)) < 3 or len(np.unique(d)) < 3:
        raise ValueError(
            f"scaling: a fit needs at least 6 runs that finished, 3 sizes and 3 horizons; there are {len(y)} of "
            f"{len(np.unique(n))} sizes and {len(np.unique(d))} horizons"
        )
    best = min((_descend(start, n, d, y) for start in _starts(n, d, y)), key=lambda found: found[1])[0]
    law = _law(best, n, d)
    rng = np.random.default_rng(seed)
    sampled = []
    while len(sampled) < draws:
        chosen = rng.integers(0, len(y), len(y))
        if len(np.unique(n[chosen])) >= 3 and len(np.unique(d[chosen])) >= 3:
            sampled.append(_law(_descend(best, n[chosen], d[chosen], y[chosen], (n, d))[0], n, d))
    error = float(np.sqrt(np.mean((np.log(y) - np.log(law.loss(n, d))) ** 2)))
    return Fit(law, sampled, error)


def _starts(n: np.ndarray, d: np.ndarray, y: np.ndarray, keep: int = 6) -> list[np.ndarray]:
    """Of a grid of starting points (log E, log of both terms at the middle run, a, b) the closest to the losses."""
    low, terms = np.log(y.min()), (-3.0, -1.0)  # of the loss at the middle
    grid = [
        np.array([low + e, low + s, low + t, a, b])
        for e, s, t, a, b in itertools.product((-1.0, -0.1), terms, terms, (0.3, 0.8), (0.3, 0.8))
    ]
    return sorted(grid, key=lambda theta: np.abs(np.log(_law(theta, n, d).loss(n, d) / y)).sum())[:keep]


def _descend(
    start: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray, centre: tuple[np.ndarray, np.ndarray] | None = None
) -> tuple[np.ndarray, float]:
    """L-BFGS from a start; N and D are taken relative to their geometric means, which keeps the terms apart."""
    from scipy.optimize import minimize

    whole_n, whole_d = centre or (n, d)
    x, z, target = np.log(n) - np.log(whole_n).mean(), np.log(d) - np.log(whole_d).mean(), np.log(y)

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        e, s, t, a, b = theta
        parts = np.stack([np.full_like(x, e), s - a * x, t - b * z])
        top = parts.max(axis=0)
        weights = np.exp(parts - top)
        total = weights.sum(axis=0)
        residual = top + np.log(total) - target
        share = weights / total
        slope = np.clip(residual, -DELTA, DELTA)
        value = np.where(np.abs(residual) <= DELTA, residual**2 / 2, DELTA * (np.abs(residual) - DELTA / 2)).sum()
        gradient = np.array([(slope * g).sum() for g in (share[0], share[1], share[2], -share[1] * x, -share[2] * z)])
        return value / DELTA**2, gradient / DELTA**2

    bounds = [(None, None)] * 3 + [(0.02, 3.0)] * 2
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 2000})
    return found.x, float(found.fun)


def _law(theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> ScalingLaw:
    e, s, t, a, b = theta
    return ScalingLaw(
        E=float(np.exp(e)),
        A=float(np.exp(s + a * np.log(n).mean())),
        B=float(np.exp(t + b * np.log(d).mean())),
        a=float(a),
        b=float(b),
    )


def iso_flop(parameters: Sequence[float] | np.ndarray, losses: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The size of the least loss at one budget, and that loss (their approach 2, near the minimum alone).

    It is the vertex of the parabola in log N through the best size and its neighbours: further away a profile is no parabola.

    Raises ValueError for fewer than three sizes, or where the best is the smallest or the largest.
    """
    x, y = np.log(np.asarray(parameters, float)), np.asarray(losses, float)
    sizes = np.unique(x)
    if len(sizes) < 3:
        raise ValueError(f"scaling: a profile needs at least 3 sizes, got {len(sizes)}")
    means = np.array([y[x == size].mean() for size in sizes])
    i = int(means.argmin())
    if i in (0, len(sizes) - 1):
        raise ValueError("scaling: the best size of this budget is the smallest or the largest: its minimum is not bracketed")
    near = slice(i - 1, i + 2)
    c, b, a = np.polyfit(sizes[near] - sizes[i], means[near], 2)
    return float(np.exp(sizes[i] - b / (2 * c))), float(a - b**2 / (4 * c))
